"""The order of blocks is a permutation in each epoch, and the same at every world size."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prism_lightning.data.order import TrainingOrder, block_at


@given(st.integers(1, 3000), st.integers(0, 5), st.integers(0, 3))
def test_every_epoch_visits_every_block_once(num_blocks, seed, epoch):
    positions = np.arange(num_blocks) + epoch * num_blocks
    assert sorted(block_at(positions, num_blocks, seed)) == list(range(num_blocks))


def test_epochs_and_seeds_differ_and_look_shuffled():
    first, second, other = (
        block_at(np.arange(1000), 1000, 0),
        block_at(np.arange(1000, 2000), 1000, 0),
        block_at(np.arange(1000), 1000, 1),
    )
    for a, b in ((first, second), (first, other), (first, np.arange(1000))):
        assert abs(np.corrcoef(a, b)[0, 1]) < 0.15


def test_any_position_can_be_asked_alone():
    together = block_at(np.arange(5000), 777, 3)
    assert [int(block_at(np.array([p]), 777, 3)[0]) for p in (0, 776, 777, 4999)] == together[
        [0, 776, 777, 4999]
    ].tolist()


def steps(world_size, micro, start_step=0):
    """The blocks of each optimiser step, gathered over ranks and accumulation."""
    orders = [TrainingOrder(100, 0, 12, micro, rank, world_size, steps=9) for rank in range(world_size)]
    for order in orders:
        order.start = start_step * 12
    per_rank = [list(order) for order in orders]
    accumulation = 12 // (micro * world_size)
    assert all(len(order) == 9 * accumulation for order in orders)
    return [
        [b for batch in range(s * accumulation, (s + 1) * accumulation) for rank in per_rank for b in rank[batch]]
        for s in range(9 - start_step)
    ]


@pytest.mark.parametrize(("world_size", "micro"), [(1, 4), (2, 6), (2, 3), (3, 4), (4, 1)])
def test_a_step_holds_the_same_blocks_at_any_world_size(world_size, micro):
    assert steps(world_size, micro) == steps(1, 12)


def test_resuming_elsewhere_goes_on_with_the_next_blocks():
    assert steps(2, 3, start_step=4) == steps(1, 12)[4:]
