"""Hidden states of passages in batches, and the loss of tokens under a model's interventions.

Shapes: B passages of a batch, T tokens of a passage, N tokens of a batch, C of them in a chunk, D hidden size, c tokens
of context.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from prism_lightning.attribution.curvature.records import chunk_size
from prism_lightning.interventions.suppression.behaviours import MarkedPassage
from prism_lightning.models import PrismForCausalLM
from prism_lightning.models.padded_batches import batches_by_length, right_padded

BATCH_TOKENS = 8192  # in one forward pass, padding included
CONTEXT_TOKENS = 16  # tokens before a target that the bias of a word may look at


class States(NamedTuple):
    """Hidden states of a batch of passages, without padding.

    Attributes:
        z_ND: Hidden states that predict the targets.
        targets_N: The tokens that are predicted.
        marked_N: Whether a target belongs to the behaviour.
        text_N: Number of the text of each target.
        context_Nc: The tokens before each target; -1 stands before the passage.
    """

    z_ND: Tensor
    targets_N: Tensor
    marked_N: np.ndarray
    text_N: np.ndarray
    context_Nc: Tensor


@torch.no_grad()
def batches(model: PrismForCausalLM, passages: list[MarkedPassage]) -> Iterator[States]:
    """Yield the hidden states of passages, longest first, with a bounded number of tokens in one forward pass."""
    inputs = [passage.ids[:-1] for passage in passages]
    for indices in batches_by_length(inputs, BATCH_TOKENS):
        batch = [passages[index] for index in indices]
        z_BTD = model.hidden_states(right_padded([inputs[index] for index in indices], model.device))
        rows = [row for row, passage in enumerate(batch) for _ in passage.ids[1:]]
        columns = [column for passage in batch for column in range(len(passage.ids) - 1)]
        targets = [token for passage in batch for token in passage.ids[1:]]
        contexts = [context for passage in batch for context in _contexts(passage.ids)]
        yield States(
            z_ND=z_BTD[rows, columns],
            targets_N=torch.tensor(targets, device=model.device),
            marked_N=np.concatenate([passage.marked_T for passage in batch]),
            text_N=np.array([passage.text for passage in batch for _ in passage.ids[1:]]),
            context_Nc=torch.tensor(contexts, device=model.device),
        )


def _contexts(ids: list[int]) -> list[list[int]]:
    """Return the context of every token but the first."""
    extended = [-1] * (CONTEXT_TOKENS - 1) + ids
    return [extended[start : start + CONTEXT_TOKENS] for start in range(len(ids) - 1)]


@torch.no_grad()
def token_losses(model: PrismForCausalLM, z_ND: Tensor, targets_N: Tensor) -> Tensor:
    """Return the loss [N] of every target in nats, on the CPU, under the model's interventions."""
    size = chunk_size(model.lm_head.weight)
    parts = zip(z_ND.split(size), targets_N.split(size), strict=True)
    losses = [
        F.cross_entropy(model.logits(z_CD.to(model.device)).float(), targets_C.to(model.device), reduction="none").cpu()
        for z_CD, targets_C in parts
    ]
    return torch.cat(losses)
