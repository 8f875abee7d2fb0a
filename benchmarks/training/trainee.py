"""A model that is trained on random tokens, to measure its speed."""

from __future__ import annotations

import time

import torch

from prism_lightning.lightning_modules.optimizer import parameter_groups
from prism_lightning.lightning_modules.prism import PROTOTYPE_GRADIENT_SCALE
from prism_lightning.models import PrismConfig, PrismForCausalLM


class Trainee:
    """A model with its optimiser. It trains on random tokens, since the speed does not depend on the tokens.

    Args:
        config: Configuration of the model.
        tokens: Number of blocks of a micro-batch, and tokens of a block.
        device: "cpu" or "cuda".
        accumulation: Micro-batches of an optimiser step.
    """

    def __init__(self, config: PrismConfig, tokens: tuple[int, int], device: str, accumulation: int = 1) -> None:
        torch.manual_seed(0)
        with torch.device(device):  # on a GPU, random weights of a 1.6B model take one second
            self.model: PrismForCausalLM = PrismForCausalLM(config)
            self.ids = torch.randint(config.vocab_size, tokens)
        groups = parameter_groups(self.model, 1e-3, 1e-2, 0.1)
        self.optimizer = torch.optim.AdamW(groups, fused=device != "cuda")  # as `fit` does in mixed precision
        self.device, self.accumulation = device, accumulation

    def step(self) -> None:
        """Take one optimiser step with the settings of `fit`."""
        for _ in range(self.accumulation):
            with torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cuda"):
                result = self.model.objective(self.ids, self.ids, prototype_gradient_scale=PROTOTYPE_GRADIENT_SCALE)
            (result.loss / self.accumulation).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def rate(self, steps: int) -> float:
        """Take some optimiser steps and return the tokens per second."""
        started = time.perf_counter()
        for _ in range(steps):
            self.step()
        if self.device == "cuda":
            torch.cuda.synchronize()
        return steps * self.accumulation * self.ids.numel() / (time.perf_counter() - started)
