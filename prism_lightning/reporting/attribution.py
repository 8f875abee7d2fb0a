"""Attribution's cost and agreement with retraining, from the files that the attribution benchmark writes."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from prism_lightning.common.errors import UserError, visible
from prism_lightning.reporting.tables import Table

COMMAND = "python -m benchmarks.attribution --config benchmarks/attribution/{}.yaml"


def read_benchmarks(paths: list[Path]) -> list[dict[str, Any]]:
    """What benchmark runs wrote.

    Raises:
        UserError: a file that is not there or is no such result.
    """
    found = []
    for path in paths:
        try:
            content = json.loads(path.read_text()) | {"path": path}
            content["settings"]["name"]
            attribution_tables([content])  # all that a report reads of it
            speed_up([content])
        except OSError as error:
            raise UserError(f"--benchmarks {path} cannot be read: {error.strerror}") from error
        except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
            reason = f"{type(error).__name__}: {visible(str(error))[:80]}"
            raise UserError(f"--benchmarks {path} is no result of benchmarks.attribution ({reason})") from error
        found.append(content)
    return found


def attribution_tables(benchmarks: list[dict[str, Any]]) -> list[Table]:
    """Agreement with retraining, and cost, of each method at the largest corpus of each file."""
    quality = [one for one in benchmarks if "quality" in one["results"]]
    cost = [one for one in benchmarks if "cost" in one["results"]]
    tables = [_quality(one) for one in quality] + [_cost(one) for one in cost]
    if not quality:
        tables.append(Table("Attribution, agreement with retraining", [], [], missing=[COMMAND.format("tinystories")]))
    if not cost:
        tables.append(Table("Attribution, cost", [], [], missing=[COMMAND.format("quickstart")]))
    return tables


def _origin(one: dict[str, Any]) -> str:
    return f"{one['path'].name}, commit {str(one['environment']['commit'])[:10]}, {one['processor']}."


def _quality(one: dict[str, Any]) -> Table:
    tables = one["results"]["quality"]["tables"]
    size = str(one["settings"]["retraining"]["variant_size"])
    rows = []
    for row in tables[size]:
        cells = []
        for asked in ("sequence", "token"):
            found = row[asked]
            cells.append(f"{found['value']:.3f} ({found['low']:.3f} to {found['high']:.3f})")
        rows.append([row["method"], f"{row['bytes_per_token']:.0f}", *cells])
    note = f"Linear datamodelling score over random halves of {int(size):,} sequences. {_origin(one)}"
    return Table(
        "Attribution, agreement with retraining", ["method", "bytes per token", "sequences", "tokens"], rows, note
    )


def _cost(one: dict[str, Any]) -> Table:
    rows, results = [], one["results"]["cost"]
    size, counts = max(row["size"] for row in results), (1, 64)
    for row in (row for row in results if row["size"] == size):
        cells = [f"{statistics.median(build['seconds'] for build in row['builds']):,.0f}"]
        for kind in ("token", "sequence"):
            for count in counts:
                times = row["answers"].get(f"{kind} {count}")
                cells.append(f"{1000 * statistics.median(times):,.1f}" if times else "")
        rows.append([row["method"], *cells, f"{row['bytes_per_token']:.0f}"])
    columns = ["method", "build, s", *(f"{k} queries, q = {c}, ms" for k in ("token", "sequence") for c in counts)]
    note = f"{size:,} sequences; from raw tokens to the top 100, all q together. {_origin(one)}"
    return Table("Attribution, cost", [*columns, "bytes per token"], rows, note)


def speed_up(benchmarks: list[dict[str, Any]]) -> str | None:
    """How many times faster than EK-FAC token queries are, by q, at the largest corpus; of every file, not the best."""
    return " / ".join(found for one in benchmarks if (found := _speed_up(one))) or None


def _speed_up(one: dict[str, Any]) -> str | None:
    rows = {(row["method"], row["size"]): row["answers"] for row in one["results"].get("cost", [])}
    size = max((size for _, size in rows), default=0)
    ours, theirs = rows.get(("prototypes", size), {}), rows.get(("EK-FAC", size), {})
    parts = []
    for count in (1, 64):
        key = f"token {count}"
        if ours.get(key) and theirs.get(key):
            parts.append(f"{statistics.median(theirs[key]) / statistics.median(ours[key]):,.0f} at q = {count}")
    return f"{'; '.join(parts)} ({size:,} sequences)" if parts else None
