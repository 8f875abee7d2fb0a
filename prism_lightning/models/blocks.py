"""Hidden states of the tokens of blocks, without those whose targets are masked.

Shape suffixes: B blocks, T positions, n tokens with a target, D hidden size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from prism_lightning.models.language_model import PrismForCausalLM, unmasked


class BlockStates(NamedTuple):
    """Hidden states and the targets that they predict.

    Attributes:
        z_nD: hidden states.
        targets_n: ids of the tokens that follow.
        kept_n: numbers of the tokens, row by row; None where no target is masked, so that n = B T.
    """

    z_nD: Tensor
    targets_n: Tensor
    kept_n: Tensor | None


def stacked(items: list[dict[str, Tensor]], device: torch.device) -> dict[str, Tensor]:
    """Return some blocks, as `TokenStore` gives them, as one batch [B, T] on a device."""
    return {name: torch.stack([item[name] for item in items]).to(device) for name in items[0]}


def all_states(model: PrismForCausalLM, batch: dict[str, Tensor]) -> Tensor:
    """Return the hidden states [B T, D] of a batch of blocks, row by row, also those of masked targets."""
    positions = {name: batch[name] for name in ("position_ids",) if name in batch}
    return model.hidden_states(batch["input_ids"], **positions).flatten(0, 1)


def block_states(model: PrismForCausalLM, items: list[dict[str, Tensor]]) -> BlockStates:
    """Return the hidden states of some blocks, as `TokenStore` gives them."""
    batch = stacked(items, model.device)
    z_ND = all_states(model, batch)
    kept_n, targets_n = unmasked(batch["targets"])
    return BlockStates(z_ND if kept_n is None else z_ND[kept_n], targets_n, kept_n)
