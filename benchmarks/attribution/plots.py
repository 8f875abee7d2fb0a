"""Plots of a benchmark run."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from benchmarks.attribution.config import Settings
from prism_lightning.common.plot_style import (
    GOAL_LINE,
    LABEL_FONT_SIZE,
    LEGEND_FONT_SIZE,
    OTHER,
    PROTOTYPES,
    PROTOTYPES_ALTERNATIVE,
    RANDOM_CONTROL,
    RIVALS,
    SERIES,
    UNCHANGED_MODEL,
    new_figure,
)

COLOURS = {  # of a method by its kind
    "prototypes": PROTOTYPES,
    "target_match": PROTOTYPES_ALTERNATIVE,
    "random": RANDOM_CONTROL,
    **dict(zip(("ekfac", "head", "target_kernel", "trak", "gradient_index", "cosine", "bm25"), RIVALS, strict=True)),
}
STYLES = (":", "--", "-.", (0, (5, 5)))  # of methods that read all records
NAME_GAP = 0.045  # between names beside a plot, of its height


def draw(run: Settings, results: dict[str, Any], stem: Path) -> Iterator[tuple[Path, str]]:
    """Draw the plots that the results allow; yield each PNG file, with an SVG beside it, and its caption."""
    quality, cost = results.get("quality"), results.get("cost")
    if quality is not None:
        yield _locality(run, quality, stem), "LDS against the share of records a token query reads"
        yield _pareto(run, quality, cost, stem), "LDS against latency and bytes" if cost else "LDS against bytes"
    if cost is not None:
        yield _queries(run, cost, stem), "Time against the number of queries"


def _colour(row: dict[str, Any]) -> str:
    return COLOURS.get(row["settings"]["kind"], OTHER)  # a kind without a colour of its own


def _save(figure: Figure, stem: Path, name: str) -> Path:
    path = stem.with_name(f"{stem.name}_{name}.png")
    figure.savefig(path, dpi=130, bbox_inches="tight")
    figure.savefig(path.with_suffix(".svg"), bbox_inches="tight")
    return path


def _name(axes: Axes, points: dict[str, tuple[float, float]]) -> None:
    """Write names in a column beside the plot, with a thin line to each point; limits and scales must be final."""
    axes.get_xlim(), axes.get_ylim()  # makes matplotlib compute the limits now
    to_axes = axes.transData + axes.transAxes.inverted()
    heights = {name: float(to_axes.transform(point)[1]) for name, point in points.items()}
    names = sorted(heights, key=lambda name: heights[name])
    places = [heights[name] for name in names]
    for number in range(1, len(names)):
        places[number] = max(places[number], places[number - 1] + NAME_GAP)
    places[-1] = min(places[-1], 1.0)
    for number in range(len(names) - 2, -1, -1):
        places[number] = min(places[number], places[number + 1] - NAME_GAP)
    for name, place in zip(names, places, strict=True):
        line = {"arrowstyle": "-", "color": GOAL_LINE, "linewidth": 0.5, "relpos": (0, 0.5)}
        axes.annotate(
            name,
            points[name],
            (1.03, place),
            textcoords="axes fraction",
            fontsize=LABEL_FONT_SIZE,
            va="center",
            arrowprops=line,
        )


def _family(axes: Axes, values: dict[str, float], rows: list[dict[str, Any]], kind: str) -> tuple[float, float]:
    """Draw one method at all its numbers of bytes as a line; return its best point."""
    rows = sorted(rows, key=lambda row: values[row["method"]])
    at, intervals = [values[row["method"]] for row in rows], [row[kind] for row in rows]
    error = [[max(0, i.value - i.low) for i in intervals], [max(0, i.high - i.value) for i in intervals]]
    heights, colour = [i.value for i in intervals], _colour(rows[0])
    axes.errorbar(at, heights, yerr=error, fmt="o-", color=colour, markersize=4, linewidth=0.8, capsize=2)
    best = max(range(len(rows)), key=heights.__getitem__)
    return at[best], heights[best]


def _locality(run: Settings, quality: dict[str, Any], stem: Path) -> Path:
    assert run.quality is not None
    sizes, spaces = run.corpus.sizes, run.quality.grids
    figure = new_figure(4.2 * len(sizes) + 3, 8)  # 3 inches for the legend
    panels = figure.subplots(2, len(sizes), squeeze=False, sharex="row")
    lines = [(space, active) for space, grid in spaces.items() for active in grid["active"]]
    lists, whole_names = _reference_methods(run, quality)
    for kind, row_of_panels in zip(("sequence", "token"), panels, strict=True):
        for axes, size in zip(row_of_panels, sizes, strict=True):
            grid, table = quality["grids"][size], {row["method"]: row for row in quality["tables"][size]}
            for number, (space, active) in enumerate(lines):
                rows = [r for r in grid if r["method"].startswith(space) and r["method"].endswith(f"k {active}")]
                shares, values = [100 * r["share_read"][kind] for r in rows], [r[kind].value for r in rows]
                axes.plot(
                    shares,
                    values,
                    marker="osD^v"[number % 5],
                    color=SERIES[number % len(SERIES)],
                    label=f"{space}, fitted, k {active}",
                )
            for row in (row for row in grid if "own" in row["method"]):
                marker = {"logits": "P", "hidden": "X"}[row["method"].split(",")[0]]
                face = UNCHANGED_MODEL if "polished" in row["method"] else "white"
                place = (100 * row["share_read"][kind], row[kind].value)
                axes.plot(*place, marker, color=UNCHANGED_MODEL, markerfacecolor=face, label=row["method"])
            for name, marker in zip(lists, "*hpd", strict=False):
                axes.plot(
                    100 * table[name]["share_read"][kind],
                    table[name][kind].value,
                    marker,
                    color=GOAL_LINE,
                    label=name,
                )
            for name, style in zip(whole_names, STYLES, strict=False):
                axes.axhline(table[name][kind].value, color=GOAL_LINE, linewidth=1, linestyle=style, label=name)
            axes.set(xscale="log", title=f"{size} sequences")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if kind == "sequence" else (1,)))
            axes.xaxis.set_major_formatter("{x:g}")
            axes.xaxis.set_minor_formatter(NullFormatter())
            axes.set_xlabel(f"list entries that a {kind} query reads,\n% of the training tokens")
        row_of_panels[0].set_ylabel(f"LDS, {kind} queries")
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside right center", fontsize=LEGEND_FONT_SIZE)
    return _save(figure, stem, "locality")


def _reference_methods(run: Settings, quality: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Names of methods in all tables: those with lists by target, and the best ones that read all records."""
    assert run.quality is not None
    tables = quality["tables"]
    rows = [
        r
        for r in tables[run.retraining.variant_size]
        if all(r["method"] in (o["method"] for o in t) for t in tables.values())
    ]
    lists = [row["method"] for row in rows if row["settings"]["kind"].startswith("target")]
    full_readers = sorted((row for row in rows if "share_read" not in row), key=lambda row: -row["sequence"].value)
    best_readers = [row["method"] for row in full_readers if row["method"] != run.quality.reference]
    return lists, [run.quality.reference, *best_readers[: len(STYLES) - 1]]


def _pareto(run: Settings, quality: dict[str, Any], cost: list[dict[str, Any]] | None, stem: Path) -> Path:
    size = run.retraining.variant_size
    rows = quality["tables"][size]
    latency = {
        row["method"]: 1000 * statistics.median(row["answers"]["sequence 1"])
        for row in cost or []
        if row["size"] == size and "sequence 1" in row["answers"]
    }
    bytes_per_token = {row["method"]: max(row["bytes_per_token"], 0.5) for row in rows}
    values_by_label = {
        "one sequence query from raw tokens, ms": latency,
        "bytes on disk per training token (none: 0.5)": bytes_per_token,
    }
    values_by_label = {label: values for label, values in values_by_label.items() if values}
    figure = new_figure(6.5 * len(values_by_label), 5)
    panels = figure.subplots(1, len(values_by_label), squeeze=False)
    for axes, (label, values) in zip(panels[0], values_by_label.items(), strict=True):
        plotted = [row for row in rows if row["method"] in values]
        best = {}
        for name in dict.fromkeys(row["method"].split(",")[0] for row in plotted):
            family = [row for row in plotted if row["method"].split(",")[0] == name]
            best[name] = _family(axes, values, family, "sequence")
        front = _front([(values[row["method"]], row["sequence"].value) for row in plotted])
        axes.step(*zip(*front, strict=True), where="post", color=GOAL_LINE, zorder=0)
        axes.set(xscale="log", xlabel=label, ylabel="LDS")
        _name(axes, best)
    figure.suptitle(f"{size} sequences")
    return _save(figure, stem, "pareto")


def _front(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The Pareto front of (cost, quality) points, cheapest first."""
    front: list[tuple[float, float]] = []
    for point in sorted(points):
        if not front or point[1] > front[-1][1]:
            front.append(point)
    return front


def _queries(run: Settings, cost: list[dict[str, Any]], stem: Path) -> Path:
    assert run.cost is not None
    size = max(row["size"] for row in cost)
    figure = new_figure(12, 4.8)
    panels = figure.subplots(1, 2, sharey=True)
    last_points: list[dict[str, tuple[float, float]]] = [{}, {}]
    for axes, kind, names in zip(panels, ("token", "sequence"), last_points, strict=True):
        for row in (row for row in cost if row["size"] == size):
            counts = [count for count in run.cost.counts if f"{kind} {count}" in row["answers"]]
            times = [statistics.median(row["answers"][f"{kind} {count}"]) for count in counts]
            axes.plot(counts, times, marker="o", color=_colour(row))
            names[row["method"]] = (counts[-1], times[-1])
        axes.set(xscale="log", yscale="log", xlabel=f"{kind} queries kind together", title=f"{size} sequences")
        axes.set_xticks(run.cost.counts, [str(count) for count in run.cost.counts])
        axes.minorticks_off()
    for axes, names in zip(panels, last_points, strict=True):  # when both are drawn: they share the y axis
        _name(axes, names)
    panels[0].set_ylabel("seconds")
    return _save(figure, stem, "queries")
