"""The verb evaluate: suites of the LM Evaluation Harness on a trained model, alone or against another."""

from __future__ import annotations

import math
import sys
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from prism_lightning.cli.options import device_options, refuse_below, steered_parser, suite_options
from prism_lightning.common.json_text import as_json

if TYPE_CHECKING:
    from prism_lightning.evaluation.results import Difference, TaskResult
    from prism_lightning.evaluation.suites import SuiteTask

BATCH_TOKENS = 8192  # as the bridge has it, which takes seconds to import

EXAMPLES = """examples:
  evaluate --ckpt_path runs/quickstart --suite evals/continuation.yaml
  evaluate --ckpt_path runs/prism_1b --suite evals/downstream.yaml --data_dir downloaded
  evaluate --ckpt_path runs/prism_1b --against runs/dense_1b --suite evals/downstream.yaml
  evaluate --ckpt_path runs/prism_1b --intervention calm --against runs/prism_1b --suite evals/downstream.yaml

Results are kept in RUN/evaluation, a file for each task and one for its samples: the same command goes on where it was
interrupted. With --against, the other model is evaluated too, as it is, and differences are taken document by document.
With --intervention, results are kept in a folder of that name there."""


def evaluate(arguments: list[str]) -> None:
    """Print accuracies of a suite with standard errors and chance, and paired differences to another model."""
    parser = steered_parser(
        "evaluate",
        "Evaluate a model on a suite of the LM Evaluation Harness, zero-shot.",
        epilog=EXAMPLES,
    )
    suite_options(parser)
    parser.add_argument("--against", type=Path, help="another model: print the paired difference to it")
    parser.add_argument("--limit", type=int, help="documents of each task at most, for a first look")
    parser.add_argument(
        "--batch_tokens", type=int, default=BATCH_TOKENS, help=f"in one forward pass (default {BATCH_TOKENS})"
    )
    device_options(parser)
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    options = parser.parse_args(arguments)
    refuse_below(parser, options, 1, "limit", "batch_tokens")

    from prism_lightning.evaluation.results import average, paired
    from prism_lightning.evaluation.suites import load_suites

    suite = load_suites(options.suite, options.tasks)
    runs = [(options.ckpt_path, options.intervention), *([(options.against, [])] if options.against else [])]
    _say_what_was_fitted(*runs[0], suite)
    how = (options.limit, options.batch_tokens, options.json, options.device, options.dtype)
    found = [evaluated(run, names, suite, options.data_dir, *how) for run, names in runs]
    differences = []
    if options.against:
        one, other = (results_folder(*run) for run in runs)
        # Only an accuracy is a mean over documents; a perplexity or the bits of a byte are ratios of sums.
        accuracies = [result for result in found[0] if result.chance is not None]
        differences = [paired(one, other, result.task, result.metric) for result in accuracies]
        differences += [average(differences)] if len(differences) > 1 else []
    if options.json:
        content = [[asdict(result) for result in results] for results in found]
        print(as_json({"results": content, "differences": [asdict(d) for d in differences]}))
        return
    names = [_name(Path(run.name), interventions) for run, interventions in runs]
    names = names if len(set(names)) == len(names) else [_name(*run) for run in runs]
    _print(names, found, differences)


def _say_what_was_fitted(run: Path, interventions: list[str], suite: dict[str, SuiteTask]) -> None:
    from prism_lightning.interventions.intervention import Intervention, located

    for name in interventions:
        tasks = set(Intervention.read(located(run, name)).origin.get("tasks", [])) & set(suite)
        if tasks:
            print(
                f"note: {name} was fitted to items of {', '.join(sorted(tasks))}, which may be among these; its report"
                " has what it gains on others",
                file=sys.stderr,
            )


def results_folder(run: Path, interventions: list[str]) -> Path:
    """Where a run keeps what evaluations found, without or with interventions."""
    from prism_lightning.run.directory import RunPaths

    return RunPaths.of(run).evaluation / "+".join(Path(name).stem for name in interventions)


def _name(run: Path, interventions: list[str]) -> str:
    return " + ".join([str(run), *(Path(name).stem for name in interventions)])


def evaluated(
    run: Path,
    interventions: list[str],
    suite: dict[str, SuiteTask],
    data_dir: Path | None,
    limit: int | None = None,
    batch_tokens: int = BATCH_TOKENS,
    quiet: bool = False,
    device: str = "auto",
    dtype: str = "fp32",
) -> list[TaskResult]:
    """Results of a suite on a run with interventions, with progress, and without a terminal a line a task."""
    from prism_lightning.common.console import console
    from prism_lightning.common.progress import Progressing
    from prism_lightning.evaluation.evaluator import run_suite
    from prism_lightning.evaluation.harness import PrismHarnessModel
    from prism_lightning.evaluation.tasks import build_tasks, why_fewer
    from prism_lightning.interventions.intervention import load_with
    from prism_lightning.run.directory import RunPaths
    from prism_lightning.run.fingerprints import model_fingerprint

    @cache
    def texts() -> list[str]:
        from prism_lightning.run.training_data import data_of

        return data_of(RunPaths.of(run).root).validation.texts()

    model, tokenizer = load_with(run, interventions, device, dtype)
    identity: dict[str, object] = {"model": model_fingerprint(model), "data_dir": str(data_dir) if data_dir else None}
    identity |= {"scalings": model.config.scalings} if model.scalings else {}
    identity |= {"dtype": dtype} if dtype != "fp32" else {}
    tasks = build_tasks(suite, data_dir, texts)

    def finished(result: TaskResult) -> None:
        settings = suite[result.task]
        asked = limit or (0 if settings.kind == "harness" else settings.documents)
        reason = why_fewer(settings, result.documents, asked, texts)
        if reason:
            name = _name(run, interventions)
            print(f"note: {name} {result.task}: {result.documents:,} of {asked:,} items: {reason}", file=sys.stderr)
        if not console.is_terminal and not quiet:
            scored = f"{result.metric} {result.value:.4f}, {result.seconds:.1f} s"
            print(f"{_name(run, interventions)} {result.task}: {scored}", flush=True)

    with Progressing() as progress:
        bridge = PrismHarnessModel(model=model, tokenizer=tokenizer, batch_tokens=batch_tokens, report=progress)
        return run_suite(bridge, suite, tasks, results_folder(run, interventions), identity, limit, finished)


def _print(names: list[str], found: list[list[TaskResult]], differences: list[Difference]) -> None:
    from rich.table import Table

    from prism_lightning.common.console import console

    table = Table("task", "metric", "chance", *names, "items", "cut", show_edge=False)
    for number, result in enumerate(found[0]):
        scores = [_score(results[number]) for results in found]
        chance = "" if result.chance is None else f"{result.chance:.3f}"
        table.add_row(result.task, result.metric, chance, *scores, f"{result.documents:,}", f"{result.cut:,}")
    if len(found[0]) > 1 and all(result.chance is not None for result in found[0]):
        table.add_section()
        table.add_row("average", "", "", *(f"{sum(r.value for r in results) / len(results):.4f}" for results in found))
    console.print(table)
    if differences:
        title = f"{names[0]} - {names[1]}, item by item"
        table = Table("task", "difference", "95 %", "items", title=title, title_justify="left", show_edge=False)
        for difference in differences:
            low, high = difference.interval
            table.add_row(
                difference.task, f"{difference.value:+.4f}", f"{low:+.4f} to {high:+.4f}", f"{difference.documents:,}"
            )
        console.print(table)


def _score(result: TaskResult) -> str:
    return f"{result.value:.4f}" + ("" if math.isnan(result.error) else f" ± {result.error:.4f}")


def lm_eval(arguments: list[str]) -> None:
    """The harness's own command line, with `--model prism` known to it.

    The harness (0.4.13) has no place where another package could announce a model to its script.
    """
    import sys

    from lm_eval.__main__ import cli_evaluate

    import prism_lightning.evaluation.harness  # noqa: F401, registers the model

    sys.argv = ["python -m prism_lightning lm_eval", *arguments]
    cli_evaluate()
