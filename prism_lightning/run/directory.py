"""A run directory: every path in it, its lock, its recipe and its results."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock
import yaml

from prism_lightning.common.errors import UserError
from prism_lightning.common.files import write_json, write_whole
from prism_lightning.common.json_text import as_json
from prism_lightning.run.environment import environment
from prism_lightning.run.lock import lock_run

RECIPE_NAME = "recipe.yaml"  # by this name `report` finds runs beneath a folder
CHECKPOINTS = "step-*.ckpt"  # file names of checkpoints: sorted by name they are sorted by step

# Settings that a resumed run may change: they decide how the run is executed, not what is trained.
FREE_ON_RESUME = (
    "trainer.",
    "run.",
    "index.",
    "data.num_workers",
    "data.micro_batch_size",
    "data.cache_dir",
    "data.validation_blocks",
    "ckpt_path",
    "weights_only",
)
# Settings that recipes of earlier versions do not name, with the value that they had.
FORMER_VALUES = {"model.init_args.encoder": "cosine"}


@dataclass(frozen=True)
class RunPaths:
    """Every path of a run directory. Whether a file exists depends on which verbs have run.

    Args:
        root: the run directory.
    """

    root: Path

    @classmethod
    def of(cls, path: Path) -> RunPaths:
        """Return the paths of the run directory that `path` is, or that contains the exported model `path`.

        An exported folder outside any run directory is its own root.
        """
        folder = exported_folder(path)
        return cls(folder.parent if folder and cls(folder.parent).model == folder else path)

    @property
    def recipe(self) -> Path:
        """The resolved recipe, YAML; written by `fit` before training."""
        return self.root / RECIPE_NAME

    @property
    def environment(self) -> Path:
        """Commit, package versions, machine, command and the data's fingerprint, JSON; written beside the recipe."""
        return self.root / "environment.json"

    @property
    def lock(self) -> Path:
        """The file that a running `fit` holds locked."""
        return self.root / "lock"

    @property
    def lock_holder(self) -> Path:
        """The process that took the lock last, JSON; read for the error message of the next `fit`."""
        return self.root / "lock.json"

    @property
    def checkpoints(self) -> Path:
        """The folder of `fit`'s checkpoints: files, or folders when DeepSpeed trains."""
        return self.root / "checkpoints"

    @property
    def model(self) -> Path:
        """The exported model, a Hugging Face folder; written at the end of `fit`."""
        return self.root / "model"

    @property
    def results(self) -> Path:
        """The final evaluation of every `fit`, one JSON object a line."""
        return self.root / "results.jsonl"

    @property
    def tokenizer(self) -> Path:
        """The tokenizer of a pretrained model, as a folder; written by `retrofit`, and by `fit` from such a model."""
        return self.root / "tokenizer"

    @property
    def adapter(self) -> Path:
        """The low-rank adapter that `fit` trained, a folder of peft; the exported model has it merged."""
        return self.root / "adapter"

    @property
    def retrofit(self) -> Path:
        """The folder of an unfinished retrofit: sampled hidden states and the fit so far; removed at its end."""
        return self.root / "retrofit"

    @property
    def csv(self) -> Path:
        """The folder of the CSV logger."""
        return self.root / "csv"

    @property
    def mlflow_database(self) -> Path:
        """The SQLite database of MLflow, used unless `run.tracking_uri` names another store."""
        return self.root / "mlflow.db"

    @property
    def mlflow_artifacts(self) -> Path:
        """The folder in which MLflow would store artifacts."""
        return self.root / "mlflow_artifacts"

    @property
    def mlflow_run_id(self) -> Path:
        """The id of the run in its MLflow store, as text; a resumed `fit` logs to the same MLflow run."""
        return self.root / "mlflow_run_id"

    @property
    def predictions(self) -> Path:
        """The log-probability of every validation token, NaN for masked targets; written by `predict`."""
        return self.root / "predictions.safetensors"

    @property
    def index(self) -> Path:
        """The index over the training tokens; written by `index` unless `index.dir` names another folder."""
        return self.root / "index"

    @property
    def prototypes(self) -> Path:
        """The index of the model's own prototypes; written by `prototypes`, `suppress` and `calibrate`."""
        return self.root / "prototypes"

    @property
    def interventions(self) -> Path:
        """The folder of interventions and their reports; written by `suppress` and `calibrate`."""
        return self.root / "interventions"

    @property
    def evaluation(self) -> Path:
        """The folder of evaluation results; those with interventions are in subfolders named after them."""
        return self.root / "evaluation"

    @property
    def curvature(self) -> Path:
        """The numbers of `curvature`, JSON."""
        return self.root / "curvature.json"

    @property
    def curvature_plot(self) -> Path:
        """The plot of `curvature`."""
        return self.root / "curvature.png"


def exported_folder(path: Path) -> Path | None:
    """Return the exported model at `path` or in the run directory `path`; None where there is none."""
    return next((folder for folder in (RunPaths(path).model, path) if (folder / "config.json").is_file()), None)


@dataclass
class RunSettings:
    """The run directory and what is recorded in it.

    Args:
        dir: run directory; `fit` resumes the run that is in it.
        tracking_uri: address of the MLflow server or database; by default a SQLite file in the run directory.
        experiment: name of the MLflow experiment.
        checkpoint_interval: number of optimiser steps between checkpoints.
        checkpoints_kept: number of the newest checkpoints to keep.
        sample_prompt: text that the trained model continues and explains at the end of `fit`.
    """

    dir: str = "runs/unnamed"
    tracking_uri: str | None = None
    experiment: str = "prism_lightning"
    checkpoint_interval: int = 500
    checkpoints_kept: int = 2
    sample_prompt: str | None = None


class RunDirectory:
    """One run directory on disk: locks it, records the recipe, finds checkpoints and results.

    Args:
        settings: the `run` group of the recipe.
        option: the option that names the directory, for error messages.
    """

    def __init__(self, settings: RunSettings, option: str = "--run.dir") -> None:
        self.settings, self.option = settings, option
        self.paths = RunPaths(Path(settings.dir))
        self.lock: filelock.BaseFileLock | None = None

    def record(self, config: dict[str, Any], data_fingerprint: str, first_process: bool = True) -> None:
        """Lock the directory for this process, and write the resolved recipe and the environment.

        Args:
            config: the resolved recipe.
            data_fingerprint: identity of the prepared data.
            first_process: whether this process writes on behalf of all processes of the run.

        Raises:
            UserError: the directory holds a run of another recipe, or another process uses it.
        """
        if first_process:
            self._lock()
        self._check_recipe(config)
        if first_process:
            write_whole(self.paths.recipe, yaml.safe_dump(config, sort_keys=False).encode())
            write_json(self.paths.environment, environment() | {"data_fingerprint": data_fingerprint})

    def create(self) -> None:
        """Create the directory, unless it is there; raise UserError where that is impossible."""
        try:
            self.paths.root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"{self.option.lstrip('-')} {self.paths.root} cannot be created ({error.strerror}): choose another"
                f" {self.option}"
            ) from error

    def _lock(self) -> None:
        self.create()
        self.lock = lock_run(self.paths)

    def _check_recipe(self, config: dict[str, Any]) -> None:
        """Raise UserError where work of another recipe is in the directory."""
        if not (self.paths.recipe.is_file() and self.has_work()):
            return
        differences = _differences(yaml.safe_load(self.paths.recipe.read_text()) or {}, config)
        if differences:
            raise UserError(
                f"{self.paths.root} holds a run of another recipe ({'; '.join(differences[:5])}):"
                f" choose another {self.option} or remove it"
            )

    def has_work(self) -> bool:
        """Return whether a `fit` or a `retrofit` has begun here: it has left a checkpoint, states or results."""
        return bool(self.last_checkpoint() or self.paths.retrofit.is_dir() or self.last_results())

    def unlock(self) -> None:
        """Release the lock, if this process holds it."""
        if self.lock is not None:
            self.lock.release()

    def last_checkpoint(self) -> Path | None:
        """Return the newest complete checkpoint; None where there is none.

        Checkpoint files are complete because they are renamed into place. DeepSpeed writes `latest` last.
        """
        complete = [path for path in self.paths.checkpoints.glob(CHECKPOINTS) if path.is_file() or is_deepspeed(path)]
        return max(complete, key=lambda path: path.name, default=None)

    def last_results(self) -> dict[str, Any] | None:
        """Return the last line of results.jsonl; None where there is none.

        Raises:
            UserError: that line is not a JSON object with an integer `step`.
        """
        if not self.paths.results.is_file():
            return None
        lines = self.paths.results.read_text(errors="replace").splitlines()
        if not lines:
            return None
        try:
            results = json.loads(lines[-1])
            step = results["step"]
        except (ValueError, KeyError, TypeError):
            step = None
        if not isinstance(step, int):
            raise UserError(f"the last line of {self.paths.results} is damaged: remove that line and run fit again")
        return results

    def add_results(self, results: dict[str, Any]) -> None:
        """Append one line of results. The whole file is replaced, so that a kill leaves no incomplete line."""
        lines = self.paths.results.read_bytes() if self.paths.results.is_file() else b""
        write_whole(self.paths.results, lines + as_json(results).encode() + b"\n")


def is_deepspeed(path: Path) -> bool:
    """Return whether a path is a complete DeepSpeed checkpoint: a folder that contains the file `latest`."""
    return (path / "latest").is_file()


def _differences(recorded: dict[str, Any], requested: dict[str, Any]) -> list[str]:
    """Return a text for each setting that differs between two recipes and may not change on resuming."""
    from prism_lightning.config.compose import flat  # omegaconf takes 0.1 s, and `explain` needs the paths alone

    new = flat(requested)
    old = {key: value for key, value in FORMER_VALUES.items() if key in new} | flat(recorded)
    return [
        f"{key}: recorded {old.get(key)}, requested {new.get(key)}"
        for key in sorted(old.keys() | new.keys())
        if not key.startswith(FREE_ON_RESUME) and old.get(key) != new.get(key)
    ]
