"""Non-negative matching pursuit: prototypes chosen one by one, with coefficients by non-negative least squares.

Each step takes the candidate that lowers |z - sum_i a_i p_i|^2 most, then solves for the coefficients of all chosen
prototypes; one that turns negative is dropped. Prototype 0 is chosen first: it stands for what all hidden states share,
half of their squared length. A search over all K gives the candidates of the next few steps, those of largest product
with the residual. Shape suffixes: N tokens, C of a chunk, D hidden size, K prototypes, k active, M candidates.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

STEPS_PER_SEARCH = 4
CANDIDATES = 16  # of each search
CHUNK_BYTES = 32 * 2**20  # of the candidates' vectors [C, M, D]
COLLINEAR = 1e-3  # a candidate with less of its squared length outside the chosen ones' span is left out


class Encoding(NamedTuple):
    """The active prototypes of N tokens and their coefficients, largest first; 0 where fewer than k are active."""

    indices_Nk: Tensor
    activations_Nk: Tensor


@torch.no_grad()
def pursue(z_ND: Tensor, unit_KD: Tensor, active: int) -> Encoding:
    """Return at most `active` prototypes of every token, and coefficients >= 0 of their unit vectors.

    Args:
        z_ND: hidden states, fp32.
        unit_KD: prototypes with unit rows, in the same space.
        active: k.
    """
    width = min(len(unit_KD), CANDIDATES) + active
    rows = max(1, CHUNK_BYTES // (4 * width * unit_KD.shape[1]))
    parts = [_pursue_chunk(z_CD, unit_KD, active) for z_CD in z_ND.split(rows)]
    return Encoding(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


def _pursue_chunk(z_CD: Tensor, unit_KD: Tensor, active: int) -> Encoding:
    coefficients_Ck = (z_CD @ unit_KD[0]).clamp_min(0)[:, None]
    indices_Ck = torch.zeros_like(coefficients_Ck, dtype=torch.long)
    residual_CD = z_CD - coefficients_Ck * unit_KD[0]
    for first in range(1, active, STEPS_PER_SEARCH):
        steps = min(STEPS_PER_SEARCH, active - first)
        products_CK = (residual_CD @ unit_KD.T).scatter_(1, indices_Ck, -torch.inf)
        count = min(CANDIDATES, len(unit_KD) - indices_Ck.shape[1])
        candidates_CM = torch.cat([indices_Ck, products_CK.topk(count, dim=1, sorted=False).indices], 1)
        vectors_CMD = unit_KD[candidates_CM]
        problem = _LeastSquares(vectors_CMD @ vectors_CMD.mT, (vectors_CMD @ z_CD[:, :, None])[:, :, 0])
        problem.start_with(coefficients_Ck > 0)
        for _ in range(steps):
            problem.add_best()
            problem.drop_negative(active)
        coefficients_CM = problem.coefficients()
        residual_CD = z_CD - (coefficients_CM[:, None] @ vectors_CMD)[:, 0]
        coefficients_Ck, where_Ck = coefficients_CM.topk(min(first + steps, coefficients_CM.shape[1]), dim=1)
        indices_Ck = candidates_CM.gather(1, where_Ck)
    return Encoding(indices_Ck, coefficients_Ck)


class _LeastSquares:
    """Least squares for every token over a growing set of its candidates, by the sweep operator.

    The tableau of a token is its candidates' Gram matrix with their products with z as last column. After candidate j
    has been swept in, row j of that column is its coefficient. Rows that are not swept in have there the candidate's
    product with the residual, and on the diagonal its squared length outside the span of the chosen ones.
    """

    def __init__(self, gram_CMM: Tensor, products_CM: Tensor) -> None:
        self.tableau = torch.cat([gram_CMM, products_CM[:, :, None]], dim=2)
        self.chosen_CM = torch.zeros_like(products_CM, dtype=torch.bool)

    def _column(self) -> Tensor:
        return self.tableau[:, :, -1]

    def coefficients(self) -> Tensor:
        """Return the coefficient [C, M] of every chosen candidate, 0 for the others."""
        return torch.where(self.chosen_CM, self._column(), 0.0).clamp_min(0)

    def start_with(self, chosen_Ck: Tensor) -> None:
        """Add those of the first k candidates that are marked."""
        for number, chosen_C in enumerate(chosen_Ck.unbind(1)):
            self._toggle(chosen_C, torch.full_like(chosen_C, number, dtype=torch.long))

    def add_best(self) -> None:
        """Add the candidate that lowers the squared error most; none where no coefficient would be positive."""
        free_CM = self.tableau.diagonal(dim1=1, dim2=2)
        gain_CM = self._column().clamp_min(0).square() / free_CM.clamp_min(COLLINEAR)
        gain_CM = torch.where(self.chosen_CM | (free_CM < COLLINEAR), 0.0, gain_CM)
        gain_C, pivot_C = gain_CM.max(dim=1)
        self._toggle(gain_C > 0, pivot_C)

    def drop_negative(self, rounds: int) -> None:
        """Drop the most negative coefficient of every token, until none is left or the rounds are over."""
        for _ in range(rounds):
            lowest_C, pivot_C = torch.where(self.chosen_CM, self._column(), 0.0).min(dim=1)
            if not (negative_C := lowest_C < 0).any():
                return
            self._toggle(negative_C, pivot_C)

    def _toggle(self, affected_C: Tensor, pivot_C: Tensor) -> None:
        """Sweep one candidate of each affected token in, or out if it was chosen: the operator is its own inverse."""
        if affected_C.all():
            rows_c, pivot_c, tableau = torch.arange(len(pivot_C), device=pivot_C.device), pivot_C, self.tableau
        else:
            rows_c = affected_C.nonzero()[:, 0]
            pivot_c, tableau = pivot_C[rows_c], self.tableau[rows_c]
        number_c = torch.arange(len(rows_c), device=rows_c.device)
        row, column = tableau[number_c, pivot_c], tableau[number_c, :, pivot_c]
        diagonal_c1 = row.gather(1, pivot_c[:, None])
        row = row / diagonal_c1
        tableau.baddbmm_(column[:, :, None], row[:, None], alpha=-1)
        tableau[number_c, :, pivot_c] = -column / diagonal_c1
        tableau[number_c, pivot_c] = row
        tableau[number_c, pivot_c, pivot_c] = 1 / diagonal_c1[:, 0]
        if tableau is not self.tableau:
            self.tableau[rows_c] = tableau
        self.chosen_CM[rows_c, pivot_c] ^= True
