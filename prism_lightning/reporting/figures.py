"""Figures of a report as SVG files."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from prism_lightning.common.counts import format_count
from prism_lightning.common.plot_style import DENSE, GOAL_LINE, LEGEND_FONT_SIZE, SERIES, new_figure
from prism_lightning.reporting.runs import Run, group_seeds, mean_and_spread, twin_pairs
from prism_lightning.reporting.scaling import Scaling

MARKERS = "osD^vP*X"
Pairs = list[tuple[Run, Run]]  # a PRISM run and its dense twin, for each seed


def draw_figures(runs: list[Run], scaling: Scaling, folder: Path) -> Iterator[tuple[Path, str]]:
    """Write the figures that the runs have data for, and yield the path and the caption of each."""
    if len({(run.parameters, run.tokens) for run in runs}) > 1:
        yield _save(_loss_figure(runs, scaling), folder / "loss.svg"), "Validation loss by size, and fitted scaling law"
        tasks = sorted({name for run in runs for name, task in run.tasks.items() if task.chance is not None})
        if tasks:
            yield (
                _save(_accuracy_figure(runs, tasks), folder / "accuracy.svg"),
                "Accuracy by size, for the largest token count of each size; dotted: chance",
            )
    if len(twin_pairs(runs)) > 1:
        caption = "Relative increase in loss due to prototypes, and variance that they leave unexplained"
        yield _save(_gap_figure(runs), folder / "gap.svg"), caption


def _save(figure: Figure, path: Path) -> Path:
    """Write a figure as a bare <svg> element, which can stand in an HTML page."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    path.write_text(text[text.index("<svg") :])
    return path


def _plot_means(axes: Axes, groups: list[list[Run]], value: Callable[[Run], float | None], **style: Any) -> None:
    """Plot the mean over seeds of a value by size, with the standard deviation as error bars."""
    results = [(group[0].parameters, mean_and_spread(group, value)) for group in groups]
    points = [(size, *result) for size, result in results if result is not None]
    if points:
        sizes, means, spreads = zip(*points, strict=True)
        axes.errorbar(sizes, means, yerr=[spread or 0 for spread in spreads], capsize=2, markersize=5, **style)


def _groups_by_label(runs: list[Run]) -> dict[str, list[list[Run]]]:
    groups: dict[str, list[list[Run]]] = {}
    for seeds in group_seeds(runs).values():
        groups.setdefault(seeds[0].label, []).append(seeds)
    return groups


def _colours(runs: list[Run]) -> dict[str, str]:
    """Return a colour for each label."""
    others = [label for label in dict.fromkeys(run.label for run in runs) if label != "dense"]
    return {"dense": DENSE} | {label: SERIES[number % len(SERIES)] for number, label in enumerate(others)}


def _set_size_axis(axes: Axes, runs: list[Run]) -> None:
    """Make the x axis logarithmic with a tick at each size."""
    sizes = sorted({run.parameters for run in runs})
    axes.set(xscale="log", xlabel="parameters of decoder, embeddings and head")
    axes.set_xticks(sizes, [format_count(size) for size in sizes])
    axes.minorticks_off()


def _loss_figure(runs: list[Run], scaling: Scaling) -> Figure:
    figure = new_figure(8, 5)
    axes = figure.subplots()
    colours = _colours(runs)
    sizes = np.geomspace(min(r.parameters for r in runs) / 1.3, max(r.parameters for r in runs) * 1.3, 60)
    for number, tokens in enumerate(sorted({run.tokens for run in runs})):
        for label, groups in _groups_by_label([run for run in runs if run.tokens == tokens]).items():
            law = scaling.laws.get(label)
            style = {"color": colours[label], "marker": MARKERS[number % len(MARKERS)]}
            style |= {"linestyle": "none" if law else "-", "label": f"{label}, {format_count(tokens)} tokens"}
            _plot_means(axes, groups, lambda run: run.results["loss"], **style)
            if law:
                losses = [law.loss(size, tokens) for size in sizes]
                axes.plot(sizes, losses, color=colours[label], linewidth=1, alpha=0.6)
    _set_size_axis(axes, runs)
    axes.set_ylabel("validation loss, nats per token")
    axes.legend(fontsize=LEGEND_FONT_SIZE, ncols=2)
    return figure


def _accuracy_figure(runs: list[Run], tasks: list[str]) -> Figure:
    columns = min(4, len(tasks))
    rows = -(-len(tasks) // columns)
    figure = new_figure(3.6 * columns + 0.6, 3.2 * rows + 0.4)
    panels = figure.subplots(rows, columns, squeeze=False)
    colours = _colours(runs)
    for axes, task in zip(panels.flat, tasks, strict=False):
        _plot_accuracy(axes, [run for run in runs if task in run.tasks], task, colours)
    for axes in list(panels.flat)[len(tasks) :]:
        axes.remove()
    panels[0, 0].legend(fontsize=LEGEND_FONT_SIZE)
    return figure


def _plot_accuracy(axes: Axes, runs: list[Run], task: str, colours: dict[str, str]) -> None:
    """Plot the accuracy of a task for the runs with the largest token count of each size."""
    max_tokens = {run.parameters: max(r.tokens for r in runs if r.parameters == run.parameters) for run in runs}
    longest = [run for run in runs if run.tokens == max_tokens[run.parameters]]
    for label, groups in _groups_by_label(longest).items():
        style = {"color": colours[label], "marker": "o", "label": label}
        _plot_means(axes, groups, lambda run: 100 * run.tasks[task].value, **style)
    axes.axhline(100 * (runs[0].tasks[task].chance or 0), color=GOAL_LINE, linewidth=1, linestyle=":")
    _set_size_axis(axes, runs)
    axes.set(title=task, ylabel="accuracy, %")


def _gap_figure(runs: list[Run]) -> Figure:
    figure = new_figure(9, 3.8)
    gap_axes, variance_axes = figure.subplots(1, 2)
    curves: dict[tuple[str, int], list[Pairs]] = {}
    for (_, tokens, _, label), pairs in twin_pairs(runs).items():
        curves.setdefault((label, tokens), []).append(pairs)
    for number, ((label, tokens), points) in enumerate(curves.items()):
        sizes = [pairs[0][0].parameters for pairs in points]
        gaps = [[100 * (prism.results["loss"] / dense.results["loss"] - 1) for prism, dense in p] for p in points]
        spreads = [np.std(seeds, ddof=1) if len(seeds) > 1 else 0.0 for seeds in gaps]
        style: dict[str, Any] = {"label": f"{label}, {format_count(tokens)} tokens", "capsize": 2}
        style |= {"marker": MARKERS[number % len(MARKERS)], "color": SERIES[number % len(SERIES)]}
        gap_axes.errorbar(sizes, [np.mean(seeds) for seeds in gaps], yerr=spreads, **style)
        variance_axes.errorbar(sizes, [_unexplained_percent(pairs) for pairs in points], **style)
    gap_axes.axhline(0, color=GOAL_LINE, linewidth=1, linestyle=":")
    for axes in (gap_axes, variance_axes):
        _set_size_axis(axes, runs)
    gap_axes.set_ylabel("increase in loss over dense, %")
    variance_axes.set(ylabel="unexplained variance, %", ylim=(0, None))
    gap_axes.legend(fontsize=LEGEND_FONT_SIZE)
    return figure


def _unexplained_percent(pairs: Pairs) -> float:
    """Return the mean unexplained variance over seeds in percent; NaN if a run has none."""
    shares = [prism.results.get("unexplained_variance") for prism, _ in pairs]
    return float(100 * np.mean([np.nan if share is None else share for share in shares]))
