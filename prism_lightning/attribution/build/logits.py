"""Building the index in the space of logits: see `logit_index` for what it keeps.

Shapes: N tokens of a batch, k active, D hidden size, V vocabulary.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from prism_lightning.attribution.build.shards import Shards, array
from prism_lightning.attribution.curvature.records import surprise
from prism_lightning.attribution.index.logits import search
from prism_lightning.attribution.index.postings import target_lists
from prism_lightning.attribution.settings import IndexSettings
from prism_lightning.models import PrismForCausalLM

SUMS = ("activation", "surprise")
PARTS = 64  # of the prototypes: lists of one part at a time are held in memory to be counted


class LogitShards(Shards):
    """See `Shards`."""

    @staticmethod
    def frame(model: PrismForCausalLM, settings: IndexSettings, sample_ND: Tensor) -> dict[str, Tensor]:
        return {}

    def begin(self) -> None:
        self.parts: list[tuple[np.ndarray, ...]] = []

    def add(self, z_ND: Tensor, targets_N: Tensor) -> None:
        indices_Nk, activations_Nk = self.dictionary.assign(z_ND)
        surprise_N = surprise(self.head_VD, z_ND, targets_N)
        narrow = (indices_Nk.int(), activations_Nk, surprise_N, targets_N.int())
        self.parts.append(tuple(array(tensor) for tensor in narrow))

    def tensors(self) -> dict[str, np.ndarray]:
        indices_Nk, activations_Nk, surprise_N, targets_N = map(np.concatenate, zip(*self.parts, strict=True))
        self.parts = []
        sizes = (len(self.head_VD), len(self.dictionary.unit_KD))
        return target_lists(indices_Nk, activations_Nk, surprise_N, targets_N, *sizes)

    def curvature(self, shards: list[dict[str, np.ndarray]], tokens: int) -> dict[str, np.ndarray]:
        """`damping`, its share of the mean of L over the lists there are, and the sums A and P."""
        total = sum(float(shard["curvature"].sum(dtype=np.float64)) for shard in shards)
        vocabulary, size = len(self.head_VD), len(self.dictionary.unit_KD)
        count, edges = 0, np.linspace(0, size, PARTS + 1).astype(np.int64) * vocabulary
        ends = [search(shard["lists"], edges).tolist() for shard in shards]
        for part in range(PARTS):
            lists = [s["lists"][at[part] : at[part + 1]] for s, at in zip(shards, ends, strict=True)]
            count += len(np.unique(np.concatenate(lists)))
        sums = {name: np.zeros(shards[0][f"sum_{name}"].shape) for name in SUMS}
        for shard in shards:
            for name in SUMS:
                sums[name] += shard[f"sum_{name}"]
        return {"damping": np.array([self.settings.damping_share * total / max(count, 1)])} | sums
