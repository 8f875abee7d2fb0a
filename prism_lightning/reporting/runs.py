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

from prism_lightning.common.counts import format_count
from prism_lightning.common.errors import UserError
from prism_lightning.common.files import read_json
from prism_lightning.common.manifests import Kind, mapping, number, optional, problem_in, text, whole
from prism_lightning.config.compose import flat
from prism_lightning.evaluation.results import TaskResult, read_result
from prism_lightning.lightning_modules.dense import DenseLM
from prism_lightning.sweeps.planning import module_without_weights

DENSE_SETTINGS = [name for name in inspect.signature(DenseLM).parameters]
TRAINER_SETTINGS = ("precision", "gradient_clip_val", "gradient_clip_algorithm")  # that change what is learnt
NAMED_SETTINGS = 3  # of those that set runs apart, in a label
# Of a line of results.jsonl; a number that was not finite is null there.
RESULTS: dict[str, Kind] = {
    "step": whole(1),
    "loss": number(),
    **{
        name: optional(number())
        for name in (
            "perplexity", "bits_per_byte", "unexplained_variance", "unexplained_variance_before_polish",
            "prototype_to_token", "token_to_prototype", "dead_share", "usage_entropy", "tokens_per_second",
            "peak_memory_gib",
        )
    },
}  # fmt: skip
RECIPE = {
    "seed_everything": whole(),
    "data": mapping({"batch_size": whole(1), "block_size": whole(1)}),
    "model": mapping({"init_args": mapping({})}),
    "trainer": optional(mapping({})),
}


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
        all_parameters: those of prototypes too, as `fit` counts them.
        prototypes: K; 0 for a dense run.
        tokens: of training.
        seed: of weights and order.
        data: fingerprint of what it was trained and validated on.
        data_name: the files or data set, for people.
        results: the last line of results.jsonl.
        tasks: evaluated tasks by name.
    """

    path: Path
    variant: str
    label: str
    training: str
    settings: dict[str, Any]
    parameters: int
    all_parameters: int
    prototypes: int
    tokens: int
    seed: int
    data: str
    data_name: str
    results: dict[str, Any]
    tasks: dict[str, TaskResult]

    @property
    def size(self) -> str:
        """Parameters of decoder, embeddings and head as people say them."""
        return format_count(self.parameters)

    @property
    def whole_size(self) -> str:
        """All parameters as people say them."""
        return format_count(self.all_parameters)


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
    runs, doubled = without_doubles(sorted(labelled(runs), key=_order))
    runs = set_apart(runs)
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


def set_apart(runs: list[Run]) -> list[Run]:
    """Runs with labels that name what else they differ in, so that no two rows of a report read the same.

    The data, where the report has several; settings that twins share, where those of one size and token count differ.
    """
    found = [replace(run, label=f"{run.label}, data {_data_label(run, runs)}") for run in runs]
    runs = found if len({run.data for run in runs}) > 1 else runs
    alike: dict[tuple[str, ...], list[Run]] = {}
    for run in runs:
        alike.setdefault((run.size, run.whole_size, format_count(run.tokens), run.label), []).append(run)
    labels = {id(run): label for group in alike.values() for run, label in zip(group, _told_apart(group), strict=True)}
    return [replace(run, label=labels[id(run)]) for run in runs]


def _data_label(run: Run, runs: list[Run]) -> str:
    """The data's name, and its fingerprint where other data of the report have the same name."""
    shared = any(other.data_name == run.data_name and other.data != run.data for other in runs)
    return f"{run.data_name} ({run.data[:8]})" if shared else run.data_name


def _told_apart(group: list[Run]) -> list[str]:
    """Labels of runs that one row would show, with the settings in which they differ, or else their names."""
    if len({place(run) for run in group}) == 1:  # they differ in their seed alone
        return [run.label for run in group]
    settings = [flat(json.loads(run.training)) | {"tokens": run.tokens} for run in group]
    keys = sorted({key for one in settings for key in one})
    varying = [key for key in keys if len({json.dumps(one.get(key)) for one in settings}) > 1]
    labels = [
        ", ".join([run.label, *(f"{key} {one.get(key)}" for key in varying[:NAMED_SETTINGS])])
        for run, one in zip(group, settings, strict=True)
    ]
    if len(set(labels)) == len({place(run) for run in group}):
        return labels
    first = {place(run): run for run in reversed(group)}
    return [f"{run.label}, {first[place(run)].path.name}" for run in group]


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
    config = _checked(path / "recipe.yaml", RECIPE, lambda file: yaml.safe_load(file.read_text()))
    last = _checked(results, RESULTS, lambda file: json.loads(file.read_text().splitlines()[-1]))
    fingerprint = _checked(path / "environment.json", {"data_fingerprint": text()}, read_json)["data_fingerprint"]
    module = module_without_weights(config, str(path))
    data = config["data"]
    everything = sum(parameter.numel() for parameter in module.parameters())
    prototypes = module.model.config.num_prototypes
    settings = dict(config["model"]["init_args"])
    shared = {name: settings.get(name) for name in DENSE_SETTINGS}
    shared |= {name: data[name] for name in ("batch_size", "block_size")}
    shared |= {f"trainer.{name}": (config.get("trainer") or {}).get(name) for name in TRAINER_SETTINGS}
    found = [read_result(file.parent, file.stem) for file in sorted((path / "evaluation").glob("*.json"))]
    variant = "PRISM" if prototypes else "dense"
    return Run(
        path=path,
        variant=variant,
        label=variant,
        training=json.dumps(shared, sort_keys=True),
        settings=settings,
        parameters=everything - prototypes * module.model.config.hidden_size,
        all_parameters=everything,
        prototypes=prototypes,
        tokens=last["step"] * data["batch_size"] * data["block_size"],
        seed=config["seed_everything"],
        data=fingerprint,
        data_name=_data_name(data),
        results=last,
        tasks={result.task: result for result in found if result is not None and result.metric in result.metrics},
    )


def _checked(path: Path, fields: dict[str, Kind], read: Callable[[Path], Any]) -> dict[str, Any]:
    """A file of a run, every entry of its type; raises UserError where it is not."""
    try:
        content = read(path)
        problem = problem_in(content, fields)
    except (OSError, ValueError, IndexError, RecursionError, yaml.YAMLError) as error:
        problem = " ".join(str(error).split())[:120] or type(error).__name__
    if problem:
        raise UserError(f"{path} is damaged ({problem}): run its `fit` again")
    return content


def _data_name(data: dict[str, Any]) -> str:
    """The files or the data set that a run was trained on."""
    if data.get("path"):
        paths = data["path"] if isinstance(data["path"], list) else [data["path"]]
        return " ".join(map(str, paths[:2])) + (" ..." if len(paths) > 2 else "")
    names = [str(data[name]) for name in ("dataset", "dataset_config", "dataset_revision") if data.get(name)]
    return " ".join(names) or "standard library"


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
