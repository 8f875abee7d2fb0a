"""The curvature that attribution divides by: Gauss-Newton statistics in one pass (section 4.2).

With M_t = W^T (diag(pi_t) - pi_t pi_t^T) W, the block of prototypes i and j is G_ij = E_t[a_ti a_tj M_t]. Off-diagonal
blocks are dropped. Either G_ii ~ A_ii S with A_ii = E[a_ti^2] and S = E[M_t] ("separable"), or
G_ii ~ Q diag(lambda_i) Q^T in one eigenbasis Q with lambda_im = E[a_ti^2 q_m^T M_t q_m] ("eigenvalues").

Shapes: C tokens of a chunk, D hidden size, V vocabulary, K prototypes, k active, m coordinates.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from prism_lightning.attribution.curvature.records import HeadChunk, head_chunks


class HessianSums:
    """Sums over tokens that make up A, S and, where a basis is given, lambda; all closed form, no label is drawn.

    Args:
        head_VD: W.
        num_prototypes: K.
        basis_Dm: orthonormal columns q_m; None leaves the eigenvalues out.
    """

    def __init__(self, head_VD: Tensor, num_prototypes: int, basis_Dm: Tensor | None = None) -> None:
        zeros = partial(torch.zeros, dtype=torch.float64, device=head_VD.device)
        self.head_VD, self.basis_Dm, self.tokens = head_VD, basis_Dm, 0
        self.activation_K = zeros(num_prototypes)
        self.probability_V = zeros(head_VD.shape[0])
        self.outer_DD = zeros(head_VD.shape[1], head_VD.shape[1])
        self.eigenvalue_Km: Tensor | None = None
        if basis_Dm is not None:
            self.eigenvalue_Km = zeros(num_prototypes, basis_Dm.shape[1])
            self._head_squared_Vm = (head_VD @ basis_Dm).square()

    def add(self, chunk: HeadChunk, indices_Ck: Tensor, activations_Ck: Tensor) -> None:
        """Count some tokens in: their predictions and their active prototypes."""
        self.tokens += len(indices_Ck)
        squared_Ck = activations_Ck.square()
        self.activation_K.index_add_(0, indices_Ck.flatten(), squared_Ck.flatten().double())
        self.probability_V += chunk.probabilities_CV.sum(0).double()
        self.outer_DD += (chunk.mean_CD.T @ chunk.mean_CD).double()
        if self.eigenvalue_Km is None or self.basis_Dm is None:
            return
        # q_m^T M_t q_m = sum_v pi_v (W_v . q_m)^2 - (mean . q_m)^2
        along_Cm = chunk.probabilities_CV @ self._head_squared_Vm - (chunk.mean_CD @ self.basis_Dm).square()
        for index_C, square_C in zip(indices_Ck.unbind(-1), squared_Ck.unbind(-1), strict=True):
            self.eigenvalue_Km.index_add_(0, index_C, (square_C[:, None] * along_Cm).double())

    def gauss_newton_DD(self) -> Tensor:
        """sum_t M_t = W^T diag(sum pi) W - sum mean mean^T, in float64."""
        head_VD = self.head_VD.double()
        return head_VD.T @ (self.probability_V[:, None] * head_VD) - self.outer_DD


def mean_curvature(head_VD: Tensor, z_ND: Tensor) -> Tensor:
    """S = E[M_t] over some hidden states, in float64."""
    sums = HessianSums(head_VD, 1)
    for chunk in head_chunks(head_VD, z_ND):
        nowhere_C1 = torch.zeros(len(chunk.mean_CD), 1, device=head_VD.device)
        sums.add(chunk, nowhere_C1.long(), nowhere_C1)
    return sums.gauss_newton_DD() / sums.tokens


def eigenbasis(curvature_DD: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The `rank` largest eigenvalues, descending, floored at 1e-6 of the mean, and their eigenvectors as columns."""
    values_D, vectors_DD = torch.linalg.eigh(curvature_DD)
    values_m, basis_Dm = values_D.flip(0)[:rank], vectors_DD.flip(1)[:, :rank]
    return values_m.clamp_min(1e-6 * values_D.mean()), basis_Dm
