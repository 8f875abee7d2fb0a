"""The verb evaluate: suites of the LM Evaluation Harness on a trained model, alone or against another."""

from __future__ import annotations

import math
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from prism_lightning.cli.options import device_options, refuse_below, steered_parser, suite_options
from prism_lightning.common.json_text import as_json
from prism_lightning.evaluation import BATCH_TOKENS

if TYPE_CHECKING:
    from prism_lightning.evaluation.results import Difference, TaskResult
    from prism_lightning.evaluation.suites import SuiteTask

EXAMPLES = """examples:
  evaluate --ckpt_path runs/quickstart --suite evals/continuation.yaml
  evaluate --ckpt_path runs/prism_1b --suite evals/downstream.yaml --data_dir downloaded
  evaluate --ckpt_path runs/prism_1b --against runs/dense_1b --suite evals/downstream.yaml
  evaluate --ckpt_path runs/prism_1b --intervention calm --against runs/prism_1b --suite evals/downstream.yaml

Results are kept in RUN/evaluation: a file for each task and one for its samples. After an interruption the same command
evaluates only what is missing. With --against, the other model is evaluated too, without interventions, and differences
are taken document by document. With --intervention, results are kept in RUN/evaluation/NAME."""


def evaluate(arguments: list[str]) -> None:
    """Print the scores of a suite with standard errors and chance levels, and paired differences to another model."""
    parser = steered_parser(
        "evaluate",
        "Evaluate a model zero-shot on a suite of tasks of the LM Evaluation Harness.",
        epilog=EXAMPLES,
    )
    suite_options(parser)
    parser.add_argument("--against", type=Path, help="Another model; print the paired difference to it.")
    parser.add_argument("--limit", type=int, help="Maximum number of documents of each task (default: all).")
    parser.add_argument(
        "--batch_tokens",
        type=int,
        default=BATCH_TOKENS,
        help=f"Tokens in one forward pass, padding included (default {BATCH_TOKENS}).",
    )
    device_options(parser)
    parser.add_argument("--json", action="store_true", help="Print all results as JSON.")
    options = parser.parse_args(arguments)
    refuse_below(parser, options, 1, "limit", "batch_tokens")

    from prism_lightning.evaluation.suites import load_suites

    suite = load_suites(options.suite, options.tasks)
    runs = [(options.ckpt_path, options.intervention), *([(options.against, [])] if options.against else [])]
    _note_fitted_tasks(*runs[0], suite)
    settings = (options.limit, options.batch_tokens, options.json, options.device, options.dtype)
    results = [evaluated(run, interventions, suite, options.data_dir, *settings) for run, interventions in runs]
    differences = _differences(runs, results[0]) if options.against else []
    if options.json:
        content = [[asdict(result) for result in run_results] for run_results in results]
        print(as_json({"results": content, "differences": [asdict(difference) for difference in differences]}))
        return
    names = [_name(Path(run.name), interventions) for run, interventions in runs]
    names = names if len(set(names)) == len(names) else [_name(*run) for run in runs]
    _print_tables(names, results, differences)


def _note_fitted_tasks(run: Path, interventions: list[str], suite: dict[str, SuiteTask]) -> None:
    """Print a note for each intervention that was fitted to items of a task in the suite."""
    from prism_lightning.interventions.intervention import Intervention, located

    for name in interventions:
        tasks = set(Intervention.read(located(run, name)).origin.get("tasks", [])) & set(suite)
        if tasks:
            print(
                f"note: {name} was fitted to items of {', '.join(sorted(tasks))}; the same items may be scored here."
                " Its report has the gain on items that it was not fitted to.",
                file=sys.stderr,
            )


def _name(run: Path, interventions: list[str]) -> str:
    return " + ".join([str(run), *(Path(name).stem for name in interventions)])


def _differences(runs: list[tuple[Path, list[str]]], results: list[TaskResult]) -> list[Difference]:
    """Return the paired differences of two evaluated runs in every accuracy, and the average of several."""
    from prism_lightning.evaluation.results import average, paired, results_folder

    first, second = (results_folder(*run) for run in runs)
    # Only an accuracy is a mean over documents; a perplexity or the bits of a byte are ratios of sums.
    accuracies = [result for result in results if result.chance is not None]
    differences = [paired(first, second, result.task, result.metric) for result in accuracies]
    return differences + ([average(differences)] if len(differences) > 1 else [])


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
    """Return the results of a suite on a run with interventions; show progress and a line for each task.

    Args:
        run: run directory, or an exported folder.
        interventions: names or paths of the interventions to apply.
        suite, data_dir, limit, batch_tokens: see `evaluate_run`.
        quiet: print no lines; they are only printed where there is no terminal.
        device, dtype: see `load_exported`.

    Raises:
        UserError: as `load_with` and `evaluate_run`.
    """
    from prism_lightning.common.console import console
    from prism_lightning.common.progress import PhaseProgress
    from prism_lightning.evaluation.results import results_folder
    from prism_lightning.evaluation.run_evaluation import evaluate_run
    from prism_lightning.interventions.intervention import load_with

    name = _name(run, interventions)

    def print_result(result: TaskResult, note: str | None) -> None:
        if note:
            print(f"note: {name} {result.task}: {note}", file=sys.stderr)
        if not console.is_terminal and not quiet:
            score = f"{result.metric} {result.value:.4f}, {result.seconds:.1f} s"
            print(f"{name} {result.task}: {score}", flush=True)

    model, tokenizer = load_with(run, interventions, device, dtype)
    with PhaseProgress() as progress:
        return evaluate_run(
            model,
            tokenizer,
            run,
            results_folder(run, interventions),
            suite,
            data_dir=data_dir,
            limit=limit,
            batch_tokens=batch_tokens,
            dtype=dtype,
            report_result=print_result,
            report_progress=progress,
        )


def _print_tables(names: list[str], results: list[list[TaskResult]], differences: list[Difference]) -> None:
    from rich.table import Table

    from prism_lightning.common.console import console

    table = Table("task", "metric", "chance", *names, "items", "cut", show_edge=False)
    for number, result in enumerate(results[0]):
        scores = [_score(run_results[number]) for run_results in results]
        chance = "" if result.chance is None else f"{result.chance:.3f}"
        table.add_row(result.task, result.metric, chance, *scores, f"{result.documents:,}", f"{result.cut:,}")
    if len(results[0]) > 1 and all(result.chance is not None for result in results[0]):
        means = [sum(result.value for result in run_results) / len(run_results) for run_results in results]
        table.add_section()
        table.add_row("average", "", "", *(f"{mean:.4f}" for mean in means))
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
    """Return the value of the suite's metric with its standard error, where the harness knows one."""
    return f"{result.value:.4f}" + ("" if math.isnan(result.error) else f" ± {result.error:.4f}")


def lm_eval(arguments: list[str]) -> None:
    """Run the harness's own command line with `--model prism` registered.

    The harness (0.4.13) has no place where another package could announce a model to its script.
    """
    from lm_eval.__main__ import cli_evaluate

    import prism_lightning.evaluation.harness  # noqa: F401, registers the model

    sys.argv = ["python -m prism_lightning lm_eval", *arguments]
    cli_evaluate()
