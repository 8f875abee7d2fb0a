"""Batches of token sequences of different lengths, padded on the right, where causal attention never looks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


def batches_by_length(sequences: Sequence[Sequence[int]], batch_tokens: int) -> Iterator[list[int]]:
    """Yield indices of sequences, longest first, in batches that hold at most `batch_tokens` with their padding.

    A longer sequence is a batch of its own. Sequences of equal length keep their order.
    """
    order = sorted(range(len(sequences)), key=lambda index: -len(sequences[index]))
    first = 0
    while first < len(order):
        count = max(1, batch_tokens // len(sequences[order[first]]))
        yield order[first : first + count]
        first += count


def right_padded(sequences: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Return sequences as one tensor [B, T] with zeros behind the shorter ones."""
    longest = max(map(len, sequences))
    return torch.tensor([[*ids, *[0] * (longest - len(ids))] for ids in sequences], device=device)
