"""The report of a run: Markdown tables, plots, and a JSON file with all results."""

from __future__ import annotations

import datetime
import json
import re
import statistics
from dataclasses import asdict
from importlib import metadata
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks.attribution import plots
from benchmarks.attribution.config import Settings
from benchmarks.attribution.cost import (
    KINDS,
    TURN_ANSWERS,
    TURN_SECONDS,
    break_even,
    fit_line,
    growth,
    predicted_seconds,
)
from benchmarks.attribution.lds import Interval
from benchmarks.attribution.quality import QUERY_KINDS
from benchmarks.common import processor
from prism_lightning.common.markdown import table
from prism_lightning.run.environment import environment

PEERS = ("kronfluence", "traker")


def write_report(run: Settings, results: dict[str, Any]) -> Path:
    """Write all files of the report; return the path of the Markdown file."""
    machine = re.sub(r"\W+", "-", processor().lower()).strip("-")[:24]
    folder = Path(run.results)
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"{datetime.date.today().isoformat()}_{machine}_{run.name}"
    versions = {name: _version(name) for name in PEERS}
    content = {
        "settings": asdict(run)
        | {name: run.identity()[name] for name in ("corpus", "model")}
        | {"out": Path(run.out).name, "results": Path(run.results).name},
        "environment": environment() | {"command": None, "peers": versions},
        "processor": processor(),
        "results": results,
    }
    (folder / f"{stem}.json").write_text(json.dumps(_plain(content), indent=1))
    sections = [f"# Attribution benchmark: {run.name}", _head(run, content)]
    if "quality" in results:
        sections += quality_sections(run, results["quality"])
    if "planted" in results:
        sections += ["## Planted facts", _planted_table(results["planted"])]
    if "cost" in results:
        sections += cost_sections(run, results["cost"])
    for path, caption in plots.draw(run, results, folder / stem):
        sections.append(f"![{caption}]({path.name})")
    path = folder / f"{stem}.md"
    path.write_text("\n\n".join(sections) + "\n")
    return path


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _plain(value: Any) -> Any:
    """Convert to types of JSON; an interval loses its repeats."""
    if isinstance(value, Interval):
        return value.facts()
    if isinstance(value, dict):
        return {str(key): _plain(entry) for key, entry in value.items()}
    return [_plain(entry) for entry in value] if isinstance(value, list | tuple) else value


def _head(run: Settings, content: dict[str, Any]) -> str:
    facts, plan, model = content["environment"], run.retraining, content["settings"]["model"]
    peers = ", ".join(f"{name} {version or 'missing'}" for name, version in facts["peers"].items())
    return (
        f"Commit {facts['commit']}, {content['processor']}, {facts['cpus']} cores, torch {facts['packages']['torch']},"
        f" {peers}. Sequences of {run.corpus.tokens} targets; models of {model.get('backbone') or model['pretrained']};"
        f" {run.training.epochs} epochs; attributed decoders: seeds 0 to {plan.decoders - 1};"
        f" {plan.halves} random halves x {plan.seeds} training seeds."
    )


def quality_sections(run: Settings, results: dict[str, Any]) -> list[str]:
    """Return the quality tables."""
    assert run.quality is not None
    ours, sections = run.quality.ours, ["## Quality"]
    for size, rows in results["tables"].items():
        ceiling = results["ceilings"][size]
        limits = "; ".join(
            f"{kind}: agreement of seeds {facts['agreement']:.3f}, ceiling {facts['ceiling']:.3f}"
            for kind, facts in ceiling.items()
            if facts
        )
        sections.append(f"### {size} sequences, PRISM decoders\n\nLDS with 95 % intervals. {limits}")
        sections.append(_lds_table(rows, _ratios(results["ratios"][size], rows), f"{ours} / this"))
    sections.append(f"### The dense twin, {run.retraining.variant_size} sequences, {_seeds(results['dense'])}")
    sections.append(_lds_table(results["dense"]))
    sections.append("### The same methods on an untrained model")
    sections.append(_lds_table(results["untrained"]))
    for size, rows in results["grids"].items():
        sections.append(f"### Dictionaries, commitment {run.training.commitments[0]}, {size} sequences")
        sections.append(_lds_table(rows))
    for commitment, rows in results["other_commitments"].items():
        title = f"### Dictionaries, commitment {commitment}, {run.retraining.variant_size} sequences"
        sections += [f"{title}, {_seeds(rows)}", _lds_table(rows)]
    return sections + _check_sections(run, results)


def _seeds(rows: list[dict[str, Any]]) -> str:
    count = rows[0]["seeds"]
    return f"halves trained with {count} seed{'s' if count > 1 else ''}"


def _ratios(ratios: dict[str, list[dict[str, Any]]], rows: list[dict[str, Any]]) -> dict[str, dict[str, str]]:
    """Ratios by kind of query and method, without methods whose LDS does not differ from 0."""
    sure = {kind: {row["method"] for row in rows if row[kind].low > 0} for kind in ratios}
    return {
        kind: {entry["method"]: entry["ratio"].show(2) for entry in entries if entry["method"] in sure[kind]}
        for kind, entries in ratios.items()
    }


def _lds_table(rows: list[dict[str, Any]], ratios: dict[str, dict[str, str]] | None = None, title: str = "") -> str:
    columns = ["method", "bytes per token", "unexplained variance"]
    for kind in QUERY_KINDS:
        columns += [f"LDS, {kind} queries", "reads"] + ([f"{title}, {kind}"] if ratios else [])
    lines = []
    for row in rows:
        cells = [row["method"], f"{row['bytes_per_token']:.0f}"]
        cells += [f"{row['unexplained_variance']:.3f}" if "unexplained_variance" in row else ""]
        for kind in QUERY_KINDS:
            cells += [row[kind].show(), f"{row['share_read'][kind]:.2%}" if "share_read" in row else "all"]
            cells += [ratios[kind].get(row["method"], "")] if ratios else []
        lines.append(cells)
    return table(columns, lines)


def _check_sections(run: Settings, results: dict[str, Any]) -> list[str]:
    plan = run.quality
    assert plan is not None
    return [
        f"### Overlap with {plan.reference}\n\nSpearman correlation of all scores, and common share of the first 50.",
        table(
            ["method", "Spearman", "top 50"],
            ([r["method"], f"{r['spearman']:.3f}", f"{r['top_overlap']:.3f}"] for r in results["overlaps"]),
        ),
        f"### The whole Gauss-Newton matrix of the prototypes, by conjugate gradients\n\n{run.corpus.sizes[0]}"
        f" sequences, one decoder, {plan.exact_queries} sequence queries; Spearman of its scores with the index's.",
        table(
            ["dictionary", "LDS of the index", "LDS of the whole matrix", "Spearman", "steps"],
            (
                [r["dictionary"], r["index"].show(), r["exact"].show(), f"{r['spearman']:.3f}", str(r["steps"])]
                for r in results["exact"]
            ),
        ),
        "### Planted facts",
        _planted_table(results["planted"]),
        f"### Removal\n\nRise of {plan.removal_queries} queries' loss, in millinats per token, when the {plan.removed}"
        f" first of {plan.removal_size} sequences are left out, relative to random sequences; mean and standard error.",
        table(
            ["method", "rise"],
            ([r["method"], f"{1000 * r['rise']:.1f} ± {1000 * r['standard_error']:.1f}"] for r in results["removal"]),
        ),
        f"### Tail-patch\n\nFall of {plan.patch_queries} queries' loss, in millinats per token, after one step of plain"
        f" gradient descent ({plan.patch_rate}) on one of the first {plan.patches} sequences; mean and standard error."
        " To first order this equals the gradient dot product, so it favours that method.",
        table(
            ["method", "fall"],
            (
                [r["method"], f"{1000 * r['gain']:.2f} ± {1000 * r['standard_error']:.2f}"]
                for r in results["tail_patch"]
            ),
        ),
        "### Chosen on the tuning queries",
        table(
            ["method", "settings", "LDS of the alternatives"],
            (
                [name, json.dumps(c["settings"]), ", ".join(f"{a['lds']:.3f}" for a in c["sweep"])]
                for name, c in results["chosen"].items()
            ),
        ),
    ]


def _planted_table(rows: list[dict[str, Any]]) -> str:
    columns = ["method", "MRR", "recall at 10"]
    return table(columns, ([row["method"], f"{row['mrr']:.3f}", f"{row['recall_at_10']:.3f}"] for row in rows))


def cost_sections(run: Settings, rows: list[dict[str, Any]]) -> list[str]:
    """Return the cost tables, one per size, and the growth over sizes."""
    assert run.cost is not None
    sections = [
        "## Cost",
        f"{run.cost.threads} threads; medians (lowest to highest; repeats where they are not {run.cost.repeats}). "
        f"A repeat is the median of up to {TURN_ANSWERS} answers within {TURN_SECONDS:g} s, or one longer answer.",
    ]
    for size in sizes_of(rows):
        method_rows = [row for row in rows if row["size"] == size]
        sections.append(f"### {size} sequences, {size * run.corpus.tokens:,} tokens")
        sections.append(_build_table(method_rows, run.cost.repeats))
        for kind in ("token", "sequence"):
            sections.append(f"{kind.capitalize()} queries asked together, from raw tokens to the top 100:")
            sections.append(_answer_table(run, method_rows, kind))
            sections.append(
                f"Time relative to {method_rows[0]['method']} (lowest to highest over all pairs of repeats):"
            )
            sections.append(_ratio_table(run, method_rows, kind))
    if len(sizes_of(rows)) > 1:
        sections += [f"### Growth: cost ~ n^x over {sizes_of(rows)}", _growth_table(run, rows)]
    return sections


def sizes_of(rows: list[dict[str, Any]]) -> list[int]:
    """Return the corpus sizes of some rows."""
    return sorted({row["size"] for row in rows})


def seconds(values: list[float], repeats: int | None = None) -> str:
    """Return "median (low to high)" in seconds or milliseconds."""
    factor, unit = (1, "s") if statistics.median(values) >= 1 else (1000, "ms")
    digits = 2 if statistics.median(values) * factor < 100 else 0
    low, middle, high = (f"{factor * v:,.{digits}f}" for v in (min(values), statistics.median(values), max(values)))
    count = f"; {len(values)}" if repeats and len(values) != repeats else ""
    return f"{middle} {unit} ({low} to {high}{count})"


def times_as_long(numerator: list[float], denominator: list[float]) -> str:
    """Return the ratio of the medians (lowest to highest of any pair)."""
    values = (
        statistics.median(numerator) / statistics.median(denominator),
        min(numerator) / max(denominator),
        max(numerator) / min(denominator),
    )
    middle, low, high = (f"{v:,.{0 if v >= 10 else 2}f}" for v in values)
    return f"{middle} ({low} to {high})"


def _build_table(rows: list[dict[str, Any]], repeats: int) -> str:
    lines = []
    for row in rows:
        builds = row["builds"]
        cells = [row["method"], seconds([b["seconds"] for b in builds], repeats), f"{row['bytes_per_token']:.0f}"]
        cells += [f"{max(b[key] for b in builds):,.0f} MiB" for key in ("mib", "query_mib")]
        cells.append(seconds([b["cold_seconds"] for b in builds], repeats))
        lines.append([*cells, f"{row['share_read']:.3%}" if "share_read" in row else "all"])
    columns = ["method", "build", "bytes per token", "build adds", "query adds", "first token query, cold"]
    return table([*columns, "reads"], lines)


def _answer_table(run: Settings, rows: list[dict[str, Any]], kind: str) -> str:
    assert run.cost is not None
    counts, first, lines = run.cost.counts, rows[0], []

    def cost_line(row: dict[str, Any]) -> tuple[float, float, float]:
        return statistics.median(b["seconds"] for b in row["builds"]), *fit_line(row["answers"], kind)

    for row in rows:
        _, intercept, slope = cost_line(row)
        cells = [row["method"]]
        for count in counts:
            times = row["answers"].get(f"{kind} {count}")
            seconds_then = predicted_seconds((intercept, slope), count, row.get("queries_per_pass"))
            predicted = f"(about {seconds_then:,.0f} s by the line)"
            cells.append(seconds(times, run.cost.repeats) if times else predicted)
        cells += [f"{1000 * intercept:,.2f}", f"{1000 * slope:,.3f}"]
        lines.append([*cells, "" if row is first else f"{break_even(cost_line(first), cost_line(row))} queries"])
        if "look_up" in row:
            blank = [""] * (len(counts) + 2)
            lines.append([f"{row['method']}, look-up alone", seconds(row["look_up"][kind]), *blank])
    columns = ["method", *(f"q = {count}" for count in counts), "intercept, ms", "slope, ms"]
    return table([*columns, f"{first['method']} costs less in total for"], lines)


def _ratio_table(run: Settings, rows: list[dict[str, Any]], kind: str) -> str:
    """Ratios of measured times to the first method's, for each number of queries; predictions have none."""
    assert run.cost is not None
    keys, ours, lines = [f"{kind} {count}" for count in run.cost.counts], rows[0]["answers"], []
    for row in rows[1:]:
        times = [row["answers"].get(key) for key in keys]
        cells = (times_as_long(a, ours[key]) if a and ours.get(key) else "" for key, a in zip(keys, times, strict=True))
        lines.append([row["method"], *cells])
    return table(["method", *(f"q = {count}" for count in run.cost.counts)], lines)


def _growth_table(run: Settings, rows: list[dict[str, Any]]) -> str:
    assert run.cost is not None
    sizes, lines, keys = sizes_of(rows), [], [f"{kind} {count}" for kind, count in product(KINDS, run.cost.counts)]
    for name in dict.fromkeys(row["method"] for row in rows):
        method_rows = sorted((row for row in rows if row["method"] == name), key=lambda row: row["size"])
        cells = [
            name,
            f"{growth(sizes, [statistics.median(b['seconds'] for b in row['builds']) for row in method_rows]):.2f}",
        ]
        for key in keys:
            times = [row["answers"].get(key) for row in method_rows]
            cells.append(f"{growth(sizes, [statistics.median(t) for t in times]):.2f}" if all(times) else "")
        lines.append(cells)
    return table(["method", "build", *keys], lines)
