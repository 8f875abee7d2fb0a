"""Hidden states of passages in batches, and the loss of their tokens under interventions.

Shapes: N tokens of a batch, D hidden size, V vocabulary, k active prototypes, G texts, c tokens of context.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from prism_lightning.attribution.curvature.records import chunk_size
from prism_lightning.interventions.suppression.behaviours import Passage
from prism_lightning.models import PrismForCausalLM

BATCH_TOKENS = 8192
CONTEXT = 16  # tokens before a target that a word's bias may look at


class States(NamedTuple):
    """Hidden states of a batch of passages, padding left out."""

    z_ND: Tensor
    targets_N: Tensor
    marked_N: np.ndarray  # whether the target belongs to the behaviour
    text_N: np.ndarray
    context_Nc: Tensor  # the tokens before each target, -1 where there are none


@torch.no_grad()
def batches(model: PrismForCausalLM, passages: list[Passage]) -> Iterator[States]:
    """Hidden states of passages, longest first, a bounded number of tokens at a time."""
    order = sorted(passages, key=lambda passage: -len(passage.ids))
    first = 0
    while first < len(order):
        longest = len(order[first].ids) - 1
        batch = order[first : first + max(1, BATCH_TOKENS // longest)]
        first += len(batch)
        # Causal attention never looks at what is padded on the right.
        ids_BT = torch.tensor([p.ids[:-1] + [0] * (longest + 1 - len(p.ids)) for p in batch], device=model.device)
        rows = [row for row, p in enumerate(batch) for _ in p.ids[1:]]
        columns = [column for p in batch for column in range(len(p.ids) - 1)]
        before = [[-1] * (CONTEXT - 1) + p.ids for p in batch]
        yield States(
            model.hidden_states(ids_BT)[rows, columns],
            torch.tensor([token for p in batch for token in p.ids[1:]], device=model.device),
            np.concatenate([p.marked_T for p in batch]),
            np.array([p.text for p in batch for _ in p.ids[1:]]),
            torch.tensor([b[t : t + CONTEXT] for b in before for t in range(len(b) - CONTEXT)], device=model.device),
        )


@torch.no_grad()
def token_losses(model: PrismForCausalLM, z_ND: Tensor, targets_N: Tensor) -> Tensor:
    """Loss [N] of every target in nats, on the CPU, under the model's interventions."""
    size = chunk_size(model.lm_head.weight)
    losses = [
        F.cross_entropy(model.logits(z_CD.to(model.device)).float(), targets_C.to(model.device), reduction="none").cpu()
        for z_CD, targets_C in zip(z_ND.split(size), targets_N.split(size), strict=True)
    ]
    return torch.cat(losses) if losses else torch.zeros(0)


def text_losses(model: PrismForCausalLM, parts: Iterable[States], texts: int) -> tuple[np.ndarray, np.ndarray]:
    """Summed loss in nats [G] and number of targets [G] of every text, under the model's interventions."""
    losses_G, tokens_G = np.zeros(texts), np.zeros(texts)
    for states in parts:
        losses_G += np.bincount(states.text_N, token_losses(model, states.z_ND, states.targets_N).numpy(), texts)
        tokens_G += np.bincount(states.text_N, minlength=texts)
    return losses_G, tokens_G
