"""The figures of a report, as SVG."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from prism_lightning.common.counts import format_count
from prism_lightning.common.plot_style import DENSE, GOAL_LINE, LEGEND_FONT_SIZE, SERIES, new_figure
from prism_lightning.reporting.runs import Run, grouped, mean_and_spread, twins
from prism_lightning.reporting.scaling import Scaling

MARKERS = "osD^vP*X"


def draw(runs: list[Run], scaling: Scaling, folder: Path) -> Iterator[tuple[Path, str]]:
    """Write what the runs allow; yields each file and what it shows."""
    places = {(run.parameters, run.tokens) for run in runs}
    if len(places) > 1:
        yield _save(_losses(runs, scaling), folder / "loss.svg"), "Validation loss over size, and the fitted law"
        tasks = sorted({name for run in runs for name, task in run.tasks.items() if task.chance is not None})
        if tasks:
            yield (
                _save(_accuracies(runs, tasks), folder / "accuracy.svg"),
                "Accuracy over size, at each size's most tokens; dotted: chance",
            )
    if len(twins(runs)) > 1:
        yield _save(_gaps(runs), folder / "gap.svg"), "What prototypes cost and explain"


def _save(figure: Figure, path: Path) -> Path:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    path.write_text(text[text.index("<svg") :])
    return path


def _curve(axes: Axes, groups: list[list[Run]], value, **style) -> None:  # type: ignore[no-untyped-def]
    found = [(g[0].parameters, mean_and_spread(g, value)) for g in groups]
    points = [(x, *y) for x, y in found if y is not None]
    if points:
        x, y, spread = zip(*points, strict=True)
        axes.errorbar(x, y, yerr=[one or 0 for one in spread], capsize=2, markersize=5, **style)


def _by_label(runs: list[Run]) -> dict[str, list[list[Run]]]:
    groups: dict[str, list[list[Run]]] = {}
    for mine in grouped(runs).values():
        groups.setdefault(mine[0].label, []).append(mine)
    return groups


def _colours(runs: list[Run]) -> dict[str, str]:
    """Return a colour for each label: the dense one, then those of SERIES."""
    labels = list(dict.fromkeys(run.label for run in runs))
    others = [label for label in labels if label != "dense"]
    return {"dense": DENSE} | {label: SERIES[number % len(SERIES)] for number, label in enumerate(others)}


def _sizes(axes: Axes, runs: list[Run]) -> None:
    """Sizes along a logarithmic axis, each by its name."""
    sizes = sorted({run.parameters for run in runs})
    axes.set(xscale="log", xlabel="parameters of decoder, embeddings and head")
    axes.set_xticks(sizes, [format_count(size) for size in sizes])
    axes.minorticks_off()


def _losses(runs: list[Run], scaling: Scaling) -> Figure:
    figure = new_figure(8, 5)
    axes = figure.subplots()
    colours = _colours(runs)
    sizes = np.geomspace(min(r.parameters for r in runs) / 1.3, max(r.parameters for r in runs) * 1.3, 60)
    for number, tokens in enumerate(sorted({run.tokens for run in runs})):
        for variant, groups in _by_label([run for run in runs if run.tokens == tokens]).items():
            law = scaling.laws.get(variant)
            style = {"color": colours[variant], "marker": MARKERS[number % len(MARKERS)]}
            line = "none" if law else "-"
            label = f"{variant}, {format_count(tokens)} tokens"
            _curve(axes, groups, lambda run: run.results["loss"], linestyle=line, label=label, **style)
            if law:
                curve = [law.loss(size, tokens) for size in sizes]
                axes.plot(sizes, curve, color=colours[variant], linewidth=1, alpha=0.6)
    _sizes(axes, runs)
    axes.set_ylabel("validation loss, nats per token")
    axes.legend(fontsize=LEGEND_FONT_SIZE, ncols=2)
    return figure


def _accuracies(runs: list[Run], tasks: list[str]) -> Figure:
    columns = min(4, len(tasks))
    lines = -(-len(tasks) // columns)
    figure = new_figure(3.6 * columns + 0.6, 3.2 * lines + 0.4)
    panels = figure.subplots(lines, columns, squeeze=False)
    colours = _colours(runs)
    for axes, task in zip(panels.flat, tasks, strict=False):
        have_it = [run for run in runs if task in run.tasks]
        most = {run.parameters: max(r.tokens for r in have_it if r.parameters == run.parameters) for run in have_it}
        for variant, groups in _by_label([run for run in have_it if run.tokens == most[run.parameters]]).items():
            style = {"color": colours[variant], "marker": "o", "label": variant}
            _curve(axes, groups, lambda run, task=task: 100 * run.tasks[task].value, **style)
        chance = have_it[0].tasks[task].chance
        axes.axhline(100 * (chance or 0), color=GOAL_LINE, linewidth=1, linestyle=":")
        _sizes(axes, have_it)
        axes.set(title=task, ylabel="accuracy, %")
    for axes in list(panels.flat)[len(tasks) :]:
        axes.remove()
    panels[0, 0].legend(fontsize=LEGEND_FONT_SIZE)
    return figure


def _gaps(runs: list[Run]) -> Figure:
    figure = new_figure(9, 3.8)
    left, right = figure.subplots(1, 2)
    curves: dict[tuple[str, int], list[list[tuple[Run, Run]]]] = {}
    for (_, tokens, _, label), pairs in twins(runs).items():
        curves.setdefault((label, tokens), []).append(pairs)
    for number, ((label, tokens), found) in enumerate(curves.items()):
        sizes = [pairs[0][0].parameters for pairs in found]
        gaps = [[100 * (one.results["loss"] / other.results["loss"] - 1) for one, other in pairs] for pairs in found]
        spread = [np.std(one, ddof=1) if len(one) > 1 else 0.0 for one in gaps]
        style = {
            "marker": MARKERS[number % len(MARKERS)],
            "label": f"{label}, {format_count(tokens)} tokens",
            "capsize": 2,
        }
        style["color"] = SERIES[number % len(SERIES)]
        left.errorbar(sizes, [np.mean(one) for one in gaps], yerr=spread, **style)  # type: ignore[arg-type]
        shares = [[one.results.get("unexplained_variance") for one, _ in pairs] for pairs in found]
        unexplained = [100 * np.mean([np.nan if share is None else share for share in group]) for group in shares]
        right.errorbar(sizes, unexplained, **style)  # type: ignore[arg-type]
    left.axhline(0, color=GOAL_LINE, linewidth=1, linestyle=":")
    for axes in (left, right):
        _sizes(axes, runs)
    left.set_ylabel("PRISM's loss over dense, %")
    right.set(ylabel="unexplained variance, %", ylim=(0, None))
    left.legend(fontsize=LEGEND_FONT_SIZE)
    return figure
