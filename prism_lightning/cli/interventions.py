"""The verbs that act on prototypes: suppress and calibrate."""

from __future__ import annotations

import argparse
import math
import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prism_lightning.cli.models import device_options, model_parser, refuse_below, suite_options
from prism_lightning.common.texts import decode_options

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from prism_lightning.evaluation.results import TaskResult
    from prism_lightning.evaluation.suites import SuiteTask
    from prism_lightning.interventions.suppression.behaviours import Behaviour
    from prism_lightning.models import PrismForCausalLM

EXAMPLES = 3  # training tokens of each group on a card

SUPPRESS = """examples:
  suppress --ckpt_path runs/tinystories_prism --words sad cry cried crying --name calm
  suppress --ckpt_path runs/tinystories_prism --with_texts rude.jsonl --without_texts kind.jsonl --name kind
  suppress --ckpt_path runs/tinystories_prism --id 318 77 --words sad --name two
  generate --ckpt_path runs/tinystories_prism --intervention calm --prompt "Tom was"

Prototypes are ranked on training documents, their number is chosen on one half of the run's validation documents, and
what that does is compared with rivals on the other half. RUN/interventions/NAME.json is the intervention; beside it
NAME.md has the comparison and a card of every prototype, NAME.png the plot, NAME.details.json all numbers."""

CALIBRATE = """examples:
  calibrate --ckpt_path runs/tinystories_prism --suite evals/continuation.yaml --name controllers
  evaluate --ckpt_path runs/tinystories_prism --intervention controllers --suite evals/language_modeling.yaml

Controllers are factors on prototypes, fitted to multiple-choice items and judged on others: a task's own training
split serves for the fit where it has one, otherwise one half of its items; tasks made from the run's documents are
fitted on training documents and judged on held-out ones. RUN/interventions/NAME.json is the
intervention; beside it NAME.md has the comparison and what stands behind the largest changes, NAME.png the plot,
NAME.details.json all numbers."""


def _suppress_options(arguments: list[str]) -> argparse.Namespace:
    parser = model_parser(
        "suppress",
        "Find the prototypes behind a behaviour and suppress them.",
        epilog=SUPPRESS,
    )
    parser.add_argument("--words", nargs="+", help="the behaviour: texts that have any of these words")
    parser.add_argument("--with_texts", type=Path, help="the behaviour by example: file of texts that show it ...")
    parser.add_argument("--without_texts", type=Path, help="... and of texts that do not")
    parser.add_argument("--id", type=int, nargs="+", help="suppress these prototypes; --words tells what to look for")
    parser.add_argument("--label", help="suppress all prototypes whose label has this text, as with --id")
    _name_option(parser)
    parser.add_argument("--fall", type=float, default=0.8, help="share by which the behaviour is to fall (default 0.8)")
    parser.add_argument("--rise", type=float, default=0.02, help="share by which perplexity may rise (default 0.02)")
    parser.add_argument("--factor", type=float, default=0.0, help="on the prototypes' terms (default 0, remove them)")
    parser.add_argument(
        "--tokens", type=int, default=200_000, help="of training documents, to rank prototypes on (default 200,000)"
    )
    parser.add_argument("--prompts", type=int, default=400, help="continued in each comparison (default 400)")
    parser.add_argument("--new_tokens", type=int, default=96, help="tokens of a continuation (default 96)")
    parser.add_argument(
        "--draws",
        type=int,
        default=20,
        help="of random prototypes, for comparison, at most; fewer where their mean is plain (default 20)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of continuations and draws (default 0)")
    parser.add_argument("--suite", nargs="+", type=Path, help="also score these suites, as it is and suppressed")
    parser.add_argument("--data_dir", type=Path, help="of the suites: folder with TASK/SPLIT.jsonl (default: the hub)")
    device_options(parser)
    options = parser.parse_args(arguments)
    by_example, by_hand = bool(options.with_texts or options.without_texts), bool(options.id or options.label)
    if by_example and (by_hand or options.words or not (options.with_texts and options.without_texts)):
        parser.error("--with_texts and --without_texts go together, and without --words, --id and --label")
    if not (by_example or options.words):
        parser.error(
            "--id and --label need --words: what to look for in the continuations"
            if by_hand
            else "say what to suppress: --words, --with_texts and --without_texts, --id or --label"
        )
    refuse_below(parser, options, 1, "tokens", "prompts", "new_tokens")
    refuse_below(parser, options, 0, "draws", "rise")
    if not 0 < options.fall <= 1:
        parser.error("--fall must be above 0 and at most 1: a share of the behaviour's rate, 0.8 is 80 %")
    if not math.isfinite(options.factor):
        parser.error("--factor must be a finite number")
    _check_name(parser, options.name)
    decode_options(options, "words", "label")
    return options


def suppress(arguments: list[str]) -> None:
    """Find the prototypes behind a behaviour, write an intervention that removes them, and show what that does."""
    options = _suppress_options(arguments)

    from prism_lightning.common.console import console
    from prism_lightning.common.progress import Progressing
    from prism_lightning.evaluation.suites import load_suites
    from prism_lightning.inspection.cards import inspect_prototypes
    from prism_lightning.inspection.tracing import own_attributor, prototypes_labelled
    from prism_lightning.interventions.intervention import folder_of
    from prism_lightning.interventions.suppression.experiment import SuppressionExperiment
    from prism_lightning.interventions.suppression.report import comparison_table, verdict
    from prism_lightning.interventions.suppression.settings import SuppressionSettings
    from prism_lightning.run.model_folder import run_directory
    from prism_lightning.run.training_data import data_of

    model, tokenizer = _prism(options)
    suite = load_suites(options.suite) if options.suite else {}
    data = data_of(run_directory(options.ckpt_path))
    behaviour, examples, labels = _behaviour(options, tokenizer)
    plain = _scored(options, suite, []) if suite else []
    attributor = own_attributor(options.ckpt_path, loaded=(model, tokenizer))
    given = [*(options.id or []), *(prototypes_labelled(attributor, options.label) if options.label else [])]
    names = ("factor", "tokens", "prompts", "new_tokens", "draws", "seed")
    settings = SuppressionSettings(options.fall, options.rise, **{name: getattr(options, name) for name in names})
    with Progressing() as progress:
        experiment = SuppressionExperiment(
            model,
            tokenizer,
            behaviour,
            examples or data.train.texts(data.train.sample(options.tokens)),
            data.validation.texts(),
            settings,
            given or None,
            labels,
            progress,
            lambda m: console.print(
                f"{m.name}: rate {m.stats.rate:.1%}, perplexity elsewhere {m.perplexity_increase:+.2%}"
            ),
        )
        result = experiment.run()
    cards = inspect_prototypes(attributor, list(result.kept_attempt.selection.scaling.factors), EXAMPLES)
    command = "python -m prism_lightning suppress " + shlex.join(arguments)
    path = folder_of(options.ckpt_path) / f"{options.name}.json"

    def scored() -> list[dict[str, Any]]:
        return _differences(options, plain, _scored(options, suite, [options.name])) if suite else []

    scores = experiment.report(result, path, command, cards, scored)
    for note in behaviour.notes:
        console.print(f"note: {note}", markup=False, style="yellow")
    console.print(comparison_table(result))
    for score in scores:
        console.print(
            f"{score['task']}: {score['plain']:.4f} unchanged, {score['suppressed']:.4f} suppressed", markup=False
        )
    console.print(verdict(result), markup=False)
    console.print(f"wrote {path} and, beside it, {options.name}.md and {options.name}.png", markup=False)


def _prism(options: argparse.Namespace) -> tuple[PrismForCausalLM, PreTrainedTokenizerFast]:
    from prism_lightning.common.errors import UserError
    from prism_lightning.run.model_folder import load_exported

    model, tokenizer = load_exported(options.ckpt_path, options.device, options.dtype)
    if model.prototypes is None:
        raise UserError(f"{options.ckpt_path} is dense: it has no prototypes to turn; give a PRISM model")
    return model, tokenizer


def _name_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--name", required=True, help="of the intervention: RUN/interventions/NAME.json")


def _check_name(parser: argparse.ArgumentParser, name: str) -> None:
    if not re.fullmatch(r"[\w-]+", name):
        parser.error(f"--name {name}: give a name of letters, digits, - and _")


def _scored(options: argparse.Namespace, suite: dict[str, SuiteTask], interventions: list[str]) -> list[TaskResult]:
    from prism_lightning.cli.evaluation import evaluated

    given = (options.ckpt_path, interventions, suite, options.data_dir)
    return evaluated(*given, device=options.device, dtype=options.dtype)


def _differences(
    options: argparse.Namespace, plain: list[TaskResult], suppressed: list[TaskResult]
) -> list[dict[str, Any]]:
    """The suites' metrics without the intervention and with it, and the paired difference where there is one."""
    from prism_lightning.cli.evaluation import results_folder
    from prism_lightning.evaluation.results import paired

    without, with_it = (results_folder(options.ckpt_path, names) for names in ([], [options.name]))
    rows = []
    for one, other in zip(plain, suppressed, strict=True):
        row: dict[str, Any] = {"task": one.task, "metric": one.metric, "plain": one.value, "suppressed": other.value}
        if one.chance is not None:
            difference = paired(with_it, without, one.task, one.metric)
            row |= {"difference": difference.value, "interval": difference.interval}
        rows.append(row)
    return rows


def _behaviour(
    options: argparse.Namespace, tokenizer: PreTrainedTokenizerFast
) -> tuple[Behaviour, list[str], list[bool] | None]:
    """The behaviour and, where it is told by example, the examples and which of them show it."""
    from prism_lightning.data.sources import local_files
    from prism_lightning.interventions.suppression.behaviours import ExampleBehaviour, WordBehaviour

    if options.words:
        return WordBehaviour(options.words, tokenizer), [], None
    shown, other = (
        [document.text for document in local_files(str(path), "text").documents()]
        for path in (options.with_texts, options.without_texts)
    )
    behaviour = ExampleBehaviour(options.with_texts.stem, shown, other)
    return behaviour, [*shown, *other], [True] * len(shown) + [False] * len(other)


def _calibrate_options(arguments: list[str]) -> argparse.Namespace:
    parser = model_parser(
        "calibrate",
        "Fit controllers: factors on prototypes that make right answers likelier.",
        epilog=CALIBRATE,
    )
    suite_options(parser)
    _name_option(parser)
    parser.add_argument("--items", type=int, default=2000, help="of each task to fit to, at most (default 2000)")
    parser.add_argument("--permutations", type=int, default=20, help="fits to permuted labels (default 20)")
    parser.add_argument(
        "--traced", type=int, default=10, help="cards in the report; all are in NAME.details.json (default 10)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of splits, folds and permutations (default 0)")
    device_options(parser)
    options = parser.parse_args(arguments)
    refuse_below(parser, options, 1, "items", "traced")
    refuse_below(parser, options, 0, "permutations")
    _check_name(parser, options.name)
    return options


def calibrate(arguments: list[str]) -> None:
    """Fit controllers to multiple-choice items, write them as an intervention, and show what they gain on others."""
    options = _calibrate_options(arguments)

    from prism_lightning.common.console import console
    from prism_lightning.common.progress import Progressing
    from prism_lightning.evaluation.suites import load_suites
    from prism_lightning.inspection.cards import inspect_prototypes
    from prism_lightning.inspection.tracing import own_attributor
    from prism_lightning.interventions.controllers.fitting import calibrate
    from prism_lightning.interventions.controllers.items import split_items
    from prism_lightning.interventions.controllers.report import details, figure, gain_table, markdown, traces
    from prism_lightning.interventions.intervention import Intervention, folder_of
    from prism_lightning.interventions.report_files import write_report
    from prism_lightning.models.steering import Scaling
    from prism_lightning.run.fingerprints import model_fingerprint
    from prism_lightning.run.model_folder import run_directory
    from prism_lightning.run.training_data import data_of

    model, tokenizer = _prism(options)
    suite = load_suites(options.suite, options.tasks)
    attributor = own_attributor(options.ckpt_path, loaded=(model, tokenizer))
    data = data_of(run_directory(options.ckpt_path))
    train, validation = data.train, data.validation
    progress = Progressing()
    with progress:
        calibration, held_out = split_items(
            model,
            tokenizer,
            suite,
            options.data_dir,
            # Twice as many documents as items, since some are too short for one.
            lambda: train.texts(train.sample_documents(2 * options.items, options.seed)),
            validation.texts,
            options.items,
            options.seed,
            progress,
        )
        found = calibrate(model, calibration, held_out, options.seed, options.permutations, progress)
    traced = traces(model, held_out, found)
    cards = inspect_prototypes(attributor, list(traced), EXAMPLES)
    command = "python -m prism_lightning calibrate " + shlex.join(arguments)
    origin = {"verb": "calibrate", "tasks": list(suite), "command": command, "penalty": list(found.controllers.penalty)}
    path = folder_of(options.ckpt_path) / f"{options.name}.json"
    Intervention(model_fingerprint(model), Scaling(found.controllers.factors), origin).write(path)
    facts = details(found, calibration, held_out, traced, cards) | {"verb": "calibrate"}
    report = markdown(found, calibration, held_out, traced, cards[: options.traced], command, f"{options.name}.png")
    write_report(path, facts, report, figure(found))
    console.print(gain_table(found))
    console.print(f"wrote {path} and, beside it, {options.name}.md and {options.name}.png", markup=False)
