"""What both kinds of index do in a build; `hidden_shards` and `logit_shards` hold what each keeps of a training token.

Shapes: N tokens of a batch, D hidden size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
from torch import Tensor

from prism_lightning.attribution.curvature.dictionary import Dictionary
from prism_lightning.attribution.settings import IndexSettings
from prism_lightning.models import PrismForCausalLM


class Shards(ABC):
    """Turns hidden states into the tensors of a shard, batch by batch; afterwards `begin` starts the next.

    Args:
        model: whose tokens are indexed.
        settings: of the index.
        dictionary: the prototypes.
        frame: what `frame` gave, as it was stored.
    """

    def __init__(
        self, model: PrismForCausalLM, settings: IndexSettings, dictionary: Dictionary, frame: dict[str, Tensor]
    ) -> None:
        self.settings, self.dictionary, self.stored_frame = settings, dictionary, frame
        self.head_VD = model.lm_head.weight.detach()

    @staticmethod
    @abstractmethod
    def frame(model: PrismForCausalLM, settings: IndexSettings, sample_ND: Tensor) -> dict[str, Tensor]:
        """What is fixed before the pass, from a sample of hidden states."""

    @abstractmethod
    def begin(self) -> None:
        """Start a shard."""

    @abstractmethod
    def add(self, z_ND: Tensor, targets_N: Tensor) -> None:
        """A batch of the shard's tokens, in order."""

    @abstractmethod
    def tensors(self) -> dict[str, np.ndarray]:
        """The finished shard."""

    @abstractmethod
    def curvature(self, shards: list[dict[str, np.ndarray]], tokens: int) -> dict[str, np.ndarray]:
        """What queries are divided by, from all shards in order, so that it does not depend on who built which."""


def array(tensor: Tensor) -> np.ndarray:
    """A tensor of any device."""
    return tensor.detach().cpu().numpy()
