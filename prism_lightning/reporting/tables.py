"""Tables of a report from finished runs.

A cell without a measurement is empty, and the table lists the commands that produce the missing results.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np

from prism_lightning.common.counts import format_count
from prism_lightning.common.errors import UserError
from prism_lightning.evaluation.results import Difference, average, paired_over_seeds
from prism_lightning.evaluation.suites import SuiteTask
from prism_lightning.reporting.runs import Run, group_seeds, mean_and_spread, twin_pairs
from prism_lightning.run.directory import RunPaths

Suites = dict[str, dict[str, SuiteTask]]  # tasks by name, by the path of the suite file

MODEL_COLUMNS = ["parameters", "with prototypes", "tokens", "model"]
SIZES_NOTE = (
    "Parameters are those of decoder, embeddings and head, which twins share; the next column adds those of the"
    " prototypes."
)
# Columns of measurements: their key in results.jsonl, and the format of a cell.
LOSSES = {
    "validation loss": ("loss", "{:.4f}"),
    "perplexity": ("perplexity", "{:.2f}"),
    "bits per byte": ("bits_per_byte", "{:.4f}"),
}
PROTOTYPES = {
    "prediction recovered": ("prediction_recovered", "{:.3f}"),
    "KL, nats": ("prediction_divergence", "{:.3f}"),
    "top-1 agreement": ("top1_agreement", "{:.3f}"),
    "of centred variance": ("unexplained_centred_variance", "{:.3f}"),
    "unexplained variance": ("unexplained_variance", "{:.3f}"),
    "before polishing": ("unexplained_variance_before_polish", "{:.3f}"),
    "prototype to nearest token": ("prototype_to_token", "{:.3f}"),
    "token to nearest prototype": ("token_to_prototype", "{:.3f}"),
    "dead share": ("dead_share", "{:.3f}"),
    "usage entropy": ("usage_entropy", "{:.3f}"),
}


@dataclass
class Table:
    """One table of a report.

    Attributes:
        title, columns, rows, note: Content of the table.
        missing: Commands that produce its missing results.
    """

    title: str
    columns: list[str]
    rows: list[list[str]]
    note: str = ""
    missing: list[str] = field(default_factory=list)


def run_tables(runs: list[Run], suites: Suites) -> Iterator[Table]:
    """Yield the tables that need only runs and their evaluations."""
    yield accuracy_table(runs, suites)
    if twin_pairs(runs):
        yield difference_table(runs, suites)
    yield loss_table(runs, suites)
    if any(run.prototypes for run in runs):
        yield prototype_table(runs)
    if twin_pairs(runs):
        yield throughput_table(runs)


def accuracy_tasks(suites: Suites) -> dict[str, SuiteTask]:
    """Return the tasks whose metric is an accuracy, by name."""
    return {name: task for suite in suites.values() for name, task in suite.items() if task.chance is not None}


def accuracy_table(runs: list[Run], suites: Suites) -> Table:
    """Return the accuracies of each model, with those of chance."""
    tasks = accuracy_tasks(suites)
    rows = [["chance", "", "", "", *(f"{100 * (task.chance or 0):.1f}" for task in tasks.values()), ""]]
    for seeds in group_seeds(runs).values():
        cells = [_accuracy_cell(seeds, name) for name in tasks]
        results = [mean_and_spread(seeds, _metric_of(name)) for name in tasks]
        means = [result[0] for result in results if result is not None]
        average_cell = f"{100 * sum(means) / len(means):.1f}" if means and len(means) == len(results) else ""
        rows.append([*_model_cells(seeds[0]), *cells, average_cell])
    return Table(
        "Accuracy, zero-shot",
        [*MODEL_COLUMNS, *tasks, "average"],
        rows,
        "In percent, ± the standard deviation over seeds. With one seed, ± is the standard error over items."
        f" {SIZES_NOTE}",
        _evaluate_commands(runs, suites, lambda task: task.chance is not None),
    )


def _model_cells(run: Run) -> list[str]:
    return [run.size, run.size_with_prototypes, format_count(run.tokens), run.label]


def _accuracy_cell(runs: list[Run], task: str) -> str:
    result = mean_and_spread(runs, _metric_of(task))
    if result is None:
        return ""
    mean, spread = result
    if spread is None:
        spread = next(run.tasks[task].error for run in runs if task in run.tasks)
    return f"{100 * mean:.1f}" + ("" if math.isnan(spread) else f" ± {100 * spread:.1f}")


def _metric_of(task: str) -> Callable[[Run], float | None]:
    """Return a function that gives a run's metric of a task; None if the run has no such result."""
    return lambda run: run.tasks[task].value if task in run.tasks else None


def _evaluate_commands(runs: list[Run], suites: Suites, included: Callable[[SuiteTask], bool]) -> list[str]:
    """Return commands that evaluate what runs lack of the included tasks, one for each suite."""
    commands = []
    for path, suite in suites.items():
        names = [name for name, task in suite.items() if included(task)]
        incomplete = [shlex.quote(str(run.path)) for run in runs if any(name not in run.tasks for name in names)]
        if not incomplete:
            continue
        target = incomplete[0] if len(incomplete) == 1 else '"$run"'
        command = f"python -m prism_lightning evaluate --ckpt_path {target} --suite {path}"
        commands.append(command if len(incomplete) == 1 else f"for run in {' '.join(incomplete)}; do {command}; done")
    return commands


def difference_table(runs: list[Run], suites: Suites) -> Table:
    """Return the differences in accuracy between twins, PRISM minus dense."""
    tasks = accuracy_tasks(suites)
    rows = []
    for pairs in twin_pairs(runs).values():
        differences = [paired_difference(pairs, name, task.metric) for name, task in tasks.items()]
        measured = [difference for difference in differences if difference is not None]
        complete = len(measured) == len(differences) > 1
        cells = [format_points(difference) for difference in [*differences, average(measured) if complete else None]]
        rows.append([*_model_cells(pairs[0][0]), str(len(pairs)), *cells])
    return Table(
        "Accuracy difference, PRISM minus dense",
        [*MODEL_COLUMNS, "seeds", *tasks, "average"],
        rows,
        "In points of accuracy, paired by item, with 95 % intervals over items. The difference of each item is averaged"
        " over seeds first.",
    )


def paired_difference(pairs: list[tuple[Run, Run]], task: str, metric: str) -> Difference | None:
    """Return the difference of a metric between twins over seeds, PRISM minus dense.

    It is None if a run has no result of the task, or if the runs' samples are damaged or of different documents.
    """
    if any(task not in run.tasks for pair in pairs for run in pair):
        return None
    folders = [(RunPaths(prism.path).evaluation, RunPaths(dense.path).evaluation) for prism, dense in pairs]
    try:
        return paired_over_seeds(folders, task, metric)
    except (UserError, OSError, KeyError, ValueError):
        return None


def format_points(difference: Difference | None) -> str:
    """Return a difference of accuracies in points with its interval; empty for None."""
    if difference is None:
        return ""
    low, high = difference.interval
    return f"{100 * difference.value:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"


def loss_table(runs: list[Run], suites: Suites) -> Table:
    """Return validation loss, PRISM's loss over dense, and the metrics of language modeling tasks."""
    tasks = {name: task for suite in suites.values() for name, task in suite.items() if task.chance is None}
    gaps = {
        key: [prism.results["loss"] / dense.results["loss"] - 1 for prism, dense in pairs]
        for key, pairs in twin_pairs(runs).items()
    }
    rows = []
    for key, seeds in group_seeds(runs).items():
        cells = [_mean_cell(seeds, name, form) for name, form in LOSSES.values()]
        cells.append(_percent_cell(gaps[key], "{:+.2f}", "{:.2f}") if key in gaps else "")
        for name in tasks:
            result = mean_and_spread(seeds, _metric_of(name))
            cells.append("" if result is None else f"{result[0]:.4f}")
        rows.append([*_model_cells(seeds[0]), str(len(seeds)), *cells])
    task_columns = [f"{name}: {task.metric}" for name, task in tasks.items()]
    return Table(
        "Language modeling",
        [*MODEL_COLUMNS, "seeds", *LOSSES, "loss over dense", *task_columns],
        rows,
        "Loss is in nats per token. All seeds are validated on the same documents. ± is the standard deviation over"
        " seeds.",
        _evaluate_commands(runs, suites, lambda task: task.chance is None),
    )


def _mean_cell(runs: list[Run], key: str, form: str) -> str:
    """Return the mean of a measurement over seeds, and its standard deviation if there are several."""
    result = mean_and_spread(runs, lambda run: run.results.get(key))
    if result is None:
        return ""
    mean, spread = result
    return form.format(mean) + ("" if spread is None else f" ± {form.format(spread)}")


def _percent_cell(shares: list[float], mean_form: str, spread_form: str) -> str:
    """Return the mean of shares in percent, and their standard deviation if there are several."""
    cell = f"{mean_form.format(100 * np.mean(shares))} %"
    return cell + (f" ± {spread_form.format(100 * np.std(shares, ddof=1))}" if len(shares) > 1 else "")


def prototype_table(runs: list[Run]) -> Table:
    """Return how well prototypes explain hidden states, how near tokens they are, and how evenly they are used."""
    rows = [
        [
            *_model_cells(seeds[0]),
            f"{seeds[0].prototypes:,}",
            *(_mean_cell(seeds, key, form) for key, form in PROTOTYPES.values()),
        ]
        for seeds in group_seeds(runs).values()
        if seeds[0].prototypes
    ]
    note = (
        "On the validation split. Distances are 1 - cosine. The dead share is that of prototypes that no token uses. ±"
        " is the standard deviation over seeds."
    )
    return Table("Prototypes", [*MODEL_COLUMNS, "prototypes", *PROTOTYPES], rows, note)


def throughput_table(runs: list[Run]) -> Table:
    """Return the training speed and peak host memory of twins."""
    rows = []
    for pairs in twin_pairs(runs).values():
        ratios = [ratio for pair in pairs if (ratio := speed_ratio(pair)) is not None]
        prism, dense = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
        rates = [_mean_cell(group, "tokens_per_second", "{:,.0f}") for group in (dense, prism)]
        memory = [_mean_cell(group, "peak_memory_gib", "{:.2f}") for group in (dense, prism)]
        ratio_cell = _percent_cell(ratios, "{:.1f}", "{:.1f}") if ratios else ""
        rows.append([*_model_cells(pairs[0][0]), *rates, ratio_cell, *memory])
    return Table(
        "Training throughput",
        [*MODEL_COLUMNS, "dense, tokens/s", "PRISM, tokens/s", "PRISM / dense", "dense, host GiB", "PRISM, host GiB"],
        rows,
        "At the end of each run. Other work on the machine affects these numbers; `python -m"
        " benchmarks.training.throughput` measures the ratio in turns.",
    )


def speed_ratio(pair: tuple[Run, Run]) -> float | None:
    """Return PRISM's tokens per second over those of its dense twin; None if one of them is not known."""
    prism, dense = (run.results.get("tokens_per_second") for run in pair)
    return prism / dense if prism and dense else None


def run_table(runs: list[Run]) -> Table:
    """Return the origin of every number: directory, data, seed and commit of each run."""
    rows = [
        [
            str(run.path),
            *_model_cells(run),
            run.data_name,
            run.data[:8],
            str(run.seed),
            str(run.results.get("commit"))[:10],
        ]
        for run in runs
    ]
    columns = ["directory", *MODEL_COLUMNS, "data", "data fingerprint", "seed", "commit"]
    return Table("Runs of this report", columns, rows, SIZES_NOTE)
