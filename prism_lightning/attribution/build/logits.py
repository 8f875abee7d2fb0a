"""Building shards of an index in the space of logits (`index/logit_influence.py`).

Shapes: N tokens of a batch, k active, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from prism_lightning.attribution.build.base import ShardBuilder, array
from prism_lightning.attribution.curvature.records import target_error_probability
from prism_lightning.attribution.index.shards import LogitShard, search, total_of
from prism_lightning.attribution.settings import IndexSettings
from prism_lightning.models import PrismForCausalLM

PARTS = 64  # parts of the prototypes; the lists of one part at a time are in memory while they are counted


class LogitShardBuilder(ShardBuilder[LogitShard]):
    """Builds shards of posting lists by prototype and target."""

    shard_type = LogitShard

    @staticmethod
    def fit_basis(model: PrismForCausalLM, settings: IndexSettings, sample_ND: Tensor) -> dict[str, Tensor]:
        return {}

    def begin(self) -> None:
        self.parts: list[tuple[np.ndarray, ...]] = []

    def add(self, z_ND: Tensor, targets_N: Tensor) -> None:
        indices_Nk, activations_Nk = self.dictionary.assign(z_ND)
        target_errors_N = target_error_probability(self.head_VD, z_ND, targets_N)
        tensors = (indices_Nk.int(), activations_Nk, target_errors_N, targets_N.int())
        self.parts.append(tuple(array(tensor) for tensor in tensors))

    def finish(self) -> LogitShard:
        indices_Nk, activations_Nk, target_errors_N, targets_N = map(np.concatenate, zip(*self.parts, strict=True))
        self.parts = []
        sizes = (len(self.head_VD), len(self.dictionary.unit_KD))
        return LogitShard.of_tokens(indices_Nk, activations_Nk, target_errors_N, targets_N, *sizes)

    def curvature(self, shards: Sequence[LogitShard], tokens: int) -> dict[str, np.ndarray]:
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
