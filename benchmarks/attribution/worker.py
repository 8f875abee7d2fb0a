"""Build one method's state in a process of its own, and answer a first query: seconds and peak memory as JSON.

What `benchmarks.attribution.cost` starts. The interpreter, its libraries, the model and the corpus are loaded before
anything is timed, and the memory they take is reported apart.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.attribution.config import Settings, load_settings
from benchmarks.attribution.corpus import open_corpus
from benchmarks.attribution.scoring import task_of, token_targets
from benchmarks.attribution.task import Queries


def peak_mib() -> float:
    """Most memory this process has held, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("VmHWM"))) / 1024


def forget(folder: Path) -> None:
    """Drop a folder's files from the page cache, so that reading them is cold."""
    os.sync()
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def measure(run: Settings, size: int, settings: dict[str, Any], state: Path) -> dict[str, float]:
    """Build, then open and answer one token query cold."""
    from benchmarks.attribution.registry import make

    corpus = open_corpus(run)
    task = task_of(run, corpus, run.training.commitments[0], size, 0)
    method = make(task, state, settings, corpus.tokenizer)
    found = {"loaded_mib": peak_mib()}
    started = time.perf_counter()
    method.fit()
    found |= {"build_seconds": time.perf_counter() - started, "build_mib": peak_mib()}
    forget(state)
    queries = Queries.of_tokens(corpus.queries_QL[:1], token_targets(corpus.queries_QL)[:1])
    method = make(task, state, settings, corpus.tokenizer)
    started = time.perf_counter()
    method.open()
    method.top(queries, 100)
    found |= {"cold_seconds": time.perf_counter() - started, "query_mib": peak_mib()}
    return found | {"bytes": method.state_bytes()}


def main() -> None:
    """Arguments: one JSON object with config, overrides, size, settings, state and threads."""
    asked = json.loads(sys.argv[1])
    torch.set_num_threads(asked["threads"])
    run = load_settings(Path(asked["config"]), asked["overrides"])
    print(json.dumps(measure(run, asked["size"], asked["settings"], Path(asked["state"]))))


if __name__ == "__main__":
    main()
