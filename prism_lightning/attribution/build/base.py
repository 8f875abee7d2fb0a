"""The interface of shard builders; `build/hidden.py` and `build/logits.py` implement it.

Shapes: N tokens of a batch, D hidden size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Generic, TypeVar

import numpy as np
from torch import Tensor

from prism_lightning.attribution.curvature.dictionary import Dictionary
from prism_lightning.attribution.index.shards import Shard
from prism_lightning.attribution.settings import IndexSettings
from prism_lightning.models import PrismForCausalLM

S = TypeVar("S", bound=Shard)


class ShardBuilder(ABC, Generic[S]):
    """Builds shards from hidden states, batch by batch: `begin`, `add` for each batch, `finish`.

    `shard_type` is the class of the shards.

    Args:
        model: the model that is indexed.
        settings: of the index.
        dictionary: the prototypes.
        basis_tensors: the result of `fit_basis`, as it was stored.
    """

    shard_type: type[S]

    def __init__(
        self, model: PrismForCausalLM, settings: IndexSettings, dictionary: Dictionary, basis_tensors: dict[str, Tensor]
    ) -> None:
        self.settings, self.dictionary, self.basis_tensors = settings, dictionary, basis_tensors
        self.head_VD = model.lm_head.weight.detach()

    @staticmethod
    @abstractmethod
    def fit_basis(model: PrismForCausalLM, settings: IndexSettings, sample_ND: Tensor) -> dict[str, Tensor]:
        """Return the tensors beside the dictionary that are fixed before the pass, from a sample of hidden states."""

    @abstractmethod
    def begin(self) -> None:
        """Start a shard."""

    @abstractmethod
    def add(self, z_ND: Tensor, targets_N: Tensor) -> None:
        """Add the next batch of the shard's tokens."""

    @abstractmethod
    def finish(self) -> S:
        """Return the shard."""

    @abstractmethod
    def curvature(self, shards: Sequence[S], tokens: int) -> dict[str, np.ndarray]:
        """Return what queries are divided by.

        It is summed over all shards in order, so that it does not depend on which process built which shard.
        """


def array(tensor: Tensor) -> np.ndarray:
    """Return a tensor of any device as an array."""
    return tensor.detach().cpu().numpy()
