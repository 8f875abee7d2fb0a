"""The tables of a report. A cell is what runs produced, or empty; what would fill it is said below the table."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from prism_lightning.common.counts import format_count
from prism_lightning.common.errors import UserError
from prism_lightning.evaluation.results import Difference, average, paired_over_seeds
from prism_lightning.evaluation.suites import SuiteTask
from prism_lightning.reporting.runs import Run, grouped, mean_and_spread, twins

Suites = dict[str, dict[str, SuiteTask]]  # tasks by the suite file that names them


@dataclass
class Table:
    """One table.

    Attributes:
        title, columns, rows, note: what is shown.
        missing: commands that would fill its empty cells.
    """

    title: str
    columns: list[str]
    rows: list[list[str]]
    note: str = ""
    missing: list[str] = field(default_factory=list)


def accuracies(suites: Suites) -> dict[str, SuiteTask]:
    """The tasks whose metric is an accuracy, by name."""
    return {name: task for suite in suites.values() for name, task in suite.items() if task.chance is not None}


def accuracy_table(runs: list[Run], suites: Suites) -> Table:
    """Accuracies by size and model, with chance, and the spread over seeds or else the harness's standard error."""
    tasks = accuracies(suites)
    rows = [["chance", "", "", "", *(f"{100 * (task.chance or 0):.1f}" for task in tasks.values()), ""]]
    for mine in grouped(runs).values():
        cells = [_accuracy(mine, name) for name in tasks]
        means = [mean_and_spread(mine, _value(name)) for name in tasks]
        whole = [mean[0] for mean in means if mean is not None]
        average = f"{100 * sum(whole) / len(whole):.1f}" if whole and len(whole) == len(means) else ""
        rows.append([*_place(mine[0]), *cells, average])
    return Table(
        "Accuracy, zero-shot",
        [*PLACE, *tasks, "average"],
        rows,
        f"In percent. ± the standard deviation over seeds, or with one seed the standard error over items. {SIZES}",
        _evaluations(runs, suites, lambda task: task.chance is not None),
    )


PLACE = ["decoder + head", "with prototypes", "tokens", "model"]
SIZES = "Parameters: of decoder, embeddings and head, which twins share, and with a PRISM model's prototypes."


def _place(run: Run) -> list[str]:
    return [run.size, run.whole_size, format_count(run.tokens), run.label]


def _accuracy(runs: list[Run], task: str) -> str:
    found = mean_and_spread(runs, _value(task))
    if found is None:
        return ""
    mean, spread = found
    if spread is None:
        spread = next(run.tasks[task].error for run in runs if task in run.tasks)
    return f"{100 * mean:.1f}" + ("" if math.isnan(spread) else f" ± {100 * spread:.1f}")


def _value(task: str):  # type: ignore[no-untyped-def]
    return lambda run: run.tasks[task].value if task in run.tasks else None


def _evaluations(runs: list[Run], suites: Suites, counts) -> list[str]:  # type: ignore[no-untyped-def]
    """Commands that evaluate what is missing."""
    commands = []
    for path, suite in suites.items():
        wanted = [name for name, task in suite.items() if counts(task)]
        lacking = [shlex.quote(str(run.path)) for run in runs if any(name not in run.tasks for name in wanted)]
        each = lacking[0] if len(lacking) == 1 else '"$run"'
        command = f"python -m prism_lightning evaluate --ckpt_path {each} --suite {path}"
        commands += [command] if len(lacking) == 1 else []
        commands += [f"for run in {' '.join(lacking)}; do {command}; done"] if len(lacking) > 1 else []
    return commands


def difference_table(runs: list[Run], suites: Suites) -> Table:
    """PRISM minus dense, item by item, for each size."""
    tasks = accuracies(suites)
    rows = []
    for pairs in twins(runs).values():
        found = [difference(pairs, name, task.metric) for name, task in tasks.items()]
        measured = [one for one in found if one is not None]
        whole = [average(measured)] if measured and len(measured) == len(found) and len(found) > 1 else [None]
        cells = [points(one) for one in found + whole]  # type: ignore[operator]
        rows.append([*_place(pairs[0][0]), str(len(pairs)), *cells])
    return Table(
        "PRISM minus dense, paired by item",
        [*PLACE, "seeds", *tasks, "average"],
        rows,
        "In points of accuracy, with 95 % intervals over items; each item's difference is averaged over seeds first.",
    )


def difference(pairs: list[tuple[Run, Run]], task: str, metric: str) -> Difference | None:
    """PRISM minus dense over the seeds; None where a run lacks the task or they have no documents in common."""
    if any(task not in run.tasks for pair in pairs for run in pair):
        return None
    folders = [(one.path / "evaluation", other.path / "evaluation") for one, other in pairs]
    try:
        return paired_over_seeds(folders, task, metric)
    except (UserError, OSError, KeyError, ValueError):  # or samples that somebody removed or cut off
        return None


def points(found: Difference | None) -> str:
    """A difference of accuracies in points, with its interval."""
    if found is None:
        return ""
    low, high = found.interval
    return f"{100 * found.value:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"


LOSSES = {
    "validation loss": ("loss", "{:.4f}"),
    "perplexity": ("perplexity", "{:.2f}"),
    "bits per byte": ("bits_per_byte", "{:.4f}"),
}
PROTOTYPES = {
    "unexplained variance": ("unexplained_variance", "{:.3f}"),
    "before polishing": ("unexplained_variance_before_polish", "{:.3f}"),
    "prototype to nearest token": ("prototype_to_token", "{:.3f}"),
    "token to nearest prototype": ("token_to_prototype", "{:.3f}"),
    "dead share": ("dead_share", "{:.3f}"),
    "usage entropy": ("usage_entropy", "{:.3f}"),
}


def loss_table(runs: list[Run], suites: Suites) -> Table:
    """Validation loss and what else of language modeling was measured, with the twins' gap."""
    tasks = {name: task for suite in suites.values() for name, task in suite.items() if task.chance is None}
    gaps = {
        place: [one.results["loss"] / other.results["loss"] - 1 for one, other in p] for place, p in twins(runs).items()
    }
    rows = []
    for group, mine in grouped(runs).items():
        cells = [_figure(mine, key, form) for key, form in LOSSES.values()]
        gap = gaps.get(group, [])
        cells.append(
            f"{100 * np.mean(gap):+.2f} %" + (f" ± {100 * np.std(gap, ddof=1):.2f}" if len(gap) > 1 else "")
            if gap
            else ""
        )
        for name in tasks:
            found = mean_and_spread(mine, _value(name))
            cells.append("" if found is None else f"{found[0]:.4f}")
        rows.append([*_place(mine[0]), str(len(mine)), *cells])
    return Table(
        "Language modeling",
        [
            *PLACE,
            "seeds",
            *LOSSES,
            "loss over dense",
            *(f"{n}: {t.metric}" for n, t in tasks.items()),
        ],
        rows,
        "Validation documents are the same for all seeds. ± is the standard deviation over seeds.",
        _evaluations(runs, suites, lambda task: task.chance is None),
    )


def _figure(runs: list[Run], key: str, form: str) -> str:
    found = mean_and_spread(runs, lambda run: run.results.get(key))
    if found is None:
        return ""
    return form.format(found[0]) + ("" if found[1] is None else f" ± {form.format(found[1])}")


def prototype_table(runs: list[Run]) -> Table:
    """How well prototypes explain hidden states, how near they are to tokens, how evenly they are used."""
    rows = [
        [
            *_place(mine[0]),
            f"{mine[0].prototypes:,}",
            *(_figure(mine, *one) for one in PROTOTYPES.values()),
        ]
        for mine in grouped(runs).values()
        if mine[0].prototypes
    ]
    note = "On the validation split. Distances are 1 - cosine. ± is the standard deviation over seeds."
    return Table("Prototypes", [*PLACE, "prototypes", *PROTOTYPES], rows, note)


def throughput_table(runs: list[Run]) -> Table:
    """Training speed as the runs had it, and PRISM's over dense."""
    rows = []
    for pairs in twins(runs).values():
        ratios = [ratio for pair in pairs if (ratio := speed_ratio(pair)) is not None]
        prism, dense = ([pair[side] for pair in pairs] for side in (0, 1))
        cells = [_figure(side, "tokens_per_second", "{:,.0f}") for side in (dense, prism)]
        shown = f"{100 * np.mean(ratios):.1f} %" + (f" ± {100 * np.std(ratios, ddof=1):.1f}" if len(ratios) > 1 else "")
        memory = [_figure(side, "peak_memory_gib", "{:.2f}") for side in (dense, prism)]
        rows.append([*_place(pairs[0][0]), *cells, shown if ratios else "", *memory])
    return Table(
        "Training throughput",
        [*PLACE, "dense, tokens/s", "tokens/s", "over dense", "dense, host GiB", "host GiB"],
        rows,
        "At the end of each run, with whatever ran beside it: for a fair ratio run `python -m"
        " benchmarks.training.throughput`.",
    )


def speed_ratio(pair: tuple[Run, Run]) -> float | None:
    """PRISM's tokens a second over its twin's."""
    prism, dense = (run.results.get("tokens_per_second") for run in pair)
    return prism / dense if prism and dense else None


def run_table(runs: list[Run]) -> Table:
    """Where every number comes from."""
    rows = [
        [str(run.path), *_place(run), run.data_name, run.data[:8], str(run.seed), str(run.results.get("commit"))[:10]]
        for run in runs
    ]
    columns = ["directory", *PLACE, "data", "fingerprint", "seed", "commit"]
    return Table("Runs", columns, rows, f"{SIZES} Fingerprint: of the prepared data.")


def run_tables(runs: list[Run], suites: Suites) -> Iterator[Table]:
    """Every table that needs nothing but runs."""
    yield accuracy_table(runs, suites)
    if twins(runs):
        yield difference_table(runs, suites)
    yield loss_table(runs, suites)
    if any(run.prototypes for run in runs):
        yield prototype_table(runs)
    if twins(runs):
        yield throughput_table(runs)
