"""Gauss-Newton statistics in one pass: the curvature that influence is divided by (section 4.2).

With M_t = W^T (diag(pi_t) - pi_t pi_t^T) W, the block of prototypes i and j is G_ij = E_t[a_ti a_tj M_t]. Off-diagonal
blocks are dropped, and G_ii is approximated by A_ii S with A_ii = E[a_ti^2] and S = E[M_t].

Shapes: C tokens of a chunk, D hidden size, V vocabulary, K prototypes, k active.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from prism_lightning.attribution.curvature.records import HeadChunk, head_chunks


class HessianSums:
    """Sums over tokens for A and S, in closed form: no label is drawn.

    Args:
        head_VD: W.
        num_prototypes: K.
    """

    def __init__(self, head_VD: Tensor, num_prototypes: int) -> None:
        zeros = partial(torch.zeros, dtype=torch.float64, device=head_VD.device)
        self.head_VD, self.tokens = head_VD, 0
        self.activation_K = zeros(num_prototypes)
        self.probability_V = zeros(head_VD.shape[0])
        self.outer_DD = zeros(head_VD.shape[1], head_VD.shape[1])

    def add(self, chunk: HeadChunk, indices_Ck: Tensor, activations_Ck: Tensor) -> None:
        """Add some tokens: their predictions and their active prototypes."""
        self.tokens += len(indices_Ck)
        self.activation_K.index_add_(0, indices_Ck.flatten(), activations_Ck.square().flatten().double())
        self.probability_V += chunk.probabilities_CV.sum(0).double()
        self.outer_DD += (chunk.mean_CD.T @ chunk.mean_CD).double()

    def gauss_newton_DD(self) -> Tensor:
        """Return sum_t M_t = W^T diag(sum pi) W - sum mean mean^T, in float64."""
        head_VD = self.head_VD.double()
        return head_VD.T @ (self.probability_V[:, None] * head_VD) - self.outer_DD


def mean_curvature(head_VD: Tensor, z_ND: Tensor) -> Tensor:
    """Return S = E[M_t] over some hidden states, in float64."""
    sums = HessianSums(head_VD, 1)
    for chunk in head_chunks(head_VD, z_ND):
        inactive_C1 = torch.zeros(len(chunk.mean_CD), 1, device=head_VD.device)
        sums.add(chunk, inactive_C1.long(), inactive_C1)
    return sums.gauss_newton_DD() / sums.tokens


def eigenbasis(curvature_DD: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return the `rank` largest eigenvalues, descending and at least 1e-6 of the mean, and eigenvectors as columns."""
    values_D, vectors_DD = torch.linalg.eigh(curvature_DD)
    values_m, basis_Dm = values_D.flip(0)[:rank], vectors_DD.flip(1)[:, :rank]
    return values_m.clamp_min(1e-6 * values_D.mean()), basis_Dm
