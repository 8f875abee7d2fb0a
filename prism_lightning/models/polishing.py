"""Polishing: fitting the prototypes to a frozen decoder (method, section 3).

Logits without interventions do not depend on the prototypes, so no prediction changes. Shape suffixes: N tokens,
D hidden size, K prototypes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from prism_lightning.models.encoders import EncoderName
from prism_lightning.models.metric_coordinates import MetricCoordinates
from prism_lightning.models.prototypes import PrototypeLayer, revived_prototypes
from prism_lightning.models.pursuit import Likeliest

BATCH_TOKENS = 4096
PEAK_LEARNING_RATES: dict[EncoderName, float] = {"cosine": 0.01, "pursuit": 0.05}  # as `Polishing` takes them
REVIVAL_INTERVAL = 100
REVIVAL_SHARE = 0.75  # of the steps; prototypes that are revived later would stay unfinished


class Polishing:
    """Minimises L_rec by Adam over random batches of hidden states, step by step; its state can be saved.

    The learning rate falls along a half cosine to zero. Prototypes that no token used for `REVIVAL_INTERVAL` steps are
    set to poorly explained tokens, except in the last quarter of the steps.

    Args:
        layer: its weight is changed in place.
        head_VD: W, which a pursuit needs.
        rows_of: returns hidden states [n, D] of the tokens with given numbers [n], and their likeliest next tokens
            where these are known.
        tokens: number N of hidden states.
        steps: number of Adam steps.
        learning_rate: peak learning rate; of a pursuit, as a share of the root mean square of the first prototypes.
        seed: seed of batches and revivals.
    """

    def __init__(
        self,
        layer: PrototypeLayer,
        head_VD: Tensor | None,
        rows_of: Callable[[Tensor], tuple[Tensor, Likeliest | None]],
        tokens: int,
        steps: int,
        learning_rate: float,
        seed: int,
    ) -> None:
        self.layer, self.head_VD, self.rows_of, self.tokens = layer, head_VD, rows_of, tokens
        scale = 1.0 if layer.metric is None else layer.weight.detach().square().mean().sqrt().item()
        self.steps, self.learning_rate = steps, learning_rate * scale
        self.generator = torch.Generator().manual_seed(seed)
        self.optimizer = torch.optim.Adam([layer.weight], lr=learning_rate, betas=(0.9, 0.99))
        self.usage_K = torch.zeros(layer.weight.shape[0], dtype=torch.long, device=layer.weight.device)
        self.steps_done = 0

    def step(self) -> float:
        """Take one step and return its unexplained variance."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate * 0.5 * (1 + math.cos(math.pi * self.steps_done / self.steps))
        batch_ND, likeliest = self.rows_of(torch.randint(self.tokens, (BATCH_TOKENS,), generator=self.generator))
        batch_ND = batch_ND.float()
        mixture, error = self.layer.reconstruction(batch_ND, self.head_VD, likeliest)
        self.optimizer.zero_grad()
        error.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.usage_K += torch.bincount(mixture.indices_Nk[mixture.activations_Nk > 0], minlength=len(self.usage_K))
        self.steps_done += 1
        if self.steps_done % REVIVAL_INTERVAL == 0:
            if self.steps_done - 1 < REVIVAL_SHARE * self.steps and (self.usage_K == 0).any():
                self._revive(batch_ND, mixture.mixture_ND.detach())
            self.usage_K.zero_()
        return error.item()

    def _revive(self, batch_ND: Tensor, mixture_ND: Tensor) -> None:
        table_KD = self.layer.weight.detach().float()
        if self.layer.metric is not None:  # a pursuit adds what the other prototypes leave: start from their residual
            batch_ND, mixture_ND = batch_ND - mixture_ND, torch.zeros_like(mixture_ND)
        self.layer.weight.data.copy_(
            revived_prototypes(table_KD, self.usage_K == 0, batch_ND, mixture_ND, self.generator)
        )

    def state_tensors(self) -> dict[str, Tensor]:
        """Return everything that the next step depends on besides the settings, as tensors."""
        adam: dict[str, Any] = self.optimizer.state[self.layer.weight] if self.steps_done else {}
        return {
            "weight": self.layer.weight.detach(),
            "usage": self.usage_K,
            "generator": self.generator.get_state(),
            "steps_done": torch.tensor(self.steps_done),
            **{f"adam.{name}": torch.as_tensor(value) for name, value in adam.items()},
        }

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Continue from `state_tensors`, bit for bit."""
        self.layer.weight.data.copy_(tensors["weight"])
        self.usage_K.copy_(tensors["usage"])
        self.generator.set_state(tensors["generator"])
        self.steps_done = int(tensors["steps_done"])
        device = self.layer.weight.device
        self.optimizer.state[self.layer.weight] = {
            name.removeprefix("adam."): value.clone() if name == "adam.step" else value.to(device, copy=True)
            for name, value in tensors.items()
            if name.startswith("adam.")
        }


def polish(
    layer: PrototypeLayer,
    z_ND: Tensor,
    steps: int,
    learning_rate: float,
    seed: int,
    head_VD: Tensor | None = None,
) -> Iterator[float]:
    """Yield the unexplained variance of every step of `Polishing` on hidden states in memory.

    A pursuit, which needs W, gets the mean metric of these hidden states.
    """
    coordinates = None
    if layer.metric is not None and head_VD is not None:
        coordinates = MetricCoordinates(head_VD.detach(), z_ND)
        coordinates.enter(layer)
        head_VD = coordinates.head_VD

    def rows_of(rows: Tensor) -> tuple[Tensor, None]:
        z_nD = z_ND[rows.to(z_ND.device)]
        return (coordinates(z_nD) if coordinates else z_nD), None

    polishing = Polishing(layer, head_VD, rows_of, len(z_ND), steps, learning_rate, seed)
    for _ in range(steps):
        yield polishing.step()
    if coordinates:
        coordinates.leave(layer)
