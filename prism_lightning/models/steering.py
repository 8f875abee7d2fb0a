"""Scaled prototype terms (method, section 5): logits'_v = W_v (z + sum_i (f_iv - 1) a_i p_i).

Shape suffixes: N tokens, D hidden size, V vocabulary, K prototypes, k active prototypes per token, Y tokens whose
logits are scaled.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from prism_lightning.common.errors import UserError
from prism_lightning.models.prototypes import PrototypeLayer, mix
from prism_lightning.models.pursuit import Encoding


class Scaling(NamedTuple):
    """Factors on the terms of some prototypes; 0 removes a term, 1 leaves it.

    Attributes:
        factors: f_i by prototype i.
        tokens: ids of the tokens whose logits are scaled; None scales all logits.
    """

    factors: dict[int, float]
    tokens: tuple[int, ...] | None = None


def merged(scalings: list[Scaling]) -> list[Scaling]:
    """Return equivalent scalings: at most one of all tokens, and others whose sets of tokens are disjoint.

    Factors of the same prototype and token are multiplied, so that a removed term stays removed.
    """
    partial = [s for s in scalings if s.tokens is not None]
    groups: dict[tuple[int, ...], list[int]] = {}
    for token in sorted({token for s in partial for token in s.tokens or ()}):
        groups.setdefault(tuple(n for n, s in enumerate(partial) if token in (s.tokens or ())), []).append(token)
    result = [Scaling(_product([s.factors for s in scalings if s.tokens is None]))]
    result += [Scaling(_product([partial[n].factors for n in group]), tuple(t)) for group, t in groups.items()]
    return [scaling for scaling in result if scaling.factors]


def _product(parts: list[dict[int, float]]) -> dict[int, float]:
    prototypes = sorted({prototype for factors in parts for prototype in factors})
    products = {p: math.prod(factors.get(p, 1.0) for factors in parts) for p in prototypes}
    return {prototype: float(factor) for prototype, factor in products.items() if factor != 1}


def check(scalings: list[Scaling], prototypes: int, vocabulary: int) -> None:
    """Raise UserError for a dense model, an unknown prototype or token, or a factor that is not finite."""
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
    """Logits under scalings. What does not depend on the hidden state is computed once.

    Args:
        layer: the model's prototypes.
        scalings: as returned by `merged`.
        head_VD: W.
    """

    def __init__(self, layer: PrototypeLayer, scalings: list[Scaling], head_VD: Tensor) -> None:
        self.active, self.weight_KD = layer.active, layer.weight.detach()
        self.encoder = layer.encoder(head_VD.detach())
        self.common_factors_K = torch.ones(len(self.weight_KD), device=self.weight_KD.device)
        self.parts: list[tuple[Tensor, Tensor]] = []  # token ids [Y] and their factors [K]
        for factors, tokens in sorted(scalings, key=lambda scaling: scaling.tokens is not None):
            factors_K = torch.ones_like(self.common_factors_K)
            factors_K[list(factors)] = torch.tensor(list(factors.values()), device=factors_K.device)
            if tokens is None:
                self.common_factors_K = factors_K
            else:
                self.parts.append((torch.tensor(tokens, device=factors_K.device), self.common_factors_K * factors_K))
        self.changes = [self.common_factors_K - 1, *(factors_K - self.common_factors_K for _, factors_K in self.parts)]
        self.scaled_K = torch.stack(self.changes).any(0)

    def assign(self, z_ND: Tensor) -> Encoding:
        """Return S_t and a_ti, both [N, k], as `PrototypeLayer` assigns them (method, section 2)."""
        return self.encoder(z_ND)

    def factors(self, indices_Nk: Tensor, tokens_N: Tensor) -> Tensor:
        """Return f_iv [N, k] of the prototypes `indices_Nk` in the logits of the tokens `tokens_N`."""
        factors_Nk = self.common_factors_K[indices_Nk]
        for tokens_Y, factors_K in self.parts:
            scaled_N = torch.isin(tokens_N, tokens_Y)
            factors_Nk[scaled_N] = factors_K[indices_Nk[scaled_N]]
        return factors_Nk

    def logits(self, z: Tensor, head: nn.Linear) -> Tensor:
        """Return logits [..., V] of hidden states z [..., D]: W z, bit for bit, where no scaled prototype is active."""
        changes = self._changes_of(z)
        if not changes:
            return head(z)
        logits = head(z + changes[0])
        for (tokens_Y, _), change in zip(self.parts, changes[1:], strict=True):
            logits = logits.index_add(-1, tokens_Y, (change @ head.weight[tokens_Y].T).to(logits.dtype))
        return logits

    @torch.no_grad()  # gradients reach z as if nothing were scaled
    def _changes_of(self, z: Tensor) -> list[Tensor]:
        """Return what each change of factors adds to z; an empty list where no scaled prototype is active."""
        z_ND = z.reshape(-1, z.shape[-1])
        indices_Nk, activations_Nk = self.encoder(z_ND)
        if not self.scaled_K[indices_Nk].any():
            return []
        terms = (mix(indices_Nk, activations_Nk * change_K[indices_Nk], self.weight_KD) for change_K in self.changes)
        return [terms_ND.view_as(z).to(z.dtype) for terms_ND in terms]
