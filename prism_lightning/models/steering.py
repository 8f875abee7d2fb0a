"""Scaled prototype terms, an intervention's effect (method, section 5): logits'_v = W_v (z + sum_i (f_iv - 1) a_i p_i).

Shapes: N tokens, D hidden size, V vocabulary, K prototypes, k active per token, Y tokens whose logits are meant.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prism_lightning.common.errors import UserError
from prism_lightning.models.prototypes import PrototypeLayer, mix


class Scaling(NamedTuple):
    """Factors on the terms of some prototypes; 0 removes a term, 1 leaves it.

    Attributes:
        factors: f by prototype.
        tokens: whose logits are meant; None: all.
    """

    factors: dict[int, float]
    tokens: tuple[int, ...] | None = None


def merged(scalings: list[Scaling]) -> list[Scaling]:
    """The same as few scalings: at most one of all tokens, the others of tokens that are in no other.

    One after the other they multiply, so that what is removed stays removed.
    """
    some = [s for s in scalings if s.tokens is not None]
    groups: dict[tuple[int, ...], list[int]] = {}
    for token in sorted({token for s in some for token in s.tokens or ()}):
        groups.setdefault(tuple(n for n, s in enumerate(some) if token in (s.tokens or ())), []).append(token)
    found = [Scaling(_product([s.factors for s in scalings if s.tokens is None]))]
    found += [Scaling(_product([some[n].factors for n in group]), tuple(t)) for group, t in groups.items()]
    return [scaling for scaling in found if scaling.factors]


def _product(parts: list[dict[int, float]]) -> dict[int, float]:
    prototypes = sorted({prototype for factors in parts for prototype in factors})
    products = {p: math.prod(factors.get(p, 1.0) for factors in parts) for p in prototypes}
    return {prototype: float(factor) for prototype, factor in products.items() if factor != 1}


def check(scalings: list[Scaling], prototypes: int, vocabulary: int) -> None:
    """Raises UserError for a dense model, a prototype or token there is not, or a factor that is no finite number."""
    if scalings and not prototypes:
        raise UserError("this model is dense: it has no prototypes to scale")
    for factors, tokens in scalings:
        for prototype, factor in factors.items():
            if not 0 <= prototype < prototypes:
                raise UserError(f"prototype {prototype} is not in the model: its prototypes are 0 to {prototypes - 1}")
            if not math.isfinite(factor):
                raise UserError(f"prototype {prototype} has the factor {factor}: give a finite number; 0 removes it")
        for token in tokens or ():
            if not 0 <= token < vocabulary:
                raise UserError(f"token {token} is not in the vocabulary: its tokens are 0 to {vocabulary - 1}")


class ScaledTerms:
    """Logits under scalings; all that does not depend on the hidden state is computed once.

    Args:
        layer: the model's prototypes.
        scalings: as `merged` gives them.
    """

    def __init__(self, layer: PrototypeLayer, scalings: list[Scaling]) -> None:
        self.active, self.weight_KD = layer.active, layer.weight.detach()
        self.unit_KD = F.normalize(self.weight_KD.float(), dim=-1)
        self.whole_K = torch.ones(len(self.weight_KD), device=self.weight_KD.device)
        self.parts: list[tuple[Tensor, Tensor]] = []  # tokens [Y] and their factors [K]
        for factors, tokens in sorted(scalings, key=lambda scaling: scaling.tokens is not None):
            factors_K = torch.ones_like(self.whole_K)
            factors_K[list(factors)] = torch.tensor(list(factors.values()), device=factors_K.device)
            if tokens is None:
                self.whole_K = factors_K
            else:
                self.parts.append((torch.tensor(tokens, device=factors_K.device), self.whole_K * factors_K))
        self.changes = [self.whole_K - 1, *(factors_K - self.whole_K for _, factors_K in self.parts)]
        self.scaled_K = torch.stack(self.changes).any(0)

    def assign(self, z_ND: Tensor) -> tuple[Tensor, Tensor]:
        """S_t and a_ti [N, k], as `PrototypeLayer` finds them."""
        projections_Nk, indices_Nk = self._nearest(z_ND)
        return indices_Nk, self._activations(z_ND, projections_Nk)

    def _nearest(self, z_ND: Tensor) -> tuple[Tensor, Tensor]:
        return F.linear(z_ND.float(), self.unit_KD).topk(self.active)  # |z_t| does not change the order

    def _activations(self, z_ND: Tensor, projections_Nk: Tensor) -> Tensor:
        return projections_Nk.clamp_min(0) / z_ND.float().norm(dim=-1, keepdim=True).clamp_min(1e-12)

    def factors(self, indices_Nk: Tensor, tokens_N: Tensor) -> Tensor:
        """f_iv [N, k] of prototypes in the logits of tokens."""
        factors_Nk = self.whole_K[indices_Nk]
        for tokens_Y, factors_K in self.parts:
            meant_N = torch.isin(tokens_N, tokens_Y)
            factors_Nk[meant_N] = factors_K[indices_Nk[meant_N]]
        return factors_Nk

    def logits(self, z: Tensor, head: nn.Linear) -> Tensor:
        """[..., V]; where no scaled prototype is active they are W z, bit for bit."""
        moved = self._moved(z)
        if not moved:
            return head(z)
        logits = head(z + moved[0])
        for (tokens_Y, _), more in zip(self.parts, moved[1:], strict=True):
            logits = logits.index_add(-1, tokens_Y, (more @ head.weight[tokens_Y].T).to(logits.dtype))
        return logits

    @torch.no_grad()  # gradients reach z as if nothing were scaled
    def _moved(self, z: Tensor) -> list[Tensor]:
        """What each change of factors adds to z; nothing where no scaled prototype is active, as most often it is."""
        z_ND = z.reshape(-1, z.shape[-1])
        projections_Nk, indices_Nk = self._nearest(z_ND)
        if not self.scaled_K[indices_Nk].any():
            return []
        activations_Nk = self._activations(z_ND, projections_Nk)
        terms = (mix(indices_Nk, activations_Nk * change_K[indices_Nk], self.weight_KD) for change_K in self.changes)
        return [terms_ND.view_as(z).to(z.dtype) for terms_ND in terms]
