"""The callback that saves checkpoints: at intervals, at the last step, and when a signal stops the process."""

from __future__ import annotations

import shutil
from pathlib import Path
from signal import SIGTERM
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from prism_lightning.common.stops import Stopped, StopRequest, defer_stops, stop_at_once
from prism_lightning.run.directory import CHECKPOINTS


class Checkpoints(ModelCheckpoint):
    """Saves checkpoints and keeps the newest few, also over restarts.

    A checkpoint is saved at every interval, at the last step, and when a signal requests a stop.

    Args:
        folder: the folder of the checkpoints.
        interval: number of optimiser steps between checkpoints.
        kept: number of the newest checkpoints to keep.
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
        """Mark the checkpoint that the run resumes from as saved, and install the signal handlers."""
        super().on_train_start(trainer, pl_module)
        # Lightning does not remember that checkpoint. After the first of several micro-batches, in the middle of a
        # step, it would overwrite it.
        self._last_global_step_saved = trainer.global_step
        defer_stops(self.request)  # in place of Lightning's handlers, with which a SIGTERM left no checkpoint

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save a checkpoint that is due; after a request to stop, save at the end of the optimiser step and stop."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self._stop_if_requested(trainer)

    def on_validation_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Stop within a validation where one process trains: the weights are those of a whole step.

        Several processes may have different numbers of validation batches, so they stop at the validation's end.
        """
        if trainer.world_size == 1:
            self._stop_if_requested(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop after a validation, which every process ends once."""
        super().on_validation_end(trainer, pl_module)
        self._stop_if_requested(trainer)

    def _stop_if_requested(self, trainer: Trainer) -> None:
        # All ranks save together, whichever of them received the signal.
        stop_requested = trainer.strategy.reduce_boolean_decision(self.request.signal is not None, all=False)
        if not stop_requested:
            return
        if self._last_global_step_saved != trainer.global_step:
            self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))
        stop_at_once()
        raise Stopped(self.request.signal or SIGTERM, f"the checkpoint of step {trainer.global_step} is saved")

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        super()._save_checkpoint(trainer, filepath)
        if trainer.is_global_zero:
            for old in sorted(Path(filepath).parent.glob(CHECKPOINTS))[: -self.kept]:
                shutil.rmtree(old) if old.is_dir() else old.unlink()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the last step unless the interval did, then stop if a stop was requested."""
        if self._last_global_step_saved != trainer.global_step:
            self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))
        self._stop_if_requested(trainer)
        stop_at_once()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Let signals stop the process immediately again."""
        super().on_exception(trainer, pl_module, exception)
        stop_at_once()
