"""The progress bar, and plain lines where there is no terminal to draw it on."""

from __future__ import annotations

import sys
import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar

from prism_lightning.common.progress import LINE_SECONDS
from prism_lightning.lightning_modules.callbacks.throughput import ends_logged_step


def progress_callback() -> Callback:
    """A bar with loss, tokens/s and time left on a terminal; otherwise a line per logging interval."""
    return ProgressBar(leave=True) if sys.stderr.isatty() and sys.stdout.isatty() else ProgressLines()


class ProgressBar(RichProgressBar):
    """Lightning's bar over the whole run, with our metrics' names shortened."""

    def _get_train_description(self, current_epoch: int) -> str:
        return "training"  # the run is one epoch to Lightning, which would print "Epoch 0/-2"

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """Loss and tokens per second, in figures that fit beside the bar."""
        metrics = trainer.progress_bar_metrics
        shown = {"loss": f"{metrics['train/loss']:.3f}"} if "train/loss" in metrics else {}
        if "tokens_per_second" in metrics:
            shown["tokens/s"] = f"{metrics['tokens_per_second']:,.0f}"
        return shown


class ProgressLines(Callback):
    """For log files: step, loss, tokens/s and time left, a line per logging interval or ten seconds."""

    def __init__(self) -> None:
        self._start: tuple[float, int] | None = None
        self._printed = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Print at the logger's steps, and where these are further apart than ten seconds."""
        step = trainer.global_step
        if self._start is None:
            self._start = (time.perf_counter(), step)
        silent = time.perf_counter() - self._printed
        if not trainer.is_global_zero or not (ends_logged_step(trainer, batch_idx) or silent > LINE_SECONDS):
            return
        self._printed = time.perf_counter()
        metrics = trainer.callback_metrics
        started, first = self._start
        pace = (time.perf_counter() - started) / max(1, step - first)
        left = f"{pace * (trainer.max_steps - step):.0f} s left" if step > first else "time left unknown"
        rate = f"  {metrics['tokens_per_second']:,.0f} tokens/s" if "tokens_per_second" in metrics else ""
        print(f"step {step}/{trainer.max_steps}  loss {metrics['train/loss']:.3f}{rate}  {left}", flush=True)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Say how far a long validation has come."""
        if trainer.is_global_zero and time.perf_counter() - self._printed > LINE_SECONDS:
            self._printed = time.perf_counter()
            print(f"step {trainer.global_step}  validating {batch_idx + 1}/{trainer.num_val_batches[0]}", flush=True)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the validation loss."""
        if trainer.is_global_zero and "val/loss" in trainer.callback_metrics:
            print(f"step {trainer.global_step}  validation loss {trainer.callback_metrics['val/loss']:.4f}", flush=True)
