"""Times queries on an index in a process of its own with numpy alone; `benchmarks.index.speed` starts it.

python -m benchmarks.index.query_process INDEX RECORDS.npz
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from prism_lightning.attribution.index.opening import open_index

TOP = 100
REPEATS = 3


def resident() -> dict[str, float]:
    """Return the MiB of this process in memory, with and without the pages of mapped files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    values = {line.split(":")[0]: line.split()[1] for line in lines if line.startswith(("VmRSS", "RssAnon"))}
    return {"resident_mib": int(values["VmRSS"]) / 1024, "private_mib": int(values["RssAnon"]) / 1024}


def timed(ask: Callable[[int], Any], count: int) -> list[float]:
    """Return milliseconds of each of `count` queries, after one warming run."""
    times = []
    for number in [*range(count), *(n for _ in range(REPEATS) for n in range(count))]:
        started = time.perf_counter()
        ask(number)
        times.append(1000 * (time.perf_counter() - started))
    return times[count:]


def spread(times: list[float]) -> dict[str, float]:
    """Return the median and 95th percentile."""
    p50, p95 = np.percentile(times, [50, 95])
    return {"p50_ms": float(p50), "p95_ms": float(p95)}


def main() -> None:
    """Time the queries and print one line of JSON."""
    index = open_index(Path(sys.argv[1]), verify=False)
    stored = np.load(sys.argv[2])
    records = list(stored.values())
    before = resident()
    singles, batch, sequence = 640, 64, 128

    def ask(first: int, count: int = 1) -> None:
        index.score(index.query(*(part[first : first + count] for part in records))).strongest(TOP)

    def ask_many(number: int) -> None:
        for position in range(number * batch, (number + 1) * batch):
            ask(position)

    entries = [index.entries_read(index.query(*(part[n : n + 1] for part in records))) for n in range(singles)]
    result = {
        "tokens": index.tokens,
        "prototypes": index.num_prototypes,
        "entries_p50": float(np.median(entries)),
        "entries_p95": float(np.percentile(entries, 95)),
        "one_token": spread(timed(ask, singles)),
        "each_of_64": spread([t / batch for t in timed(ask_many, singles // batch)]),
        "sequence_of_128": spread(timed(lambda n: ask(n * sequence, sequence), len(records[0]) // sequence)),
        "memory_before": before,
        "memory_after": resident(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
