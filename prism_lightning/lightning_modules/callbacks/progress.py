"""The progress bar of a terminal, and progress as plain lines for log files."""

from __future__ import annotations

import sys
import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar

from prism_lightning.common.progress import LINE_SECONDS
from prism_lightning.lightning_modules.callbacks.throughput import ends_logged_step


def progress_callback() -> Callback:
    """Return a progress bar where output and errors are terminals; otherwise a callback that prints lines."""
    return ProgressBar(leave=True) if sys.stderr.isatty() and sys.stdout.isatty() else ProgressLines()


class ProgressBar(RichProgressBar):
    """Lightning's progress bar over the whole run, with loss and tokens per second."""

    def _get_train_description(self, current_epoch: int) -> str:
        return "training"  # Lightning counts the run as one epoch and would print "Epoch 0/-2"

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """Return loss (nats) and tokens per second as short texts."""
        metrics = trainer.progress_bar_metrics
        columns = {"loss": f"{metrics['train/loss']:.3f}"} if "train/loss" in metrics else {}
        if "tokens_per_second" in metrics:
            columns["tokens/s"] = f"{metrics['tokens_per_second']:,.0f}"
        return columns


class ProgressLines(Callback):
    """Prints step, loss, tokens per second and the remaining time, at each logging interval or every ten seconds."""

    def __init__(self) -> None:
        self._start: tuple[float, int] | None = None
        self._printed = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Print a line at the logger's steps, and where ten seconds have passed since the last line."""
        step = trainer.global_step
        if self._start is None:
            self._start = (time.perf_counter(), step)
        seconds_silent = time.perf_counter() - self._printed
        if not trainer.is_global_zero or not (ends_logged_step(trainer, batch_idx) or seconds_silent > LINE_SECONDS):
            return
        self._printed = time.perf_counter()
        metrics = trainer.callback_metrics
        start_time, start_step = self._start
        seconds_per_step = (time.perf_counter() - start_time) / max(1, step - start_step)
        seconds_left = seconds_per_step * (trainer.max_steps - step)
        remaining = f"{seconds_left:.0f} s left" if step > start_step else "time left unknown"
        rate = f"  {metrics['tokens_per_second']:,.0f} tokens/s" if "tokens_per_second" in metrics else ""
        print(f"step {step}/{trainer.max_steps}  loss {metrics['train/loss']:.3f}{rate}  {remaining}", flush=True)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Print the progress of a long validation."""
        if trainer.is_global_zero and time.perf_counter() - self._printed > LINE_SECONDS:
            self._printed = time.perf_counter()
            print(f"step {trainer.global_step}  validating {batch_idx + 1}/{trainer.num_val_batches[0]}", flush=True)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the validation loss."""
        if trainer.is_global_zero and "val/loss" in trainer.callback_metrics:
            print(f"step {trainer.global_step}  validation loss {trainer.callback_metrics['val/loss']:.4f}", flush=True)
