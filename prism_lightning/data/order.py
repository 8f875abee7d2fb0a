"""The order of training blocks: a pure function of (seed, epoch, global position), at any world size."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

ROUNDS = 6


def block_at(positions: np.ndarray, num_blocks: int, seed: int) -> np.ndarray:
    """The block at each global position; every run of `num_blocks` positions is one epoch, each block in it once.

    A Feistel network permutes the indices in O(1) memory and any of them alone: a table for 50B tokens in blocks
    of 1,024 would take 390 MB, and a shuffled list cannot be entered in the middle.
    """
    positions = np.asarray(positions, dtype=np.uint64)
    blocks = np.empty(positions.shape, dtype=np.int64)
    epochs = positions // np.uint64(num_blocks)
    for epoch in np.unique(epochs):
        chosen = epochs == epoch
        blocks[chosen] = _permute(positions[chosen] % np.uint64(num_blocks), num_blocks, seed, int(epoch))
    return blocks


def _permute(index: np.ndarray, size: int, seed: int, epoch: int) -> np.ndarray:
    half_bits = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half_bits)) - 1)
    keys = np.random.Generator(np.random.Philox(key=[seed, epoch])).integers(0, 2**63, ROUNDS, dtype=np.uint64)
    index = index.copy()
    outside = np.ones(index.shape, dtype=bool)
    while outside.any():  # walk the cycle until the image falls below size: under 4 steps on average
        left, right = index[outside] >> half_bits, index[outside] & mask
        for key in keys:
            left, right = right, left ^ (_mix(right ^ key) & mask)
        index[outside] = (left << half_bits) | right
        outside = index >= size
    return index.astype(np.int64)


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64: every input bit changes about half of the output bits."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class TrainingOrder:
    """Batches of block ids for one rank. Optimiser step s covers positions [s G, (s + 1) G) at every world size.

    Args:
        num_blocks: blocks in the training split.
        seed: seed of the order.
        batch_size: G, blocks per optimiser step over all ranks.
        micro_batch_size: blocks in one forward pass of one rank.
        rank, world_size: this process and their number.
        steps: optimiser steps of the whole run.
    """

    def __init__(
        self, num_blocks: int, seed: int, batch_size: int, micro_batch_size: int, rank: int, world_size: int, steps: int
    ) -> None:
        self.num_blocks, self.seed, self.rank = num_blocks, seed, rank
        self.batch_size = micro_batch_size  # torch's name for it, by which Lightning's DeepSpeed strategy asks
        self.blocks_per_batch = micro_batch_size * world_size
        self.batches = steps * batch_size // self.blocks_per_batch
        self.start = 0  # global position where iteration begins

    def __len__(self) -> int:
        """Batches of the whole run, also after a resume: Lightning counts those already done against it."""
        return self.batches

    def __iter__(self) -> Iterator[list[int]]:
        for batch in range(self.start // self.blocks_per_batch, self.batches):
            first = batch * self.blocks_per_batch + self.rank * self.batch_size
            positions = np.arange(first, first + self.batch_size)
            yield block_at(positions, self.num_blocks, self.seed).tolist()
