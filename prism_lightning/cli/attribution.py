"""The verbs `attribute`, `prototypes` and `curvature`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prism_lightning.cli.options import device_options, model_parser, refuse_below, steered_parser
from prism_lightning.common.json_text import as_json
from prism_lightning.common.quick_imports import import_decoders
from prism_lightning.common.texts import decode_options, read_questions

if TYPE_CHECKING:
    from prism_lightning.attribution.attributor import Attributor
    from prism_lightning.attribution.results import Attribution

EXAMPLES = """examples:
  attribute --ckpt_path runs/quickstart --prompt "import os"
  attribute --ckpt_path runs/quickstart --text "def close(self):"
  attribute --ckpt_path runs/quickstart --prompt "import" --why " os" --rather_than " sys"
  attribute --ckpt_path runs/quickstart --queries questions.jsonl > answers.jsonl

Influence is in nats of the query's loss, to first order. Positive: training on it lowered that loss.
Each line of --queries is a JSON object with "text", or "prompt", or "prompt", "why" and "rather_than"."""


COLUMNS = """GN diag.: share of the Gauss-Newton matrix's squared norm on the diagonal blocks. Gram diag.: the same
share of E[a_i a_j]. co-active: effective number of blocks in a row. read: training tokens that share a prototype with a
token, at most; where few prototypes are active everywhere, a large diagonal is not local. cond.: damped condition
numbers. recovered, KL, top-1: how much of the prediction the prototypes carry, on the sample. UV, UVc: unexplained
share of the variance, and of the centred variance."""


def _index_options(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument("--index", type=Path, help=f"Folder of the index (default {default}).")
    parser.add_argument("--json", action="store_true", help="Print the results as JSON.")
    parser.add_argument(
        "--no_verify",
        action="store_true",
        help="Skip the comparison of the index's files with their checksums, which reads all of them.",
    )


def attribute(arguments: list[str]) -> None:
    """Print the training tokens, passages and documents behind the model's predictions."""
    parser = steered_parser(
        "attribute",
        "Attribute the model's predictions to training tokens, passages and documents.",
        epilog=EXAMPLES,
    )
    _index_options(parser, "RUN/index")
    question_flags = parser.add_mutually_exclusive_group(required=True)
    question_flags.add_argument("--prompt", help="Text that the model continues; each new token is attributed.")
    question_flags.add_argument("--text", help="Text of which every token is attributed.")
    question_flags.add_argument(
        "--queries", type=Path, help="JSON Lines file of many queries; results are JSON lines too."
    )
    parser.add_argument("--why", help="With --prompt and --rather_than: the preferred continuation of a contrast.")
    parser.add_argument("--rather_than", help="With --prompt and --why: the other continuation of a contrast.")
    parser.add_argument(
        "--max_new_tokens", type=int, default=5, help="With --prompt: number of new tokens (default 5)."
    )
    parser.add_argument(
        "--top", type=int, default=5, help="Number of tokens, passages and documents to print (default 5)."
    )
    parser.add_argument("--opposing", action="store_true", help="Print the training data that raised the loss most.")
    parser.add_argument(
        "--rerank",
        action="store_true",
        help="Re-rank by the head's K-FAC; needs an index of --index.space hidden with --index.hidden_rank.",
    )
    device_options(parser)
    options = parser.parse_args(arguments)
    if (options.why is None) != (options.rather_than is None) or (options.why is not None and options.prompt is None):
        parser.error("a contrast needs --prompt, --why and --rather_than together")
    refuse_below(parser, options, 1, "max_new_tokens", "top")

    decode_options(options, "prompt", "text", "why", "rather_than")
    questions = read_questions(options.queries) if options.queries else [_question_of(options)]
    import_decoders()

    from prism_lightning.attribution.attributor import Attributor
    from prism_lightning.interventions.intervention import load_with

    attributor = Attributor.open(
        options.ckpt_path,
        options.index,
        options.top,
        options.rerank,
        options.opposing,
        not options.no_verify,
        loaded=load_with(options.ckpt_path, options.intervention, options.device, options.dtype),
    )
    if options.queries:
        _answer_all(attributor, questions, options.max_new_tokens)
        return
    attributions = _answer(attributor, questions[0], options.max_new_tokens)
    if options.json:
        print(as_json([attribution.as_dict() for attribution in attributions]))
        return
    from prism_lightning.inspection.tables import print_attributions

    print_attributions(attributions)


def _question_of(options: argparse.Namespace) -> dict[str, str]:
    names = ("prompt", "text", "why", "rather_than")
    return {name: getattr(options, name) for name in names if getattr(options, name) is not None}


def _answer(attributor: Attributor, question: dict[str, str], new_tokens: int) -> list[Attribution]:
    if "text" in question:
        return attributor.text(question["text"])
    if "why" in question:
        return [attributor.contrast(question["prompt"], question["why"], question["rather_than"])]
    return attributor.prompt(question["prompt"], new_tokens)


def _answer_all(attributor: Attributor, questions: list[dict[str, str]], new_tokens: int) -> None:
    """Print one JSON line per query, in order; where a query fails, its line holds the error."""
    from prism_lightning.common.errors import UserError
    from prism_lightning.common.progress import PhaseProgress

    with PhaseProgress() as progress:
        for number, question in enumerate(questions):
            progress("attributing", number, len(questions))
            answer: dict[str, Any] = {"query": question}
            try:
                answer["attributions"] = [a.as_dict() for a in _answer(attributor, question, new_tokens)]
            except UserError as error:
                answer["error"] = str(error)
            print(as_json(answer), flush=True)


def prototypes(arguments: list[str]) -> None:
    """Print prototypes: labels, usage, promoted tokens, and training tokens in which they are active."""
    parser = model_parser(
        "prototypes",
        "Print the model's prototypes: a label from their neighbourhoods, usage, promoted tokens, and training tokens"
        " with the largest, middle and random activations. The first call indexes up to a million training tokens.",
    )
    _index_options(parser, "RUN/prototypes, which the first call builds")
    parser.add_argument(
        "--id", type=int, nargs="+", help="Numbers of the prototypes to print (default: the most used ones)."
    )
    parser.add_argument("--top", type=int, default=3, help="Number of prototypes, and of tokens per group (default 3).")
    device_options(parser)
    options = parser.parse_args(arguments)
    refuse_below(parser, options, 1, "top")

    from prism_lightning.inspection.cards import inspect_prototypes, measured_faithfulness
    from prism_lightning.inspection.tracing import own_attributor
    from prism_lightning.run.model_folder import load_exported

    loaded = load_exported(options.ckpt_path, options.device, options.dtype)
    attributor = own_attributor(options.ckpt_path, options.index, not options.no_verify, loaded)
    figures = measured_faithfulness(options.ckpt_path) if options.index is None else {}
    cards = inspect_prototypes(attributor, options.id, options.top, figures)
    if options.json:
        print(as_json([card.as_dict() for card in cards]))
        return
    from prism_lightning.inspection.tables import print_cards

    print_cards(cards)


def curvature(arguments: list[str]) -> None:
    """Print and plot the locality of runs' curvature."""
    parser = argparse.ArgumentParser(
        prog="python -m prism_lightning curvature",
        description="Measure the share of the Gauss-Newton matrix on the diagonal blocks, one per prototype: for a\n"
        "run's own prototypes, those of its index and fitted ones, beside the dense head and random prototypes.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--ckpt_path", type=Path, nargs="+", required=True, help="Run directories of finished fits.")
    parser.add_argument(
        "--fitted", nargs="*", default=[], metavar="K,k", help="Sizes of dictionaries to fit, e.g. 1024,8 4096,4."
    )
    parser.add_argument(
        "--tokens",
        type=int,
        default=131_072,
        help="Number of training tokens whose activations are counted (default 131,072).",
    )
    parser.add_argument(
        "--sample",
        type=int,
        default=4096,
        help="Number of these tokens whose curvatures are compared in pairs (default 4,096).",
    )
    parser.add_argument("--seed", type=int, default=0, help="Seed of fits, sample and random prototypes (default 0).")
    parser.add_argument("--out", type=Path, help="Folder of curvature.json and curvature.png (default: the first run).")
    device_options(parser)
    options = parser.parse_args(arguments)
    refuse_below(parser, options, 2, "tokens", "sample")
    fitted = []
    for pair in options.fitted:
        size, _, active = pair.partition(",")
        if not (size.isdigit() and active.isdigit() and int(active)):
            parser.error(f"--fitted {pair}: give K,k, e.g. 4096,4")
        fitted.append((int(size), int(active)))

    from prism_lightning.common.console import console
    from prism_lightning.common.progress import PhaseProgress
    from prism_lightning.inspection.curvature_report import measure_run, report_tables, write_report
    from prism_lightning.run.environment import environment
    from prism_lightning.run.model_folder import load_exported
    from prism_lightning.run.training_data import data_of

    rows: list[Any] = []
    with PhaseProgress() as progress:

        def report(step: str) -> None:
            progress(step, len(rows), len(rows) + 1)  # the number of rows is known at the end only

        for run in options.ckpt_path:
            model, _ = load_exported(run, options.device, options.dtype)
            data = data_of(run)
            name = f"{run}, commitment {model.config.commitment:g}"
            for row in measure_run(
                model, data.train, run, fitted, options.tokens, options.sample, options.seed, report
            ):
                rows.append((name, row))
    for table in report_tables(rows):
        console.print(table)
    console.print(COLUMNS, style="dim", markup=False)
    facts = {"tokens": options.tokens, "sample": options.sample, "seed": options.seed, "environment": environment()}
    for path in write_report(rows, options.out or options.ckpt_path[0], facts):
        print(f"wrote {path}")
