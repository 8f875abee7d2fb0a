"""Checkpoints that are whole or absent, and that cannot run code when loaded."""

from __future__ import annotations

import os
import pickle
import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path
from signal import SIGTERM
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from prism_lightning.common.stops import Stopped, StopRequest, defer_stops, stop_at_once
from prism_lightning.errors import UserError, disk_is_full
from prism_lightning.exported import check_finite
from prism_lightning.models import PrismForCausalLM
from prism_lightning.strategies import trust_deepspeed_types


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the target and renames, so that neither a kill nor a full disk harms an earlier checkpoint."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Save; UserError when the disk does not take it."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        try:
            with partial.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        except (OSError, RuntimeError) as error:  # torch wraps a failing write in a RuntimeError
            partial.unlink(missing_ok=True)
            reason = "the disk is full" if disk_is_full(error) else " ".join(str(error).split())[:120]
            raise UserError(
                f"checkpoint {path} could not be saved ({reason}): free space and run the same command;"
                " earlier checkpoints are whole"
            ) from error

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = None) -> dict[str, Any]:
        """Load tensors and plain values only; UserError for a damaged file or one that would run code."""
        return load_checkpoint(Path(path))


def load_checkpoint(path: Path) -> dict[str, Any]:
    """The contents of a checkpoint file.

    Raises:
        UserError: missing, truncated, damaged, or a pickle that would run code.
    """
    if path.is_file():
        check_archive(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(content, dict) or "state_dict" not in content:
            raise UserError(f"{path} is no checkpoint of a training run: give a file under RUN/checkpoints")
        return content
    except FileNotFoundError as error:
        raise UserError(f"checkpoint {path} not found: give a file under RUN/checkpoints") from error
    except pickle.UnpicklingError as error:
        raise UserError(
            f"checkpoint {path} was refused: it is damaged or would run code when loaded; use a checkpoint of `fit`"
        ) from error
    except (RuntimeError, EOFError, OSError) as error:
        raise UserError(
            f"checkpoint {path} is truncated or damaged: remove it, and `fit` resumes from the one before"
        ) from error


def check_archive(path: Path) -> None:
    """Compare every record of a file of `torch.save` with its checksum, which torch writes but does not read.

    Raises:
        UserError: a record that differs; files that are no zip archives are left to `torch.load`.
    """
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, OSError) as error:
        damaged = str(error)
    if damaged:
        raise UserError(f"checkpoint {path} is damaged ({damaged}): remove it, and `fit` resumes from the one before")


def open_deepspeed(folder: Path) -> None:
    """Check every file of a DeepSpeed checkpoint and let weights-only loading read it. Raises as `check_archive`."""
    for path in sorted(folder.rglob("*.pt")):
        check_archive(path)
    trust_deepspeed_types()


def load_model_weights(model: PrismForCausalLM, state: Mapping[str, torch.Tensor], path: Path) -> None:
    """Load the `model.` part of a module's weights; a tied head may be absent.

    Raises:
        UserError: names or shapes differ, or values are not finite.
    """
    weights = {name.removeprefix("model."): value for name, value in state.items() if name.startswith("model.")}
    expected = model.state_dict()
    for name, source in model.tied_weights().items():
        weights.setdefault(name, weights.get(source, torch.empty(0)))
    wrong = [
        f"{name}: {tuple(weights[name].shape) if name in weights else 'absent'} there, {tuple(value.shape)} here"
        for name, value in expected.items()
        if name not in weights or weights[name].shape != value.shape
    ]
    wrong += [f"{name}: unknown here" for name in weights if name not in expected]
    if wrong:
        raise UserError(
            f"{path} is of another model ({'; '.join(wrong[:3])}; {len(wrong)} in all): give its own recipe"
        )
    check_finite(weights, path)
    model.load_state_dict(weights)


class Checkpoints(ModelCheckpoint):
    """Keeps the newest few checkpoints, also over restarts.

    Saves at every interval, at the very last step, and when a signal asks the process to stop.

    Args:
        folder: where they go.
        interval: optimiser steps between them.
        kept: how many of the newest to keep.
    """

    def __init__(self, folder: Path, interval: int, kept: int) -> None:
        super().__init__(
            dirpath=folder,
            filename="step-{step:08d}",
            auto_insert_metric_name=False,
            every_n_train_steps=interval,
            save_on_train_epoch_end=False,
            save_top_k=-1,
        )
        self.kept = kept
        self.request = StopRequest()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The checkpoint that a run resumes from is not saved again.

        Lightning has forgotten it by then, and would after the first of several micro-batches write over it, in the
        middle of a step. Its own signal handlers are replaced here: with them a SIGTERM left no checkpoint.
        """
        super().on_train_start(trainer, pl_module)
        self._last_global_step_saved = trainer.global_step
        defer_stops(self.request)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save where it is due; where a stop was asked for, save once the optimiser step is whole, and stop."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self._stop_if_asked(trainer)

    def on_validation_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """A stop does not wait for the rest of a validation: the weights are those of a whole step.

        With several processes it does: they may have different numbers of validation batches, and all must agree.
        """
        if trainer.world_size == 1:
            self._stop_if_asked(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Every process gets here once."""
        super().on_validation_end(trainer, pl_module)
        self._stop_if_asked(trainer)

    def _stop_if_asked(self, trainer: Trainer) -> None:
        # All ranks save together, whichever of them heard the signal.
        asked = trainer.strategy.reduce_boolean_decision(self.request.signal is not None, all=False)
        if not asked:
            return
        if self._last_global_step_saved != trainer.global_step:
            self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))
        stop_at_once()
        raise Stopped(self.request.signal or SIGTERM, f"the checkpoint of step {trainer.global_step} is saved")

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        super()._save_checkpoint(trainer, filepath)
        if trainer.is_global_zero:
            for old in sorted(Path(filepath).parent.glob("step-*.ckpt"))[: -self.kept]:
                shutil.rmtree(old) if old.is_dir() else old.unlink()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the last step, where the interval did not fall on it; then obey a stop that was asked for."""
        if self._last_global_step_saved != trainer.global_step:
            self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))
        self._stop_if_asked(trainer)
        stop_at_once()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Signals stop at once again."""
        super().on_exception(trainer, pl_module, exception)
        stop_at_once()
