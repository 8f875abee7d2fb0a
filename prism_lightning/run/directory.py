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
from prism_lightning.config.compose import flat
from prism_lightning.run.environment import environment
from prism_lightning.run.lock import lock_run

# A resumed run may change how it is run, not what is trained.
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


@dataclass
class RunSettings:
    """Where a run lives and what it leaves behind.

    Args:
        dir: the run directory; `fit` continues the run it finds there.
        tracking_uri: MLflow server or database; by default SQLite in the run directory.
        experiment: MLflow experiment.
        checkpoint_interval: optimiser steps between checkpoints.
        checkpoints_kept: how many of the newest checkpoints to keep.
        sample_prompt: a text that the trained model continues and explains at the end of `fit`.
    """

    dir: str = "runs/unnamed"
    tracking_uri: str | None = None
    experiment: str = "prism_lightning"
    checkpoint_interval: int = 500
    checkpoints_kept: int = 2
    sample_prompt: str | None = None


class RunDirectory:
    """The files of one run: recipe, environment, checkpoints/, model/, results.jsonl, csv/ and mlflow.db."""

    def __init__(self, settings: RunSettings) -> None:
        self.path = Path(settings.dir)
        self.settings = settings
        self.checkpoints = self.path / "checkpoints"
        self.model = self.path / "model"
        self.results = self.path / "results.jsonl"
        self.mlflow_run = self.path / "mlflow_run_id"
        self.lock: filelock.BaseFileLock | None = None

    def record(self, config: dict[str, Any], data_fingerprint: str, first_process: bool = True) -> None:
        """Lock the directory for this process, and write the resolved recipe and the environment.

        Args:
            config: the resolved recipe.
            data_fingerprint: of the prepared data.
            first_process: whether this process writes for all of a run's.

        Raises:
            UserError: the directory holds a run of another recipe, or another process has it.
        """
        if first_process:
            self._lock()
        recipe = self.path / "recipe.yaml"
        if recipe.is_file() and self.last_checkpoint():
            changed = _differences(yaml.safe_load(recipe.read_text()) or {}, config)
            if changed:
                raise UserError(
                    f"{self.path} holds a run of another recipe ({'; '.join(changed[:5])}):"
                    " choose another --run.dir or remove it"
                )
        if not first_process:
            return
        write_whole(recipe, yaml.safe_dump(config, sort_keys=False).encode())
        write_json(self.path / "environment.json", environment() | {"data_fingerprint": data_fingerprint})

    def _lock(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"run.dir {self.path} cannot be made ({error.strerror}): choose another --run.dir"
            ) from error
        self.lock = lock_run(self.path)

    def unlock(self) -> None:
        """Give the directory free again."""
        if self.lock is not None:
            self.lock.release()

    def last_checkpoint(self) -> Path | None:
        """The newest complete checkpoint: files are renamed into place, a DeepSpeed folder ends with `latest`."""
        found = [path for path in self.checkpoints.glob("step-*.ckpt") if path.is_file() or (path / "latest").is_file()]
        return max(found, key=lambda path: path.name, default=None)

    def last_results(self) -> dict[str, Any] | None:
        """The last line of results.jsonl; None where there is none.

        Raises:
            UserError: it is not the JSON object that `fit` wrote.
        """
        if not self.results.is_file():
            return None
        lines = self.results.read_text(errors="replace").splitlines()
        if not lines:
            return None
        try:
            results = json.loads(lines[-1])
            step = results["step"]
        except (ValueError, KeyError, TypeError):
            step = None
        if not isinstance(step, int):
            raise UserError(f"the last line of {self.results} is damaged: remove that line and run fit again")
        return results

    def add_results(self, results: dict[str, Any]) -> None:
        """Append one line of results; the file is written whole, so that a kill leaves no half line."""
        before = self.results.read_bytes() if self.results.is_file() else b""
        write_whole(self.results, before + as_json(results).encode() + b"\n")


def _differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    old, new = flat(before), flat(now)
    return [
        f"{key}: {old.get(key)} there, {new.get(key)} here"
        for key in sorted(old.keys() | new.keys())
        if not key.startswith(FREE_ON_RESUME) and old.get(key) != new.get(key)
    ]
