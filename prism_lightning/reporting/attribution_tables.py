"""Tables of attribution from the files of `benchmarks.attribution`: agreement with retraining, and cost."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from prism_lightning.common.errors import UserError, visible
from prism_lightning.reporting.tables import Table

COMMAND = "python -m benchmarks.attribution --config benchmarks/attribution/{}.yaml"
QUERY_COUNTS = (1, 64)  # numbers of queries answered together, of which a report shows the time
QUALITY_TITLE = "Attribution: agreement with retraining"
COST_TITLE = "Attribution: cost"


def read_benchmarks(paths: list[Path]) -> list[dict[str, Any]]:
    """Return the contents of benchmark files, each with its path under the key "path".

    Raises:
        UserError: a file cannot be read or does not hold such results.
    """
    benchmarks = []
    for path in paths:
        try:
            content = json.loads(path.read_text()) | {"path": path}
            content["settings"]["name"]
            attribution_tables([content])  # these two calls read everything that a report uses
            format_speed_ups([content])
        except OSError as error:
            raise UserError(f"--benchmarks {path} cannot be read: {error.strerror}") from error
        except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
            reason = f"{type(error).__name__}: {visible(str(error))[:80]}"
            raise UserError(f"--benchmarks {path} is no result of benchmarks.attribution ({reason})") from error
        benchmarks.append(content)
    return benchmarks


def attribution_tables(benchmarks: list[dict[str, Any]]) -> list[Table]:
    """Return a table of agreement with retraining and a table of cost for each file that has such results."""
    quality = [_quality_table(benchmark) for benchmark in benchmarks if "quality" in benchmark["results"]]
    cost = [_cost_table(benchmark) for benchmark in benchmarks if "cost" in benchmark["results"]]
    if not quality:
        quality.append(Table(QUALITY_TITLE, [], [], missing=[COMMAND.format("tinystories")]))
    if not cost:
        cost.append(Table(COST_TITLE, [], [], missing=[COMMAND.format("quickstart")]))
    return quality + cost


def _source(benchmark: dict[str, Any]) -> str:
    """Return the sentence that names a benchmark's file, commit and processor."""
    commit = str(benchmark["environment"]["commit"])[:10]
    return f"Source: {benchmark['path'].name}, commit {commit}, {benchmark['processor']}."


def _quality_table(benchmark: dict[str, Any]) -> Table:
    size = str(benchmark["settings"]["retraining"]["variant_size"])
    rows = []
    for row in benchmark["results"]["quality"]["tables"][size]:
        scores = (row["sequence"], row["token"])
        cells = [f"{score['value']:.3f} ({score['low']:.3f} to {score['high']:.3f})" for score in scores]
        rows.append([row["method"], f"{row['bytes_per_token']:.0f}", *cells])
    note = (
        "Linear datamodelling score with its 95 % interval: rank correlation of predicted losses with those of models"
        f" retrained on random halves of {int(size):,} sequences. {_source(benchmark)}"
    )
    return Table(QUALITY_TITLE, ["method", "bytes per token", "sequence queries", "token queries"], rows, note)


def _cost_table(benchmark: dict[str, Any]) -> Table:
    rows, results = [], benchmark["results"]["cost"]
    size = max(row["size"] for row in results)
    for row in (row for row in results if row["size"] == size):
        cells = [f"{statistics.median(build['seconds'] for build in row['builds']):,.0f}"]
        for kind in ("token", "sequence"):
            for count in QUERY_COUNTS:
                times = row["answers"].get(f"{kind} {count}")
                cells.append(f"{1000 * statistics.median(times):,.1f}" if times else "")
        rows.append([row["method"], *cells, f"{row['bytes_per_token']:.0f}"])
    queries = [f"{kind} queries, q = {count}, ms" for kind in ("token", "sequence") for count in QUERY_COUNTS]
    note = (
        f"Corpus of {size:,} sequences. Times of q queries answered together are medians, from raw tokens to the top"
        f" 100 sequences. {_source(benchmark)}"
    )
    return Table(COST_TITLE, ["method", "build, s", *queries, "bytes per token"], rows, note)


def format_speed_ups(benchmarks: list[dict[str, Any]]) -> str | None:
    """Return the speed-up of token queries over EK-FAC of every file, or None if no file has one."""
    return " / ".join(speed_up for benchmark in benchmarks if (speed_up := _speed_up(benchmark))) or None


def _speed_up(benchmark: dict[str, Any]) -> str | None:
    """Return the speed-up at the largest corpus, by the number of queries."""
    rows = {(row["method"], row["size"]): row["answers"] for row in benchmark["results"].get("cost", [])}
    size = max((size for _, size in rows), default=0)
    prototypes, ekfac = rows.get(("prototypes", size), {}), rows.get(("EK-FAC", size), {})
    ratios = []
    for count in QUERY_COUNTS:
        key = f"token {count}"
        if prototypes.get(key) and ekfac.get(key):
            ratio = statistics.median(ekfac[key]) / statistics.median(prototypes[key])
            ratios.append(f"{ratio:,.0f} at q = {count}")
    return f"{'; '.join(ratios)} ({size:,} sequences)" if ratios else None
