"""Read finished runs for a report, label them, and group them by seed and into twins.

Twins are a PRISM run and a dense run that differ only in the prototypes.
"""

from __future__ import annotations

import inspect
import json
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml

from prism_lightning.common.counts import format_count
from prism_lightning.common.errors import UserError
from prism_lightning.common.files import read_json
from prism_lightning.common.manifests import Kind, mapping, number, optional, text, whole
from prism_lightning.config.compose import flat
from prism_lightning.evaluation.results import TaskResult, read_result
from prism_lightning.lightning_modules.dense import DenseLM
from prism_lightning.models import PrismConfig, PrismForCausalLM
from prism_lightning.reporting.folders import is_retrofit, read_checked, run_folders
from prism_lightning.run.directory import RunPaths
from prism_lightning.sweeps.planning import module_without_weights

DENSE_SETTINGS = list(inspect.signature(DenseLM).parameters)
TRAINER_SETTINGS = ("precision", "gradient_clip_val", "gradient_clip_algorithm")  # those that change the weights
MAX_LABEL_SETTINGS = 3  # in a label, of the settings in which runs differ
# Types of the entries of a line of results.jsonl; a number that was not finite is null there.
RESULTS: dict[str, Kind] = {
    "step": whole(1),
    "loss": number(),
    **{
        name: optional(number())
        for name in (
            "perplexity", "bits_per_byte", "unexplained_variance", "unexplained_variance_before_polish",
            "prototype_to_token", "token_to_prototype", "dead_share", "usage_entropy", "tokens_per_second",
            "peak_memory_gib", "prediction_recovered", "prediction_divergence", "top1_agreement",
            "unexplained_centred_variance",
        )
    },
}  # fmt: skip
RECIPE = {
    "seed_everything": whole(),
    "data": mapping({"batch_size": whole(1), "block_size": whole(1)}),
    "model": mapping({"init_args": mapping({})}),
    "trainer": optional(mapping({})),
}
GroupKey = tuple[str, int, str, str]  # training, tokens, data and label of a run


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        path: Run directory.
        variant: "dense" or "PRISM".
        label: Variant, and the settings in which it differs from other runs: "PRISM, commitment 0".
        training: Settings that a run shares with its twin as JSON: decoder, optimiser, batch.
        settings: Settings of the model.
        parameters: Parameters of decoder, embeddings and head: the N of a scaling law.
        all_parameters: Parameters including those of the prototypes.
        prototypes: Number of prototypes; 0 for a dense run.
        tokens: Number of training tokens.
        seed: Seed of weights and data order.
        data: Fingerprint of the prepared training and validation data.
        data_name: Files or data set, for people.
        results: Last line of results.jsonl.
        tasks: Results of evaluated tasks by name.
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
        """Number of parameters without prototypes in short form."""
        return format_count(self.parameters)

    @property
    def size_with_prototypes(self) -> str:
        """Number of all parameters in short form."""
        return format_count(self.all_parameters)

    @property
    def group_key(self) -> GroupKey:
        """Key that runs share which differ only in their seed."""
        return self.training, self.tokens, self.data, self.label


def find_runs(folders: Iterable[Path]) -> tuple[list[Run], list[str]]:
    """Return the finished runs in some folders and below, sorted by size, and a message for everything left out.

    Retrofits are no runs of `fit` and not among them; `find_retrofits` returns them.

    Raises:
        UserError: a folder does not exist, or no folder has a finished run or a retrofit.
    """
    folders = list(folders)
    found = run_folders(folders)
    trained = [folder for folder in found if not is_retrofit(folder)]
    runs, left_out = [], []
    for run_folder in trained:
        try:
            runs.append(read_run(run_folder))
        except UserError as error:
            left_out += error.problems
    if not runs and len(trained) == len(found):
        raise UserError(
            left_out or [f"--runs {' '.join(map(str, folders))}: no run that `fit` or `retrofit` has finished"]
        )
    runs, repeated = drop_repeated_runs(sorted(label_runs(runs), key=_sort_key))
    runs, smaller = keep_largest_evaluations(make_labels_unique(runs))
    return runs, left_out + repeated + smaller


def _sort_key(run: Run) -> tuple[Any, ...]:
    return run.parameters, run.tokens, run.variant != "dense", run.label, run.seed


def label_runs(runs: list[Run]) -> list[Run]:
    """Return runs with labels that name each setting in which runs of one variant and training differ."""
    varying: set[str] = set()
    for run in runs:
        others = [other.settings for other in runs if other.variant == run.variant and other.training == run.training]
        varying |= {key for key in run.settings if any(other.get(key) != run.settings[key] for other in others)}
    labelled = []
    for run in runs:
        differences = [f"{key} {run.settings[key]}" for key in sorted(varying) if key in run.settings]
        labelled.append(replace(run, label=", ".join([run.variant, *differences])))
    return labelled


def make_labels_unique(runs: list[Run]) -> list[Run]:
    """Return runs with longer labels where needed, so that no two rows of a table name the same model.

    The labels name the data if the report has several, and the settings in which runs of equal size and token count
    differ.
    """
    if len({run.data for run in runs}) > 1:
        runs = [replace(run, label=f"{run.label}, data {_data_label(run, runs)}") for run in runs]
    groups: dict[tuple[str, ...], list[Run]] = {}
    for run in runs:
        row_name = (run.size, run.size_with_prototypes, format_count(run.tokens), run.label)
        groups.setdefault(row_name, []).append(run)
    labels = {id(run): label for group in groups.values() for run, label in zip(group, _labels(group), strict=True)}
    return [replace(run, label=labels[id(run)]) for run in runs]


def _data_label(run: Run, runs: list[Run]) -> str:
    """Return the data's name, with its fingerprint if other data have the same name."""
    shared = any(other.data_name == run.data_name and other.data != run.data for other in runs)
    return f"{run.data_name} ({run.data[:8]})" if shared else run.data_name


def _labels(group: list[Run]) -> list[str]:
    """Return different labels for runs that a table could not tell apart: by settings, or else by directory names."""
    first_runs = {run.group_key: run for run in reversed(group)}
    if len(first_runs) == 1:  # they differ only in their seed
        return [run.label for run in group]
    settings_of_runs = [flat(json.loads(run.training)) | {"tokens": run.tokens} for run in group]
    keys = sorted({key for settings in settings_of_runs for key in settings})
    varying = [key for key in keys if len({json.dumps(settings.get(key)) for settings in settings_of_runs}) > 1]
    labels = [
        ", ".join([run.label, *(f"{key} {settings.get(key)}" for key in varying[:MAX_LABEL_SETTINGS])])
        for run, settings in zip(group, settings_of_runs, strict=True)
    ]
    if len(set(labels)) == len(first_runs):
        return labels
    return [f"{run.label}, {first_runs[run.group_key].path.name}" for run in group]


def drop_repeated_runs(runs: list[Run]) -> tuple[list[Run], list[str]]:
    """Return the first of the runs that agree in all settings and the seed, and a message for each other one."""
    first_runs: dict[tuple[Any, ...], Run] = {}
    messages = []
    for run in runs:
        first = first_runs.setdefault((*run.group_key, run.seed), run)
        if first is not run:
            messages.append(f"{run.path} repeats {first.path}: the same settings and seed")
    return list(first_runs.values()), messages


def keep_largest_evaluations(runs: list[Run]) -> tuple[list[Run], list[str]]:
    """Return runs with only the evaluations on the largest number of documents of each task, and messages.

    Means over runs are then over the same documents.
    """
    most_documents: dict[str, int] = {}
    for run in runs:
        for name, task in run.tasks.items():
            most_documents[name] = max(most_documents.get(name, 0), task.documents)
    complete, messages = [], []
    for run in runs:
        tasks = {name: task for name, task in run.tasks.items() if task.documents == most_documents[name]}
        messages += [
            f"{run.path}: {name} was evaluated on {task.documents} documents, elsewhere on {most_documents[name]}"
            for name, task in run.tasks.items()
            if name not in tasks
        ]
        complete.append(replace(run, tasks=tasks))
    return complete, messages


def read_run(path: Path) -> Run:
    """Return the finished run in a run directory.

    Raises:
        UserError: `fit` has not finished the run, or one of its files is damaged.
    """
    paths = RunPaths(path)
    if not paths.results.is_file() or not paths.model.is_dir():
        raise UserError(f"{path} is not finished: run its `fit` again")
    config = read_checked(paths.recipe, RECIPE, lambda file: yaml.safe_load(file.read_text()))
    last = read_checked(paths.results, RESULTS, lambda file: json.loads(file.read_text().splitlines()[-1]))
    environment = read_checked(paths.environment, {"data_fingerprint": text()}, read_json)
    data = config["data"]
    model = _model_without_weights(config["model"], paths)
    all_parameters = sum(parameter.numel() for parameter in model.parameters())
    prototypes = model.config.num_prototypes
    tasks = [read_result(file.parent, file.stem) for file in sorted(paths.evaluation.glob("*.json"))]
    variant = "PRISM" if prototypes else "dense"
    return Run(
        path=path,
        variant=variant,
        label=variant,
        training=_training_settings(config),
        settings=({"encoder": "cosine"} if prototypes else {}) | config["model"]["init_args"],  # once the only one
        parameters=all_parameters - prototypes * model.config.hidden_size,
        all_parameters=all_parameters,
        prototypes=prototypes,
        tokens=last["step"] * data["batch_size"] * data["block_size"],
        seed=config["seed_everything"],
        data=environment["data_fingerprint"],
        data_name=_data_name(data),
        results=last,
        tasks={task.task: task for task in tasks if task is not None and task.metric in task.metrics},
    )


def _model_without_weights(settings: dict[str, Any], paths: RunPaths) -> PrismForCausalLM:
    """Return a run's model on the meta device; one that started from pretrained weights, by its exported folder."""
    if settings["init_args"].get("pretrained") is None:
        # The model alone: other groups may hold settings that this version no longer has.
        return module_without_weights({"model": settings}, str(paths.root)).model
    try:
        config = PrismConfig.from_pretrained(paths.model)
        with torch.device("meta"):
            return PrismForCausalLM(config)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        cause = " ".join(str(error).split())[:120]
        raise UserError(f"{paths.model} is damaged ({cause}): remove it and run the same `fit`") from error


def _training_settings(config: dict[str, Any]) -> str:
    """Return the settings that a run shares with its twin, as JSON."""
    settings = {name: config["model"]["init_args"].get(name) for name in DENSE_SETTINGS}
    settings |= {name: config["data"][name] for name in ("batch_size", "block_size")}
    settings |= {f"trainer.{name}": (config.get("trainer") or {}).get(name) for name in TRAINER_SETTINGS}
    return json.dumps(settings, sort_keys=True)


def _data_name(data: dict[str, Any]) -> str:
    """Return the files or the data set that a run was trained on."""
    if data.get("path"):
        paths = data["path"] if isinstance(data["path"], list) else [data["path"]]
        return " ".join(map(str, paths[:2])) + (" ..." if len(paths) > 2 else "")
    names = [str(data[name]) for name in ("dataset", "dataset_config", "dataset_revision") if data.get(name)]
    return " ".join(names) or "standard library"


def group_seeds(runs: Iterable[Run]) -> dict[GroupKey, list[Run]]:
    """Return groups of runs that differ only in their seed."""
    groups: dict[GroupKey, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.group_key, []).append(run)
    return groups


def twin_pairs(runs: Iterable[Run]) -> dict[GroupKey, list[tuple[Run, Run]]]:
    """Return pairs of a PRISM run and its dense twin with the same seed, by the PRISM run's group key."""
    runs = list(runs)
    dense = {(run.training, run.tokens, run.data, run.seed): run for run in runs if run.variant == "dense"}
    pairs: dict[GroupKey, list[tuple[Run, Run]]] = {}
    for run in runs:
        twin = dense.get((run.training, run.tokens, run.data, run.seed))
        if run.variant == "PRISM" and twin is not None:
            pairs.setdefault(run.group_key, []).append((run, twin))
    return pairs


def mean_and_spread(runs: Iterable[Run], value: Callable[[Run], float | None]) -> tuple[float, float | None] | None:
    """Return the mean of a value over seeds and its standard deviation.

    The deviation is None for a single run; the result is None if no run has the value.
    """
    values = [result for run in runs if (result := value(run)) is not None]
    if not values:
        return None
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None
