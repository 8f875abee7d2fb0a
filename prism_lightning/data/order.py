"""The order of training blocks: a pure function of seed, epoch and global position, the same at any world size."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

ROUNDS = 6


def block_at(positions: np.ndarray, num_blocks: int, seed: int) -> np.ndarray:
    """Return the block at each global position. An epoch is `num_blocks` positions and has each block once.

    A Feistel network permutes the indices. It needs O(1) memory and computes any index alone. A table for 50B tokens in
    blocks of 1,024 would take 390 MB.

    Args:
        positions: global positions, counted from the start of training.
        num_blocks: blocks in the training split.
        seed: of the order.
    """
    positions = np.asarray(positions, dtype=np.uint64)
    blocks = np.empty(positions.shape, dtype=np.int64)
    epochs = positions // np.uint64(num_blocks)
    for epoch in np.unique(epochs):
        in_epoch = epochs == epoch
        blocks[in_epoch] = _permute(positions[in_epoch] % np.uint64(num_blocks), num_blocks, seed, int(epoch))
    return blocks


def _permute(index: np.ndarray, size: int, seed: int, epoch: int) -> np.ndarray:
    half_bits = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half_bits)) - 1)
    keys = np.random.Generator(np.random.Philox(key=[seed, epoch])).integers(0, 2**63, ROUNDS, dtype=np.uint64)
    index = index.copy()
    outside = np.ones(index.shape, dtype=bool)
    while outside.any():  # Apply the network again until the image is below size: under 4 times on average.
        left, right = index[outside] >> half_bits, index[outside] & mask
        for key in keys:
            left, right = right, left ^ (_mix(right ^ key) & mask)
        index[outside] = (left << half_bits) | right
        outside = index >= size
    return index.astype(np.int64)


def _mix(x: np.ndarray) -> np.ndarray:
    """Return splitmix64's finaliser of x: every input bit changes about half of the output bits."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class TrainingOrder:
    """Batches of block ids for one rank; optimiser step s covers positions s G to (s + 1) G - 1 at every world size.

    Args:
        num_blocks: blocks in the training split.
        seed: of the order.
        batch_size: G, blocks per optimiser step over all ranks.
        micro_batch_size: blocks in one forward pass of one rank.
        rank, world_size: number of this process, and number of processes.
        steps: number of optimiser steps of the whole run.
    """

    def __init__(
        self, num_blocks: int, seed: int, batch_size: int, micro_batch_size: int, rank: int, world_size: int, steps: int
    ) -> None:
        self.num_blocks, self.seed, self.rank = num_blocks, seed, rank
        self.batch_size = micro_batch_size  # torch's name for it, which Lightning's DeepSpeed strategy reads
        self.blocks_per_batch = micro_batch_size * world_size
        self.batches = steps * batch_size // self.blocks_per_batch
        self.start = 0  # global position at which iteration begins

    def __len__(self) -> int:
        """Return the number of batches of the whole run, also after a resume: Lightning subtracts those done."""
        return self.batches

    def __iter__(self) -> Iterator[list[int]]:
        for batch in range(self.start // self.blocks_per_batch, self.batches):
            first = batch * self.blocks_per_batch + self.rank * self.batch_size
            positions = np.arange(first, first + self.batch_size)
            yield block_at(positions, self.num_blocks, self.seed).tolist()
