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

from prism_lightning.models.swept_systems import SweptSystems

STEPS_PER_SEARCH = 4
FEW = 4  # up to so many active, every step has a search: quickstart, k 4, recovered 0.972, with one search 0.953
CANDIDATES = 12  # of each search; 16 recovered 0.9259 and took a tenth more time, 12 recovered 0.9216
LIKELIEST = 32  # c; on SmolLM2-135M, 4,096 unfitted prototypes, k 16: recovered 0.745 with F alone, 0.880 with 32
FLOOR = 0.5  # with 0.1, recovered 0.875
CHUNK_BYTES = 64 * 2**20  # of the vectors that are gathered at a time, and of the products with all prototypes


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
        self.root_nc, self.share_nc = pi_nc.sqrt(), pi_nc / total_n1.clamp_min(1e-12)
        self.rows_ncD = head_VD[likeliest.tokens_Nc]  # W_c; m is not taken off them, which would copy them

    def mean_times(self, x_nD: Tensor) -> Tensor:
        """Return F x of every row."""
        return x_nD if self.mean_DD is None else x_nD @ self.mean_DD

    def own(self, x_nCD: Tensor) -> Tensor:
        """Return sqrt(pi_c) (W_c - m) x [n, C, c] of C vectors in every row."""
        products_nCc = x_nCD @ self.rows_ncD.mT
        products_nCc -= products_nCc @ self.share_nc[:, :, None]
        return products_nCc.mul_(self.root_nc[:, None])

    def times(self, x_nD: Tensor, own_nc: Tensor) -> Tensor:
        """Return M_t x_t [n, D] of every row, whose `own` is known."""
        weights_nc = own_nc * self.root_nc
        weights_nc = weights_nc - self.share_nc * weights_nc.sum(1, keepdim=True)
        return self.weight_n1 * self.mean_times(x_nD) + (weights_nc[:, None] @ self.rows_ncD)[:, 0]


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
    numbers = (vectors + likeliest.tokens_Nc.shape[1]) * z_ND.shape[-1] + products
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
def weighted_errors(
    residual_ND: Tensor, z_ND: Tensor, tables: PursuitTables, likeliest: Likeliest
) -> tuple[Tensor, Tensor]:
    """Return M_t r_t [N, D] of every residual, and the sum over tokens of z_t^T M_t z_t."""
    both_N2D = torch.stack([residual_ND, z_ND], 1)
    parts, total = [], z_ND.new_zeros(())
    for both_n2D, own in _chunks(both_N2D, likeliest, 2, 0):
        metrics = TokenMetrics(tables.head_VD, tables.mean_DD, own)
        residual_nD, z_nD = both_n2D.unbind(1)
        own_residual_nc, own_z_nc = metrics.own(both_n2D).unbind(1)
        parts.append(metrics.times(residual_nD, own_residual_nc))
        total += (metrics.weight_n1 * z_nD * metrics.mean_times(z_nD)).sum() + own_z_nc.square().sum()
    return torch.cat(parts), total


def _pursue_chunk(z_nD: Tensor, tables: PursuitTables, active: int, likeliest: Likeliest) -> Encoding:
    metrics = TokenMetrics(tables.head_VD, tables.mean_DD, likeliest)
    found = _Candidates(tables, metrics, z_nD)
    found.add(torch.zeros(len(z_nD), 1, dtype=torch.long, device=z_nD.device))
    found.systems.add_best()
    steps_per_search = 1 if active <= FEW else STEPS_PER_SEARCH
    for first in range(1, active, steps_per_search):
        products_nK = (found.weighted_residual() @ tables.prototypes_KD.T).div_(tables.length_K)
        products_nK.scatter_(1, found.indices_nC, -torch.inf)
        count = min(CANDIDATES, products_nK.shape[1] - found.indices_nC.shape[1])
        found.add(products_nK.topk(count, dim=1, sorted=False).indices)
        steps = min(steps_per_search, active - first)
        for _ in range(steps):
            found.systems.add_best()
            found.systems.drop_negative(active)
        found.keep(first + steps)
    return Encoding(found.indices_nC, found.activations())


class _Candidates:
    """Prototypes that the tokens of a chunk may use, and the least-squares problem over them.

    Args:
        tables: of the present weights.
        metrics: M_t of the tokens.
        z_nD: their hidden states.
    """

    def __init__(self, tables: PursuitTables, metrics: TokenMetrics, z_nD: Tensor) -> None:
        self.tables, self.metrics, self.z_nD = tables, metrics, z_nD
        self.own_z_nc = metrics.own(z_nD[:, None])[:, 0]
        self.weighted_z_nD = metrics.times(z_nD, self.own_z_nc)
        self.indices_nC = torch.zeros(len(z_nD), 0, dtype=torch.long, device=z_nD.device)
        self.length_nC = z_nD.new_zeros(len(z_nD), 0)
        self.vectors_nCD = z_nD.new_zeros(len(z_nD), 0, z_nD.shape[1])
        self.own_nCc = z_nD.new_zeros(len(z_nD), 0, self.own_z_nc.shape[1])
        self.systems = SweptSystems(len(z_nD), z_nD.device)

    def add(self, indices_nN: Tensor) -> None:
        """Add prototypes."""
        present, weight_n11 = self.indices_nC.shape[1], self.metrics.weight_n1[:, :, None]
        vectors_nND = self.tables.prototypes_KD[indices_nN]
        mean_nND = vectors_nND if self.tables.mean_DD is None else self.tables.weighted_KD[indices_nN]
        own_nNc = self.metrics.own(vectors_nND)
        self.indices_nC = torch.cat([self.indices_nC, indices_nN], 1)
        self.vectors_nCD = torch.cat([self.vectors_nCD, vectors_nND], 1)
        self.own_nCc = torch.cat([self.own_nCc, own_nNc], 1)
        products_nCN = weight_n11 * (self.vectors_nCD @ mean_nND.mT) + self.own_nCc @ own_nNc.mT
        length_nN = products_nCN[:, present:].diagonal(dim1=1, dim2=2).clamp_min(1e-12).sqrt()
        self.length_nC = torch.cat([self.length_nC, length_nN], 1)
        products_nCN /= self.length_nC[:, :, None] * length_nN[:, None]
        target_nN = (vectors_nND @ self.weighted_z_nD[:, :, None])[:, :, 0] / length_nN
        self.systems.extend(products_nCN[:, :present], products_nCN[:, present:], target_nN)

    def keep(self, count: int) -> None:
        """Leave out all but the `count` prototypes of largest activation."""
        activations_nC = self.activations()
        where_nk = activations_nC.topk(min(count, activations_nC.shape[1]), dim=1).indices
        self.systems.keep(where_nk)
        self.indices_nC, self.length_nC = self.indices_nC.gather(1, where_nk), self.length_nC.gather(1, where_nk)
        row_n1 = torch.arange(len(where_nk), device=where_nk.device)[:, None]
        self.vectors_nCD, self.own_nCc = self.vectors_nCD[row_n1, where_nk], self.own_nCc[row_n1, where_nk]

    def activations(self) -> Tensor:
        """Return activations [n, C] of the prototypes' own lengths."""
        return self.systems.coefficients() / self.length_nC

    def weighted_residual(self) -> Tensor:
        """Return M_t r_t [n, D]."""
        activations_n1C = self.activations()[:, None]
        residual_nD = self.z_nD - (activations_n1C @ self.vectors_nCD)[:, 0]
        return self.metrics.times(residual_nD, self.own_z_nc - (activations_n1C @ self.own_nCc)[:, 0])
