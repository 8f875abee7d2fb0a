"""Tokens per second and model FLOPs utilisation (MFU)."""

from __future__ import annotations

import time
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from prism_lightning.models.flops import flops_per_token, peak_flops


def ends_logged_step(trainer: Any, batch_idx: int) -> bool:
    """Return whether this batch completes an optimiser step that is logged."""
    stepped = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
    return stepped and trainer.global_step % max(1, trainer.log_every_n_steps) == 0


class Throughput(Callback):
    """Logs `tokens_per_second` (all devices) and, where the device's peak is known, `mfu`, per logging interval."""

    def __init__(self) -> None:
        self._window_start: float | None = None
        self._tokens = 0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Start the clock at the first batch, so that preparation is not counted."""
        if self._window_start is None:
            self._window_start = time.perf_counter()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Discard the interval that contains a validation."""
        self._window_start, self._tokens = None, 0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the tokens, and log the rate at the logger's steps."""
        self._tokens += batch["input_ids"].numel() * trainer.world_size
        if self._window_start is None or not ends_logged_step(trainer, batch_idx):
            return
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize()
        rate = self._tokens / (time.perf_counter() - self._window_start)
        pl_module.log("tokens_per_second", rate, prog_bar=True, rank_zero_only=True)
        utilisation = mfu(rate, pl_module, batch["input_ids"].shape[1], trainer.world_size)
        if utilisation is not None:
            pl_module.log("mfu", utilisation, rank_zero_only=True)
        self._window_start, self._tokens = time.perf_counter(), 0


def mfu(tokens_per_second: float, module: Any, block_size: int, devices: int) -> float | None:
    """Return the FLOP/s of decoder and head as a share of the devices' peak; None on CPU and for unknown devices.

    Prototypes are not counted, so that twins compare (docs/method.md, "Reported figures"). Beside adapters, frozen
    weights count without their own gradient.
    """
    if module.device.type != "cuda":
        return None
    peak = peak_flops(torch.cuda.get_device_name(module.device))
    if peak is None:
        return None
    model = module.model
    flops = flops_per_token(model.matrix_parameters, model.config.backbone_config, block_size, model.frozen_parameters)
    return tokens_per_second * flops / (peak * devices)
