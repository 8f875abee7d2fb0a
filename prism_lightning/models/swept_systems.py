"""Non-negative least squares for many tokens at once, each over its own growing set of candidates.

Shape suffixes: n tokens, C candidates, k those that are kept, N new ones.
"""

from __future__ import annotations

import torch
from torch import Tensor

COLLINEAR = 1e-3  # a candidate with less of its squared length outside the chosen ones' span is left out


class SweptSystems:
    """Normal equations of n problems in the form that the sweep operator gives them.

    The tableau [n, C, C + 1] of a problem is its candidates' Gram matrix, with their products with the target as last
    column. After candidate j has been swept in, row j of that column is its coefficient. Rows that are not swept in
    have there the candidate's product with the residual, and on the diagonal its squared length outside the span of the
    chosen ones. Candidates have length 1.

    Args:
        problems: n.
        device: of the tensors.
    """

    def __init__(self, problems: int, device: torch.device) -> None:
        self.tableau = torch.zeros(problems, 0, 1, device=device)
        self.chosen_nC = torch.zeros(problems, 0, dtype=torch.bool, device=device)

    def extend(self, cross_nCN: Tensor, gram_nNN: Tensor, products_nN: Tensor) -> None:
        """Add new candidates, none of them chosen, after the present ones.

        Args:
            cross_nCN: products of the present candidates with the new ones.
            gram_nNN: products among the new ones.
            products_nN: their products with the target.
        """
        inner_nCC, last_nC1 = self.tableau[:, :, :-1], self.tableau[:, :, -1:]
        chosen_nC1 = self.chosen_nC[:, :, None].to(cross_nCN.dtype)
        chosen_cross_nCN = cross_nCN * chosen_nC1
        right_nCN = inner_nCC @ chosen_cross_nCN + (cross_nCN - chosen_cross_nCN)
        corner_nNN = gram_nNN - chosen_cross_nCN.mT @ right_nCN
        below_nNC = (right_nCN * (1 - 2 * chosen_nC1)).mT
        new_last_nN1 = products_nN[:, :, None] - chosen_cross_nCN.mT @ last_nC1
        upper = torch.cat([inner_nCC, right_nCN, last_nC1], 2)
        self.tableau = torch.cat([upper, torch.cat([below_nNC, corner_nNN, new_last_nN1], 2)], 1)
        self.chosen_nC = torch.cat([self.chosen_nC, torch.zeros_like(products_nN, dtype=torch.bool)], 1)

    def keep(self, where_nk: Tensor) -> None:
        """Leave out all candidates but those at some positions, all chosen ones among them."""
        last_n1 = torch.full_like(where_nk[:, :1], self.tableau.shape[1])
        columns_nk = torch.cat([where_nk, last_n1], 1)
        row_n11 = torch.arange(len(where_nk), device=where_nk.device)[:, None, None]
        self.tableau = self.tableau[row_n11, where_nk[:, :, None], columns_nk[:, None]]
        self.chosen_nC = self.chosen_nC.gather(1, where_nk)

    def coefficients(self) -> Tensor:
        """Return the coefficient [n, C] of every chosen candidate, 0 for the others."""
        return torch.where(self.chosen_nC, self.tableau[:, :, -1], 0.0).clamp_min(0)

    def add_best(self) -> None:
        """Add the candidate that lowers the squared error most; none where no coefficient would be positive."""
        free_nC = self.tableau.diagonal(dim1=1, dim2=2)
        gain_nC = self.tableau[:, :, -1].clamp_min(0).square() / free_nC.clamp_min(COLLINEAR)
        gain_nC.masked_fill_(self.chosen_nC | (free_nC < COLLINEAR), 0.0)
        gain_n, pivot_n = gain_nC.max(dim=1)
        self._toggle(gain_n > 0, pivot_n)

    def drop_negative(self, rounds: int) -> None:
        """Drop the most negative coefficient of every problem, until none is left or the rounds are over."""
        for _ in range(rounds):
            lowest_n, pivot_n = torch.where(self.chosen_nC, self.tableau[:, :, -1], 0.0).min(dim=1)
            if not (negative_n := lowest_n < 0).any():
                return
            self._toggle(negative_n, pivot_n)

    def _toggle(self, affected_n: Tensor, pivot_n: Tensor) -> None:
        """Sweep one candidate of each affected problem in, or out if it was chosen: the operator is its own inverse."""
        if affected_n.all():
            rows_m, pivot_m, tableau = torch.arange(len(pivot_n), device=pivot_n.device), pivot_n, self.tableau
        else:
            rows_m = affected_n.nonzero()[:, 0]
            pivot_m, tableau = pivot_n[rows_m], self.tableau[rows_m]
        number_m = torch.arange(len(rows_m), device=rows_m.device)
        row, column = tableau[number_m, pivot_m], tableau[number_m, :, pivot_m]
        diagonal_m1 = row.gather(1, pivot_m[:, None])
        row = row / diagonal_m1
        tableau.baddbmm_(column[:, :, None], row[:, None], alpha=-1)
        tableau[number_m, :, pivot_m] = -column / diagonal_m1
        tableau[number_m, pivot_m] = row
        tableau[number_m, pivot_m, pivot_m] = 1 / diagonal_m1[:, 0]
        if tableau is not self.tableau:
            self.tableau[rows_m] = tableau
        self.chosen_nC[rows_m, pivot_m] ^= True
