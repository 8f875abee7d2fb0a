"""Polishing: fitting the prototypes to a frozen decoder (method, section 3).

Logits without interventions do not depend on the prototypes, so no prediction changes. Shape suffixes: N tokens,
D hidden size, K prototypes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from prism_lightning.models.prototypes import PrototypeLayer, revived_prototypes

BATCH_TOKENS = 4096
REVIVAL_INTERVAL = 100


def polish(layer: PrototypeLayer, z_ND: Tensor, steps: int, learning_rate: float, seed: int) -> Iterator[float]:
    """Minimise L_rec by Adam over random batches of hidden states, and yield each step's unexplained variance.

    The learning rate falls along a half cosine to zero. Prototypes that no token used for `REVIVAL_INTERVAL` steps are
    set to poorly explained tokens, except in the last quarter of the steps.

    Args:
        layer: its weight is changed in place.
        z_ND: hidden states of training tokens.
        steps: number of Adam steps.
        learning_rate: peak learning rate.
        seed: seed of batches and revivals.
    """
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam([layer.weight], lr=learning_rate, betas=(0.9, 0.99))
    usage_K = torch.zeros(layer.weight.shape[0], dtype=torch.long, device=z_ND.device)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * 0.5 * (1 + math.cos(math.pi * step / steps))
        rows = torch.randint(z_ND.shape[0], (BATCH_TOKENS,), generator=generator).to(z_ND.device)
        batch_ND = z_ND[rows].float()
        mixture, terms = layer(batch_ND, commitment=0.0)
        assert terms is not None
        optimizer.zero_grad()
        terms.reconstruction.backward()
        optimizer.step()
        usage_K += torch.bincount(mixture.indices_Nk[mixture.activations_Nk > 0], minlength=len(usage_K))
        if step % REVIVAL_INTERVAL == REVIVAL_INTERVAL - 1:
            if step < 0.75 * steps and (usage_K == 0).any():
                table = revived_prototypes(
                    layer.weight.detach().float(), usage_K == 0, batch_ND, mixture.mixture_ND.detach(), generator
                )
                layer.weight.data.copy_(table)
            usage_K.zero_()
        yield terms.reconstruction.item()
