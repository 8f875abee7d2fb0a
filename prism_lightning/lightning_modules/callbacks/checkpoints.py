"""When checkpoints are saved: at intervals, at the last step, and where a signal asks the process to stop."""

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
            for old in sorted(Path(filepath).parent.glob(CHECKPOINTS))[: -self.kept]:
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
