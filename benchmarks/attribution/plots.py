"""Plots of a benchmark run."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from benchmarks.attribution.config import Settings

FAMILIES = {  # colour of a method by its kind
    "prototypes": "#d1495b",
    "target_match": "#c9a0a0",
    "target_kernel": "#8c2f39",
    "ekfac": "#30638e",
    "head": "#edae49",
    "trak": "#6a4c93",
    "gradient_index": "#00798c",
    "cosine": "#777777",
    "bm25": "#444444",
    "random": "#bbbbbb",
}
STYLES = (":", "--", "-.", (0, (5, 5)))  # of what reads all records


def draw(run: Settings, results: dict[str, Any], stem: Path) -> Iterator[tuple[Path, str]]:
    """Draw what the results allow; yields each file, as PNG beside an SVG, and what it shows."""
    quality, cost = results.get("quality"), results.get("cost")
    if quality is not None:
        yield _locality(run, quality, stem), "LDS against the share of records a token query reads"
        yield _pareto(run, quality, cost, stem), "LDS against latency and bytes" if cost else "LDS against bytes"
    if cost is not None:
        yield _queries(run, cost, stem), "Time against the number of queries"


def _save(figure: Any, stem: Path, name: str) -> Path:
    path = stem.with_name(f"{stem.name}_{name}.png")
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    figure.savefig(path.with_suffix(".svg"))
    plt.close(figure)
    return path


def _family(axes: Axes, values: dict[str, float], rows: list[dict[str, Any]], asked: str) -> None:
    """One method at all its numbers of bytes: a line through its points, named at the best."""
    rows = sorted(rows, key=lambda row: values[row["method"]])
    at, intervals = [values[row["method"]] for row in rows], [row[asked] for row in rows]
    error = [[max(0, i.value - i.low) for i in intervals], [max(0, i.high - i.value) for i in intervals]]
    heights, colour = [i.value for i in intervals], FAMILIES[rows[0]["settings"]["kind"]]
    axes.errorbar(at, heights, yerr=error, fmt="o-", color=colour, markersize=4, linewidth=0.8, capsize=2)
    best = max(range(len(rows)), key=heights.__getitem__)
    name, offset = rows[best]["method"].split(",")[0], (5, 4)
    axes.annotate(name, (at[best], heights[best]), textcoords="offset points", xytext=offset, fontsize=7)


def _locality(run: Settings, quality: dict[str, Any], stem: Path) -> Path:
    assert run.quality is not None
    sizes, plan = run.corpus.sizes, run.quality
    figure, panels = plt.subplots(2, len(sizes), figsize=(4.6 * len(sizes), 8), squeeze=False, sharex="row")
    lines = [(space, active) for space, grid in plan.grids.items() for active in grid["active"]]
    for asked, row_of_panels in zip(("sequence", "token"), panels, strict=True):
        for axes, size in zip(row_of_panels, sizes, strict=True):
            grid = quality["grids"][size]
            for number, (space, active) in enumerate(lines):
                rows = [r for r in grid if r["method"].startswith(space) and r["method"].endswith(f"k {active}")]
                shares, values = [100 * r["share_read"][asked] for r in rows], [r[asked].value for r in rows]
                axes.plot(shares, values, marker="osD^v"[number % 5], label=f"{space}, fitted, k {active}")
            for row in (row for row in grid if "own" in row["method"]):
                marker = {"logits": "P", "hidden": "X"}[row["method"].split(",")[0]]
                face = "black" if "polished" in row["method"] else "white"
                place = (100 * row["share_read"][asked], row[asked].value)
                axes.plot(*place, marker, color="black", markerfacecolor=face, label=row["method"])
            rows = quality["tables"][size]
            for row, marker in zip(
                (r for r in rows if r["settings"]["kind"].startswith("target")), "*hpd", strict=False
            ):
                axes.plot(100 * row["share_read"][asked], row[asked].value, marker, color="gray", label=row["method"])
            whole = [row for row in rows if "share_read" not in row and row["method"] != plan.reference]
            best = sorted(whole, key=lambda row: -row[asked].value)[: len(STYLES) - 1]
            lines_at = [row for row in rows if row["method"] == plan.reference] + best
            for row, style in zip(lines_at, STYLES, strict=False):
                axes.axhline(row[asked].value, color="gray", linewidth=1, linestyle=style, label=row["method"])
            axes.set(xscale="log", title=f"{size} sequences")
            axes.set_xlabel(f"list entries that a {asked} query reads,\n% of the training tokens")
        row_of_panels[0].set_ylabel(f"LDS, {asked} queries")
    for row_of_panels in panels:
        row_of_panels[-1].legend(fontsize=6)
    return _save(figure, stem, "locality")


def _pareto(run: Settings, quality: dict[str, Any], cost: list[dict[str, Any]] | None, stem: Path) -> Path:
    size = run.retraining.variant_size
    rows = quality["tables"][size]
    latency = {
        row["method"]: 1000 * statistics.median(row["answers"]["sequence 1"])
        for row in cost or []
        if row["size"] == size and "sequence 1" in row["answers"]
    }
    bytes_per_token = {row["method"]: max(row["bytes_per_token"], 0.5) for row in rows}
    wanted = {
        "one sequence query from raw tokens, ms": latency,
        "bytes on disk per training token (none: 0.5)": bytes_per_token,
    }
    wanted = {label: values for label, values in wanted.items() if values}
    figure, panels = plt.subplots(1, len(wanted), figsize=(6.5 * len(wanted), 5), squeeze=False)
    for axes, (label, values) in zip(panels[0], wanted.items(), strict=True):
        shown = [row for row in rows if row["method"] in values]
        for name in dict.fromkeys(row["method"].split(",")[0] for row in shown):
            _family(axes, values, [row for row in shown if row["method"].split(",")[0] == name], "sequence")
        front = _front([(values[row["method"]], row["sequence"].value) for row in shown])
        axes.step(*zip(*front, strict=True), where="post", color="lightgray", zorder=0)
        axes.margins(x=0.2)
        axes.set(xscale="log", xlabel=label, ylabel="LDS")
    figure.suptitle(f"{size} sequences")
    return _save(figure, stem, "pareto")


def _front(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Those than which none is both cheaper and better, cheapest first."""
    front: list[tuple[float, float]] = []
    for point in sorted(points):
        if not front or point[1] > front[-1][1]:
            front.append(point)
    return front


def _queries(run: Settings, cost: list[dict[str, Any]], stem: Path) -> Path:
    assert run.cost is not None
    size = max(row["size"] for row in cost)
    figure, panels = plt.subplots(1, 2, figsize=(12, 4.8), sharey=True)
    for axes, kind in zip(panels, ("token", "sequence"), strict=True):
        for row in (row for row in cost if row["size"] == size):
            counts = [count for count in run.cost.counts if f"{kind} {count}" in row["answers"]]
            times = [statistics.median(row["answers"][f"{kind} {count}"]) for count in counts]
            axes.plot(counts, times, marker="o", color=FAMILIES[row["settings"]["kind"]])
            axes.annotate(row["method"], (counts[-1], times[-1]), fontsize=6, xytext=(4, 0), textcoords="offset points")
        axes.set(xscale="log", yscale="log", xlabel=f"{kind} queries asked together", title=f"{size} sequences")
        axes.margins(x=0.3)
        axes.set_xticks(run.cost.counts, [str(count) for count in run.cost.counts])
        axes.minorticks_off()
    panels[0].set_ylabel("seconds")
    return _save(figure, stem, "queries")
