"""What every method costs: building, answering q queries from raw tokens to the top 100, disk and memory.

One process holds all methods and asks them in turn, repeat by repeat, so that a slow minute of the machine falls on all
of them; building and the first cold query run in processes of their own, in turn too.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.attribution.config import Settings
from benchmarks.attribution.corpus import open_corpus
from benchmarks.attribution.methods.prototypes import Prototypes
from benchmarks.attribution.registry import make
from benchmarks.attribution.retraining import planned, retrain
from benchmarks.attribution.scoring import task_of, token_targets
from benchmarks.attribution.task import Method, Queries

TOP = 100


class Cost:
    """The cost stage of a run, one JSON file a size, so that an interrupted run goes on with the next.

    Args:
        run: its `cost` names `methods`, query `counts`, `repeats`, `threads`, and `patience`: the seconds that repeats
            of one measurement may take together, after at least one.
        config, overrides: the same, for the processes that build.
    """

    def __init__(self, run: Settings, config: Path, overrides: list[str]) -> None:
        assert run.cost is not None
        self.run, self.config, self.overrides, self.plan = run, config, overrides, run.cost
        self.corpus = open_corpus(run)

    def all_sizes(self) -> list[dict[str, Any]]:
        """Rows of every method at every size."""
        retrain(self.run, planned(self.run))
        rows: list[dict[str, Any]] = []
        for size in self.run.corpus.sizes:
            path = self.run.folder / "cost" / f"{size}.json"
            if not path.is_file():
                path.parent.mkdir(parents=True, exist_ok=True)
                found = self.measured(size)
                path.write_text(json.dumps(found, indent=1))
            rows += json.loads(path.read_text())
        return rows

    def measured(self, size: int) -> list[dict[str, Any]]:
        """Rows of every method at one size."""
        torch.set_num_threads(self.plan["threads"])
        states = self.run.folder / "states" / str(size)
        builds = self.builds(size, states)
        task = task_of(self.run, self.corpus, self.run.training.commitments[0], size, 0)
        methods = {n: make(task, states / n, s, self.corpus.tokenizer) for n, s in self.plan["methods"].items()}
        for method in methods.values():
            method.open()
        answers = self.answers(methods)
        tokens = size * self.run.corpus.tokens
        rows = []
        for name, method in methods.items():
            row = {"method": name, "size": size, "settings": self.plan["methods"][name], "builds": builds[name]}
            row |= {"answers": answers[name], "bytes_per_token": builds[name][0]["bytes"] / tokens}
            if isinstance(method, Prototypes):
                row |= {"look_up": self.look_up(method), "share_read": method.share_read(self.queries("token", 64))}
            rows.append(row)
        shutil.rmtree(states)
        return rows

    def builds(self, size: int, states: Path) -> dict[str, list[dict[str, float]]]:
        """What the processes that build report, method by method in turn; the last state of each stays."""
        found: dict[str, list[dict[str, float]]] = {name: [] for name in self.plan["methods"]}
        for repeat in range(self.plan["repeats"]):
            for name, settings in self.plan["methods"].items():
                spent = sum(one["build_seconds"] for one in found[name])
                if repeat and spent * (repeat + 1) / repeat > self.plan["patience"]:
                    continue
                shutil.rmtree(states / name, ignore_errors=True)
                asked = {
                    "config": str(self.config),
                    "overrides": self.overrides,
                    "size": size,
                    "settings": settings,
                    "state": str(states / name),
                    "threads": self.plan["threads"],
                }
                command = [sys.executable, "-m", "benchmarks.attribution.worker", json.dumps(asked)]
                threads = os.environ | {"OMP_NUM_THREADS": str(self.plan["threads"])}
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=threads)
                found[name].append(json.loads(done.stdout.splitlines()[-1]))
                print(f"n {size} build {name}: {found[name][-1]['build_seconds']:.1f} s", flush=True)
        return found

    def queries(self, kind: str, count: int) -> Queries:
        """The first held-out queries, one target of each or all of them."""
        ids_QL = self.corpus.queries_QL[:count]
        if kind == "token":
            return Queries.of_tokens(ids_QL, token_targets(self.corpus.queries_QL)[:count])
        return Queries.of_sequences(ids_QL)

    def answers(self, methods: dict[str, Method]) -> dict[str, dict[str, list[float]]]:
        """Seconds of every repeat, by method and by "kind q"; each question is asked once before, to warm up."""
        found: dict[str, dict[str, list[float]]] = {name: {} for name in methods}
        for repeat in range(-1, self.plan["repeats"]):
            for kind in ("token", "sequence"):
                for count in self.plan["counts"]:
                    for name, method in methods.items():
                        self._answer(found[name], method, kind, count, repeat)
                        if repeat <= 0 and found[name].get(f"{kind} {count}"):
                            print(f"{name} {kind} {count}: {found[name][f'{kind} {count}'][0]:.4f} s", flush=True)
        return found

    def _answer(self, found: dict[str, list[float]], method: Method, kind: str, count: int, repeat: int) -> None:
        key, patience = f"{kind} {count}", self.plan["patience"]
        times = found.setdefault(key, [])
        if repeat > 0 and sum(times) * (len(times) + 1) / len(times) > patience:
            return  # one more would take longer than there is patience for
        queries = self.queries(kind, count)
        started = time.perf_counter()
        method.top(queries, TOP)
        seconds = time.perf_counter() - started
        if repeat == -1 and seconds < patience / 10:
            return  # a warm-up; what takes long anyway needs none, and is counted
        if repeat == 0 and times:
            return
        times.append(seconds)

    def look_up(self, method: Prototypes) -> dict[str, list[float]]:
        """Seconds from a query's records to its top 100, one by one: token queries and sequences."""
        found = {}
        for kind in ("token", "sequence"):
            queries = self.queries(kind, 64)
            records, which_N = method.records(queries)
            questions = method.questions(records, which_N, 64)
            times = []
            for _ in range(self.plan["repeats"]):
                for question in questions:
                    started = time.perf_counter()
                    method.top_of([question], TOP)
                    times.append(time.perf_counter() - started)
            found[kind] = times
        return found


def line(answers: dict[str, list[float]], kind: str) -> tuple[float, float]:
    """Intercept and slope, in seconds, of the median time over the number of queries (weighted by 1 / time)."""
    counts = [int(key.split()[1]) for key in answers if key.startswith(kind)]
    medians = [statistics.median(answers[f"{kind} {count}"]) for count in counts]
    slope, intercept = np.polyfit(counts, medians, 1, w=1 / np.array(medians))
    return float(intercept), float(slope)


def growth(sizes: list[int], seconds: list[float]) -> float:
    """Exponent of the power law that fits a cost over sizes of corpus best."""
    return float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])


def break_even(cheap: tuple[float, float, float], dear: tuple[float, float, float]) -> float | None:
    """Queries from which on the second of two (build, intercept, slope) is the cheaper one in all; None: never."""
    saved, lost = cheap[2] - dear[2], dear[0] + dear[1] - cheap[0] - cheap[1]
    if saved <= 0:
        return None
    return max(0.0, lost / saved)
