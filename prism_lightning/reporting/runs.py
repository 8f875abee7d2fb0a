"""Finished runs as a report needs them."""

from __future__ import annotations

import inspect
import json
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from prism_lightning.errors import UserError
from prism_lightning.evaluation.results import TaskResult, read_result
from prism_lightning.lightning_modules.dense import DenseLM
from prism_lightning.sweeps.planning import module_of
from prism_lightning.sweeps.trials import spoken

DENSE_SETTINGS = [name for name in inspect.signature(DenseLM).parameters]


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        path: its directory.
        variant: "dense" or "PRISM".
        label: the variant, and what sets it apart from others of the report: "PRISM, commitment 0".
        training: what a run shares with its twin: decoder, optimiser, batch.
        settings: of the model.
        parameters: of the dense decoder with head and embeddings, prototypes left out: the N of a scaling law.
        prototypes: K; 0 for a dense run.
        tokens: of training.
        seed: of weights and order.
        data: what it was trained and validated on.
        results: the last line of results.jsonl.
        tasks: evaluated tasks by name.
    """

    path: Path
    variant: str
    label: str
    training: str
    settings: dict[str, Any]
    parameters: int
    prototypes: int
    tokens: int
    seed: int
    data: str
    results: dict[str, Any]
    tasks: dict[str, TaskResult]

    @property
    def size(self) -> str:
        """Parameters as people say them."""
        return spoken(self.parameters)


def find_runs(folders: Iterable[Path]) -> tuple[list[Run], list[str]]:
    """Finished runs in or beneath some folders, small ones first, and a line for all that is left out.

    Raises:
        UserError: a folder that is not there, or none with a finished run.
    """
    folders = list(folders)
    missing = [f"--runs {folder}: no such folder" for folder in folders if not folder.is_dir()]
    if missing:
        raise UserError(missing)
    places = {path.parent.resolve(): path.parent for folder in folders for path in sorted(folder.rglob("recipe.yaml"))}
    runs, left_out = [], []
    for place in places.values():
        try:
            runs.append(read_run(place))
        except UserError as error:
            left_out += error.problems
    if not runs:
        raise UserError(left_out or [f"--runs {' '.join(map(str, folders))}: no run that `fit` has finished"])
    runs = sorted(labelled(runs), key=_order)
    runs, doubled = without_doubles(runs)
    runs, fewer = on_the_same_documents(runs)
    return runs, left_out + doubled + fewer


def _order(run: Run) -> tuple[Any, ...]:
    return run.parameters, run.tokens, run.variant != "dense", run.label, run.seed


def labelled(runs: list[Run]) -> list[Run]:
    """Runs with labels that name each setting in which some twins of one dense run differ."""
    varying: set[str] = set()
    for run in runs:
        others = [other.settings for other in runs if other.variant == run.variant and other.training == run.training]
        varying |= {key for key in run.settings if any(other.get(key) != run.settings[key] for other in others)}
    found = []
    for run in runs:
        shown = [f"{key} {run.settings[key]}" for key in sorted(varying) if key in run.settings]
        found.append(replace(run, label=", ".join([run.variant, *shown])))
    return found


def without_doubles(runs: list[Run]) -> tuple[list[Run], list[str]]:
    """The first of the runs that differ in nothing, not even the seed, and a line for each other."""
    kept: dict[tuple[Any, ...], Run] = {}
    lines = []
    for run in runs:
        first = kept.setdefault((*place(run), run.seed), run)
        if first is not run:
            lines.append(f"{run.path} repeats {first.path}: the same settings and seed")
    return list(kept.values()), lines


def on_the_same_documents(runs: list[Run]) -> tuple[list[Run], list[str]]:
    """Runs with the tasks that were evaluated on the most documents, so that means are of the same ones."""
    most: dict[str, int] = {}
    for run in runs:
        for name, task in run.tasks.items():
            most[name] = max(most.get(name, 0), task.documents)
    kept, lines = [], []
    for run in runs:
        tasks = {name: task for name, task in run.tasks.items() if task.documents == most[name]}
        lines += [
            f"{run.path}: {name} was evaluated on {task.documents} documents, elsewhere on {most[name]}"
            for name, task in run.tasks.items()
            if name not in tasks
        ]
        kept.append(replace(run, tasks=tasks))
    return kept, lines


def read_run(path: Path) -> Run:
    """A finished run.

    Raises:
        UserError: `fit` has not finished it, or a file in it is damaged.
    """
    results = path / "results.jsonl"
    if not results.is_file() or not (path / "model").is_dir():
        raise UserError(f"{path} is not finished: run its `fit` again")
    try:
        config = yaml.safe_load((path / "recipe.yaml").read_text())
        last = json.loads(results.read_text().splitlines()[-1])
        fingerprint = json.loads((path / "environment.json").read_text())["data_fingerprint"]
        module = module_of(config, str(path))
        tokens = last["step"] * config["data"]["batch_size"] * config["data"]["block_size"]
    except (OSError, ValueError, KeyError, IndexError, TypeError, yaml.YAMLError) as error:
        raise UserError(f"{path} is damaged ({' '.join(str(error).split())[:120]}): run its `fit` again") from error
    everything = sum(parameter.numel() for parameter in module.parameters())
    prototypes = module.model.config.num_prototypes
    settings = dict(config["model"]["init_args"])
    shared = {name: settings.get(name) for name in DENSE_SETTINGS}
    shared |= {name: config["data"][name] for name in ("batch_size", "block_size")}
    found = [read_result(file.parent, file.stem) for file in sorted((path / "evaluation").glob("*.json"))]
    variant = "PRISM" if prototypes else "dense"
    return Run(
        path=path,
        variant=variant,
        label=variant,
        training=json.dumps(shared, sort_keys=True),
        settings=settings,
        parameters=everything - prototypes * module.model.config.hidden_size,
        prototypes=prototypes,
        tokens=tokens,
        seed=config["seed_everything"],
        data=fingerprint,
        results=last,
        tasks={result.task: result for result in found if result is not None and result.metric in result.metrics},
    )


Place = tuple[str, int, str, str]  # training, tokens, data, label


def place(run: Run) -> Place:
    """What runs share that differ in their seed alone."""
    return run.training, run.tokens, run.data, run.label


def grouped(runs: Iterable[Run]) -> dict[Place, list[Run]]:
    """Runs that differ in their seed alone."""
    groups: dict[Place, list[Run]] = {}
    for run in runs:
        groups.setdefault(place(run), []).append(run)
    return groups


def twins(runs: Iterable[Run]) -> dict[Place, list[tuple[Run, Run]]]:
    """Pairs of a PRISM run and the dense one that shares all but prototypes with it, seed too, by PRISM's place."""
    runs = list(runs)
    dense = {(run.training, run.tokens, run.data, run.seed): run for run in runs if run.variant == "dense"}
    pairs: dict[Place, list[tuple[Run, Run]]] = {}
    for run in runs:
        twin = dense.get((run.training, run.tokens, run.data, run.seed))
        if run.variant == "PRISM" and twin is not None:
            pairs.setdefault(place(run), []).append((run, twin))
    return pairs


def mean_and_spread(runs: Iterable[Run], value: Callable[[Run], float | None]) -> tuple[float, float | None] | None:
    """Mean over seeds, and their standard deviation where there are several; None where no run has the value."""
    values = [found for run in runs if (found := value(run)) is not None]
    if not values:
        return None
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None
