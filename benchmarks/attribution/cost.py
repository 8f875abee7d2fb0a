"""Cost of every method: building, q queries from raw tokens to the top 100, disk space and memory.

One process holds all methods and queries them in turn, repeat by repeat, so that a slow minute of the machine affects
all of them; builds and first, cold queries are repeated in turn too. Memory is the peak that a build or query adds to
the process. Linux only, whose kernel reports memory and the page cache.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import shutil
import statistics
import time
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.attribution.config import Settings, digest
from benchmarks.attribution.corpus import open_corpus
from benchmarks.attribution.methods.ekfac import EkFac
from benchmarks.attribution.methods.lists import ListMethod
from benchmarks.attribution.registry import make
from benchmarks.attribution.retraining import decoder, planned, retrain
from benchmarks.attribution.scoring import task_of, token_targets
from benchmarks.attribution.task import Method, Queries, Task
from prism_lightning.common.files import read_json, write_json

TOP, KINDS = 100, ("token", "sequence")
# A single answer of 7 ms, after methods that fill the caches, took 6.8 to 20 ms. In turns of 0.1 s the only answer of
# one method took 150 ms in place of 27 ms.
TURN_SECONDS, TURN_ANSWERS = 0.5, 11


class Cost:
    """The cost stage of a run, with one JSON file per size; an interrupted run resumes.

    Args:
        run: of the benchmark.
        methods: their settings, tuned.
    """

    def __init__(self, run: Settings, methods: dict[str, dict[str, Any]]) -> None:
        assert run.cost is not None
        self.run, self.plan, self.corpus = run, run.cost, open_corpus(run)
        self.methods = {name: methods[name] for name in run.cost.methods or methods}

    def all_sizes(self) -> list[dict[str, Any]]:
        """Return rows of every method at every size."""
        retrain(self.run, planned(self.run))
        rows: list[dict[str, Any]] = []
        for size in self.plan.sizes or self.run.corpus.sizes:
            path = self.run.folder / "cost" / f"{size}-{self.identity()}.json"
            if not path.is_file():
                path.parent.mkdir(parents=True, exist_ok=True)
                write_json(path, {"rows": self.measure_size(size, path.with_suffix(".partial.json"))})
                shutil.rmtree(self.run.folder / "states" / str(size))
                path.with_suffix(".partial.json").unlink()
            rows += json.loads(path.read_text())["rows"]
        return rows

    def identity(self) -> str:
        """Return a hash of what is measured. Repeats and patience are not part of it and may differ between sizes."""
        return digest([self.methods, self.plan.counts, self.plan.threads])

    def measure_size(self, size: int, partial: Path) -> list[dict[str, Any]]:
        """Return rows of every method at one size; `partial` holds the measurements of an interrupted call."""
        torch.set_num_threads(self.plan.threads)
        states = self.run.folder / "states" / str(size)
        main = self.run.training.commitments[0]
        task = task_of(self.run, self.corpus, main, size, 0)
        several = any(settings.get("several") for settings in self.methods.values())
        seeds = range(self.run.retraining.checkpoints if several else 0)
        self.checkpoints = [decoder(self.run, main, size, seed) for seed in seeds]
        self.states = {name: states / name for name in self.methods}
        self.partial, self.measurements = partial, {"builds": {}, "answers": {}} | (read_json(partial) or {})
        builds = self.builds(task)
        opened = {name: self.make_method(task, name) for name in self.methods}
        for method in opened.values():
            method.open()
        answers = self.answers(opened)
        rows = []
        for name, method in opened.items():
            row = {"method": name, "size": size, "settings": self.methods[name], "builds": builds[name]}
            row |= {"answers": answers[name], "bytes_per_token": method.state_bytes() / task.train_SL[:, 1:].numel()}
            if isinstance(method, EkFac):
                row["queries_per_pass"] = method.queries_per_pass
            if isinstance(method, ListMethod):
                row |= {"look_up": self.look_up(method), "share_read": method.share_read(self.queries("token", 64))}
            rows.append(row)
        return rows

    def make_method(self, task: Task, name: str, folder: Path | None = None) -> Method:
        """Make a method on its state, or on another folder."""
        return make(task, folder or self.states[name], self.methods[name], self.corpus.tokenizer, self.checkpoints)

    def builds(self, task: Task) -> dict[str, list[dict[str, float]]]:
        """Build every method in turn; return seconds, memory, and seconds of a first, cold query for each build."""
        builds: dict[str, list[dict[str, float]]] = self.measurements["builds"]
        for repeat in range(self.plan.repeats):
            for name in self.methods:
                times = builds.setdefault(name, [])
                enough = len(times) > repeat or not self._patient([entry["seconds"] for entry in times])
                if self.states[name].is_dir() and enough:
                    continue
                shutil.rmtree(self.states[name], ignore_errors=True)
                times.append(self.build(task, name))
                write_json(self.partial, self.measurements)
                print(f"{len(task.train_SL)} sequences, build {name}: {times[-1]['seconds']:.1f} s", flush=True)
        return builds

    def build(self, task: Task, name: str) -> dict[str, float]:
        """Measure one build, and one token query after `open` with the state's files out of the page cache."""
        partial = self.states[name].with_name(f"{name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        method, before = self.make_method(task, name, partial), fresh_peak()
        started = time.perf_counter()
        method.fit()
        seconds, peak = time.perf_counter() - started, memory("VmHWM") - before
        del method
        partial.rename(self.states[name])  # an incomplete state would otherwise be taken for a complete one
        drop_from_cache(self.states[name])
        method, before = self.make_method(task, name), fresh_peak()
        started = time.perf_counter()
        method.open()
        method.top(self.queries("token", 1), TOP)
        cold = time.perf_counter() - started
        return {"seconds": seconds, "mib": peak, "cold_seconds": cold, "query_mib": memory("VmHWM") - before}

    def queries(self, kind: str, count: int) -> Queries:
        """Return the first held-out queries, with one target or all targets of each."""
        ids_QL = self.corpus.queries_QL[:count]
        if kind == "token":
            return Queries.of_tokens(ids_QL, token_targets(self.corpus.queries_QL)[:count])
        return Queries.of_sequences(ids_QL)

    def answers(self, methods: dict[str, Method]) -> dict[str, dict[str, list[float]]]:
        """Return seconds of every repeat by method and "kind q"; a first, warming one is not counted.

        Slow methods are warmed up once, not for every number of queries.
        """
        warm: set[str] = set()
        answers: dict[str, dict[str, list[float]]] = self.measurements["answers"]
        for repeat in range(self.plan.repeats):
            for kind, count in product(KINDS, self.plan.counts):
                queries, key = self.queries(kind, count), f"{kind} {count}"
                for name, method in methods.items():
                    times = answers.setdefault(name, {})
                    if len(times.get(key, [])) > repeat or not self._worth(times, kind, count):
                        continue
                    seconds = time_answer(method, queries)
                    if name not in warm or (key not in times and seconds < self.plan.patience / 10):
                        seconds = time_answer(method, queries)
                    warm.add(name)
                    if key not in times:
                        print(f"{key}, {name}: {seconds:.4f} s", flush=True)
                    times.setdefault(key, []).append(seconds)
                    write_json(self.partial, self.measurements)
        return answers

    def _patient(self, times: list[float]) -> bool:
        """Whether all measurements with one more stay within `patience`."""
        return not times or sum(times) * (len(times) + 1) / len(times) <= self.plan.patience

    def _worth(self, answers: dict[str, list[float]], kind: str, count: int) -> bool:
        """Whether one more measurement is within `longest`, and all of its repeats within `patience`."""
        times = answers.get(f"{kind} {count}")
        if times:
            return self._patient(times)
        smaller = [key for key in answers if key.startswith(kind)]
        return len(smaller) < 2 or predicted_seconds(fit_line(answers, kind), count) <= self.plan.longest

    def look_up(self, method: ListMethod) -> dict[str, list[float]]:
        """Return seconds from a prepared query to its top 100, for single token and sequence queries."""
        times_by_kind = {}
        for kind in KINDS:
            queries = self.queries(kind, 64)
            questions = method.questions(queries)
            times = []
            for _ in range(self.plan.repeats):
                for question in questions:
                    started = time.perf_counter()
                    method.top_of([question], TOP)
                    times.append(time.perf_counter() - started)
            times_by_kind[kind] = times
        return times_by_kind


def time_answer(method: Method, queries: Queries) -> float:
    """Return seconds from raw tokens to the top 100: the median of a turn, which is one answer where it takes long."""
    times: list[float] = []
    while sum(times) < TURN_SECONDS and len(times) < TURN_ANSWERS:
        started = time.perf_counter()
        method.top(queries, TOP)
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def memory(field: str) -> float:
    """Return MiB of this process: VmRSS is the present use, VmHWM the peak since `fresh_peak`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(field))) / 1024


def fresh_peak() -> float:
    """Release freed memory, reset the peak, and return the MiB in use."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return memory("VmRSS")


def drop_from_cache(folder: Path) -> None:
    """Drop a folder's files from the page cache, so that reading them is cold."""
    os.sync()
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def fit_line(answers: dict[str, list[float]], kind: str) -> tuple[float, float]:
    """Fit the median time over the number of queries (weights 1 / time); return intercept and slope in seconds."""
    medians = {int(key.split()[1]): statistics.median(t) for key, t in answers.items() if key.startswith(kind) and t}
    slope, intercept = np.polyfit(list(medians), list(medians.values()), 1, w=1 / np.array(list(medians.values())))
    return float(intercept), float(slope)


def predicted_seconds(intercept_and_slope: tuple[float, float], count: int, per_pass: int | None = None) -> float:
    """Return the seconds that a line predicts; every pass over the training data costs the intercept."""
    passes = 1 if per_pass is None else -(-count // per_pass)
    return intercept_and_slope[0] * passes + intercept_and_slope[1] * count


def growth(sizes: list[int], seconds: list[float]) -> float:
    """Return the exponent of the power law fitted to a cost over corpus sizes."""
    return float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])


def break_even(first: tuple[float, float, float], second: tuple[float, float, float]) -> str:
    """Return, in words, the number of queries for which the first (build, intercept, slope) costs less in total."""
    saved, lost = second[2] - first[2], first[0] + first[1] - second[0] - second[1]
    if lost <= 0 <= saved:
        return "any number of"
    if saved <= 0 <= lost:
        return "no"
    return f"{'more' if saved > 0 else 'fewer'} than {lost / saved:,.0f}"
