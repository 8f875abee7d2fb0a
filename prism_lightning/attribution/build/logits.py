"""Building shards of an index in the space of logits (`index/logit_influence.py`).

Shapes: N tokens of a batch, n of them with a target, k active, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from prism_lightning.attribution.build.base import ShardBuilder, array, rows_of
from prism_lightning.attribution.curvature.records import target_error_probability
from prism_lightning.attribution.index.shards import LogitShard, search, total_of
from prism_lightning.attribution.settings import IndexSettings
from prism_lightning.models import PrismForCausalLM
from prism_lightning.models.blocks import BlockStates

PARTS = 64  # parts of the prototypes; the lists of one part at a time are in memory while they are counted


class LogitShardBuilder(ShardBuilder[LogitShard]):
    """Builds shards of posting lists by prototype and target."""

    shard_type = LogitShard

    @staticmethod
    def fit_basis(model: PrismForCausalLM, settings: IndexSettings, sample_ND: Tensor) -> dict[str, Tensor]:
        return {}

    def begin(self) -> None:
        self.parts: list[tuple[np.ndarray, ...]] = []

    def add(self, states: BlockStates, rows: int) -> None:
        if not len(states.z_nD):  # all targets of the batch are masked
            types, active = (np.int32, np.float32, np.float32, np.int32), self.dictionary.active
            shapes = ((rows, active), (rows, active), (rows,), (rows,))
            self.parts.append(tuple(np.zeros(shape, kind) for shape, kind in zip(shapes, types, strict=True)))
            return
        indices_nk, activations_nk = self.dictionary.assign(states.z_nD)
        target_errors_n = target_error_probability(self.head_VD, states.z_nD, states.targets_n)
        tensors = (indices_nk.int(), activations_nk, target_errors_n, states.targets_n.int())
        self.parts.append(tuple(rows_of(array(tensor), states, rows) for tensor in tensors))

    def finish(self) -> LogitShard:
        indices_Nk, activations_Nk, target_errors_N, targets_N = map(np.concatenate, zip(*self.parts, strict=True))
        self.parts = []
        sizes = (len(self.head_VD), len(self.dictionary.unit_KD))
        return LogitShard.of_tokens(indices_Nk, activations_Nk, target_errors_N, targets_N, *sizes)

    def curvature(self, shards: Sequence[LogitShard], targets: int) -> dict[str, np.ndarray]:
        """Return `damping`, its share of the mean of L over all lists with entries, and the sums A and P."""
        total = sum(float(shard.curvature.sum(dtype=np.float64)) for shard in shards)
        vocabulary, size = len(self.head_VD), len(self.dictionary.unit_KD)
        count, edges = 0, np.linspace(0, size, PARTS + 1).astype(np.int64) * vocabulary
        ends = [search(shard.lists, edges).tolist() for shard in shards]
        for part in range(PARTS):
            lists = [s.lists[at[part] : at[part + 1]] for s, at in zip(shards, ends, strict=True)]
            count += len(np.unique(np.concatenate(lists)))
        return {
            "damping": np.array([self.settings.damping_share * total / max(count, 1)]),
            "activation": total_of([shard.sum_activation for shard in shards]),
            "surprise": total_of([shard.sum_target_error for shard in shards]),
        }
