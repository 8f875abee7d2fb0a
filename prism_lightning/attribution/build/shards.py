"""What both kinds of index do in a build; `hidden_shards` and `logit_shards` hold what each keeps of a training token.

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
    """Turns hidden states into a shard, batch by batch; afterwards `begin` starts the next.

    `shard_type` is the class of its shards.

    Args:
        model: whose tokens are indexed.
        settings: of the index.
        dictionary: the prototypes.
        frame: what `frame` gave, as it was stored.
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
        """What is fixed before the pass, from a sample of hidden states."""

    @abstractmethod
    def begin(self) -> None:
        """Start a shard."""

    @abstractmethod
    def add(self, z_ND: Tensor, targets_N: Tensor) -> None:
        """A batch of the shard's tokens, in order."""

    @abstractmethod
    def finish(self) -> S:
        """Return the shard."""

    @abstractmethod
    def curvature(self, shards: Sequence[S], tokens: int) -> dict[str, np.ndarray]:
        """Return what queries are divided by.

        It is summed over all shards in order, so that it does not depend on which process built which shard.
        """


def array(tensor: Tensor) -> np.ndarray:
    """A tensor of any device."""
    return tensor.detach().cpu().numpy()
