"""The prototypes of an index: the model's own, or finer ones fitted to its frozen decoder.

Un-suppressed logits do not depend on the prototypes, so either explains the same predictions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from prism_lightning.attribution.curvature.search import MovingSearch, PrototypeSearch
from prism_lightning.models.encoders import Encoder, PursuitEncoder
from prism_lightning.models.polishing import polish
from prism_lightning.models.prototypes import PrototypeLayer, mix, prototypes_from

LARGEST = 2**20


class Dictionary:
    """K prototypes, of which k are active per token.

    Args:
        prototypes_KD: P.
        active: k.
        exact: whether every token is compared with every prototype. For a few tokens this is cheaper than forming the
            cells of the two-level search, which takes seconds at 65,536 prototypes.
        encoder: of a model whose own prototypes are assigned by pursuit; None assigns by cosine.
    """

    def __init__(self, prototypes_KD: Tensor, active: int, exact: bool = False, encoder: Encoder | None = None) -> None:
        self.prototypes_KD, self.active, self.exact, self.encoder = prototypes_KD, active, exact, encoder
        self.unit_KD = F.normalize(prototypes_KD, dim=-1)

    @cached_property
    def _search(self) -> PrototypeSearch:
        return PrototypeSearch(self.unit_KD, self.active, self.exact)

    def assign(self, z_ND: Tensor) -> tuple[Tensor, Tensor]:
        """Return the active prototypes S_t [N, k] and the activations a_ti [N, k], max(cos, 0) or of the pursuit."""
        if self.encoder is not None:
            return self.encoder(z_ND)
        cosines_Nk, indices_Nk = self._search(F.normalize(z_ND, dim=-1))
        return indices_Nk, cosines_Nk.clamp_min(0)

    def mixture(self, indices_Nk: Tensor, activations_Nk: Tensor) -> Tensor:
        """Return the mixture zhat [N, D] of prototypes."""
        return mix(indices_Nk, activations_Nk, self.prototypes_KD)


def own_dictionary(
    prototypes_KD: Tensor, active: int, metric_DD: Tensor | None, head_VD: Tensor, exact: bool = False
) -> Dictionary:
    """Return a model's own prototypes, assigned as its encoder does: by pursuit where it has a metric."""
    encoder = None if metric_DD is None else PursuitEncoder(prototypes_KD, active, metric_DD, head_VD.detach())
    return Dictionary(prototypes_KD, active, exact, encoder)


def default_size(tokens: int, tokens_per_prototype: int) -> int:
    """Return the default K: the largest power of two up to tokens / tokens_per_prototype.

    Posting lists then keep their length as the corpus grows.

    Capped, since the dictionary is held in memory while an index is built: 12 bytes x K x D, and about as much again
    for each of its gradient and moments, and 16 for the sampled hidden states, while it is fitted.
    """
    return min(LARGEST, 2 ** max(4, int(math.log2(max(1, tokens / tokens_per_prototype)))))


def fitted_dictionary(
    z_ND: Tensor, size: int, active: int, steps: int, seed: int, report: Callable[[int], object] = lambda step: None
) -> Dictionary:
    """Return a dictionary of prototypes fitted to hidden states.

    Args:
        z_ND: hidden states of training tokens.
        size, active: K and k.
        steps: number of `polish` steps; 0 keeps hidden states drawn at random, rescaled.
        seed: of the draw and of the batches.
        report: called with the number of finished steps.

    Raises:
        ValueError: fewer hidden states than prototypes.
    """
    layer = PrototypeLayer(size, z_ND.shape[1], active).to(z_ND.device)
    generator = torch.Generator().manual_seed(seed)
    layer.weight.data.copy_(prototypes_from(z_ND, size, active, generator))
    layer.search = MovingSearch()
    for step, _ in enumerate(polish(layer, z_ND, steps, learning_rate=1e-2, seed=seed), 1):
        report(step)
    return Dictionary(layer.weight.detach(), active)
