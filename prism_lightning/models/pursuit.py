"""Non-negative matching pursuit in a metric of each token's own prediction.

Prototypes are chosen one by one, with coefficients by non-negative least squares. The error is measured by what it
changes in the logits: to second order, KL(softmax(W z) || softmax(W zhat)) = r^T F_t r / 2, with r = z - zhat and
F_t = W^T (diag(pi_t) - pi_t pi_t^T) W. The likeliest tokens give F_t up to their total probability; for the rest stands
F, the mean over tokens:

    M_t = (1 - sum_c pi_c + FLOOR) F + sum_c pi_c (W_c - m)(W_c - m)^T,    m their mean under pi.

Prototype 0 is chosen first: it stands for what all hidden states share, half of their squared length. A search over all
K gives the candidates of the next few steps, those of largest product with M_t r. Shape suffixes: N tokens, n of a
chunk, D hidden size, K prototypes, k active, C candidates, c likeliest tokens, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

STEPS_PER_SEARCH = 4
CANDIDATES = 16  # of each search
LIKELIEST = 32  # c; on SmolLM2-135M, 4,096 unfitted prototypes, k 16: recovered 0.745 with F alone, 0.880 with 32
FLOOR = 0.5  # with 0.1, recovered 0.875
CHUNK_BYTES = 32 * 2**20  # of the vectors that are gathered at a time, and of the products with all prototypes
COLLINEAR = 1e-3  # a candidate with less of its squared length outside the chosen ones' span is left out


class Encoding(NamedTuple):
    """The active prototypes of N tokens and their activations, largest first; 0 where fewer than k are active."""

    indices_Nk: Tensor
    activations_Nk: Tensor


class Likeliest(NamedTuple):
    """The tokens that the model finds likeliest after N tokens, and their probabilities."""

    tokens_Nc: Tensor
    probabilities_Nc: Tensor


class PursuitTables(NamedTuple):
    """What a pursuit needs besides the hidden states, computed once for the present weights."""

    head_VD: Tensor  # W
    mean_DD: Tensor | None  # F; None stands for the identity
    prototypes_KD: Tensor  # P
    weighted_KD: Tensor  # P F
    length_K: Tensor  # of the prototypes in F

    @classmethod
    def of(cls, head_VD: Tensor, mean_DD: Tensor | None, prototypes_KD: Tensor) -> PursuitTables:
        """Return the tables of a head, a mean metric and prototypes."""
        weighted_KD = prototypes_KD if mean_DD is None else prototypes_KD @ mean_DD
        length_K = (prototypes_KD * weighted_KD).sum(-1).clamp_min(1e-12).sqrt()
        return cls(head_VD, mean_DD, prototypes_KD, weighted_KD, length_K)


class TokenMetrics:
    """M_t of the tokens of a chunk, without a [n, D, D] tensor."""

    def __init__(self, head_VD: Tensor, mean_DD: Tensor | None, likeliest: Likeliest) -> None:
        self.mean_DD = mean_DD
        pi_nc = likeliest.probabilities_Nc.float()
        total_n1 = pi_nc.sum(1, keepdim=True)
        self.weight_n1 = 1 - total_n1 + FLOOR
        rows_ncD = head_VD[likeliest.tokens_Nc]
        rows_ncD = rows_ncD - (pi_nc[:, None] @ rows_ncD) / total_n1[:, :, None]
        self.rows_ncD = rows_ncD.mul_(pi_nc.sqrt()[:, :, None])

    def mean_times(self, x_nD: Tensor) -> Tensor:
        """Return F x of every row."""
        return x_nD if self.mean_DD is None else x_nD @ self.mean_DD

    def own(self, x_nD: Tensor) -> Tensor:
        """Return sqrt(pi_c) (W_c - m) x [n, c] of every row."""
        return (self.rows_ncD @ x_nD[:, :, None])[:, :, 0]

    def times(self, x_nD: Tensor) -> Tensor:
        """Return M_t x_t [n, D] of every row."""
        return self.weight_n1 * self.mean_times(x_nD) + (self.own(x_nD)[:, None] @ self.rows_ncD)[:, 0]


@torch.no_grad()
def likeliest_tokens(head_VD: Tensor, z_ND: Tensor) -> Likeliest:
    """Return the `LIKELIEST` tokens of every prediction, a bounded number of tokens at a time."""
    count, parts = min(LIKELIEST, len(head_VD)), []
    for z_nD in z_ND.split(max(1, CHUNK_BYTES // (4 * len(head_VD)))):
        logits_nV = z_nD @ head_VD.T
        values_nc, tokens_nc = logits_nV.topk(count, dim=1)
        parts.append((tokens_nc, (values_nc - logits_nV.logsumexp(1, keepdim=True)).exp()))
    return Likeliest(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


def _chunks(z_ND: Tensor, likeliest: Likeliest, vectors: int, products: int) -> list[tuple[Tensor, Likeliest]]:
    """Return chunks with so many gathered vectors and products of each token."""
    numbers = (vectors + likeliest.tokens_Nc.shape[1]) * z_ND.shape[1] + products
    rows = max(1, CHUNK_BYTES // (4 * numbers))
    parts = zip(z_ND.split(rows), *(tensor.split(rows) for tensor in likeliest), strict=True)
    return [(z_nD, Likeliest(tokens_nc, pi_nc)) for z_nD, tokens_nc, pi_nc in parts]


@torch.no_grad()
def pursue(z_ND: Tensor, tables: PursuitTables, active: int, likeliest: Likeliest) -> Encoding:
    """Return at most `active` prototypes of every token, with activations >= 0.

    Args:
        z_ND: hidden states, fp32.
        tables: of the present weights.
        active: k.
        likeliest: of the same tokens.
    """
    chunks = _chunks(z_ND, likeliest, 2 * (CANDIDATES + active), len(tables.prototypes_KD))
    parts = [_pursue_chunk(z_nD, tables, active, own) for z_nD, own in chunks]
    return Encoding(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


@torch.no_grad()
def weighted(x_ND: Tensor, tables: PursuitTables, likeliest: Likeliest) -> Tensor:
    """Return M_t x_t [N, D] of every row."""
    chunks = _chunks(x_ND, likeliest, 0, 0)
    return torch.cat([TokenMetrics(tables.head_VD, tables.mean_DD, own).times(x_nD) for x_nD, own in chunks])


def _pursue_chunk(z_nD: Tensor, tables: PursuitTables, active: int, likeliest: Likeliest) -> Encoding:
    metrics = TokenMetrics(tables.head_VD, tables.mean_DD, likeliest)
    mean_z_nD, own_z_nc = metrics.mean_times(z_nD), metrics.own(z_nD)
    indices_nk = torch.zeros(len(z_nD), 1, dtype=torch.long, device=z_nD.device)
    activations_nk = _first_activation(tables, metrics, mean_z_nD, own_z_nc)[:, None]
    residual_nD = z_nD - activations_nk * tables.prototypes_KD[0]
    for first in range(1, active, STEPS_PER_SEARCH):
        steps = min(STEPS_PER_SEARCH, active - first)
        products_nK = (metrics.times(residual_nD) @ tables.prototypes_KD.T).div_(tables.length_K)
        products_nK.scatter_(1, indices_nk, -torch.inf)
        count = min(CANDIDATES, products_nK.shape[1] - indices_nk.shape[1])
        candidates_nC = torch.cat([indices_nk, products_nK.topk(count, dim=1, sorted=False).indices], 1)
        vectors_nCD = tables.prototypes_KD[candidates_nC]
        mean_nCD = vectors_nCD if tables.mean_DD is None else tables.weighted_KD[candidates_nC]
        own_nCc = vectors_nCD @ metrics.rows_ncD.mT
        gram_nCC = metrics.weight_n1[:, :, None] * (vectors_nCD @ mean_nCD.mT) + own_nCc @ own_nCc.mT
        products_nC = metrics.weight_n1 * (vectors_nCD @ mean_z_nD[:, :, None])[:, :, 0]
        products_nC += (own_nCc @ own_z_nc[:, :, None])[:, :, 0]
        length_nC = gram_nCC.diagonal(dim1=1, dim2=2).clamp_min(1e-12).sqrt()
        problem = _LeastSquares(gram_nCC / length_nC[:, :, None] / length_nC[:, None], products_nC / length_nC)
        problem.start_with(activations_nk > 0)
        for _ in range(steps):
            problem.add_best()
            problem.drop_negative(active)
        activations_nC = problem.coefficients() / length_nC
        residual_nD = z_nD - (activations_nC[:, None] @ vectors_nCD)[:, 0]
        activations_nk, where_nk = activations_nC.topk(min(first + steps, activations_nC.shape[1]), dim=1)
        indices_nk = candidates_nC.gather(1, where_nk)
    return Encoding(indices_nk, activations_nk)


def _first_activation(tables: PursuitTables, metrics: TokenMetrics, mean_z_nD: Tensor, own_z_nc: Tensor) -> Tensor:
    """Return the activation [n] of prototype 0 alone."""
    shared_D = tables.prototypes_KD[0]
    own_nc = metrics.rows_ncD @ shared_D
    weight_n = metrics.weight_n1[:, 0]
    product_n = weight_n * (mean_z_nD @ shared_D) + (own_nc * own_z_nc).sum(1)
    return (product_n / (weight_n * tables.length_K[0] ** 2 + own_nc.square().sum(1))).clamp_min(0)


class _LeastSquares:
    """Least squares for every token over a growing set of its candidates, by the sweep operator.

    The tableau of a token is its candidates' Gram matrix with their products with z as last column. After candidate j
    has been swept in, row j of that column is its coefficient. Rows that are not swept in have there the candidate's
    product with the residual, and on the diagonal its squared length outside the span of the chosen ones.
    """

    def __init__(self, gram_nCC: Tensor, products_nC: Tensor) -> None:
        self.tableau = torch.cat([gram_nCC, products_nC[:, :, None]], dim=2)
        self.chosen_nC = torch.zeros_like(products_nC, dtype=torch.bool)

    def _column(self) -> Tensor:
        return self.tableau[:, :, -1]

    def coefficients(self) -> Tensor:
        """Return the coefficient [n, C] of every chosen candidate, 0 for the others."""
        return torch.where(self.chosen_nC, self._column(), 0.0).clamp_min(0)

    def start_with(self, chosen_nk: Tensor) -> None:
        """Add those of the first k candidates that are marked."""
        for number, chosen_n in enumerate(chosen_nk.unbind(1)):
            self._toggle(chosen_n, torch.full_like(chosen_n, number, dtype=torch.long))

    def add_best(self) -> None:
        """Add the candidate that lowers the squared error most; none where no coefficient would be positive."""
        free_nC = self.tableau.diagonal(dim1=1, dim2=2)
        gain_nC = self._column().clamp_min(0).square() / free_nC.clamp_min(COLLINEAR)
        gain_nC = torch.where(self.chosen_nC | (free_nC < COLLINEAR), 0.0, gain_nC)
        gain_n, pivot_n = gain_nC.max(dim=1)
        self._toggle(gain_n > 0, pivot_n)

    def drop_negative(self, rounds: int) -> None:
        """Drop the most negative coefficient of every token, until none is left or the rounds are over."""
        for _ in range(rounds):
            lowest_n, pivot_n = torch.where(self.chosen_nC, self._column(), 0.0).min(dim=1)
            if not (negative_n := lowest_n < 0).any():
                return
            self._toggle(negative_n, pivot_n)

    def _toggle(self, affected_n: Tensor, pivot_n: Tensor) -> None:
        """Sweep one candidate of each affected token in, or out if it was chosen: the operator is its own inverse."""
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
