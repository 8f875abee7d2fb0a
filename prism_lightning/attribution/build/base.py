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
from prism_lightning.models.blocks import BlockStates

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
    def add(self, states: BlockStates, rows: int) -> None:
        """Add the next batch of the shard's tokens.

        Args:
            states: of the tokens whose targets are not masked.
            rows: number N of all tokens of the batch. The shard has a row for each, so that rows locate documents.
        """

    @abstractmethod
    def finish(self) -> S:
        """Return the shard."""

    @abstractmethod
    def curvature(self, shards: Sequence[S], targets: int) -> dict[str, np.ndarray]:
        """Return what queries are divided by; `targets` is the number of tokens whose targets are not masked.

        It is summed over all shards in order, so that it does not depend on which process built which shard.
        """


def rows_of(kept: np.ndarray, states: BlockStates, rows: int) -> np.ndarray:
    """Return an array of a batch's tokens with a row for each; rows of masked targets are zeros.

    Args:
        kept: [n, ...] rows of the tokens whose targets are not masked.
        states: of these tokens.
        rows: number of all tokens of the batch.
    """
    if states.kept_n is None:
        return kept
    every = np.zeros((rows, *kept.shape[1:]), kept.dtype)
    every[array(states.kept_n)] = kept
    return every


def array(tensor: Tensor) -> np.ndarray:
    """Return a tensor of any device as an array."""
    return tensor.detach().cpu().numpy()
