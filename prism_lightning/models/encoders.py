"""Encoders: which prototypes are active for a hidden state, and with which activations (method, section 2).

`cosine` is the paper's: the k prototypes of largest cosine, with the cosine as activation. `pursuit` chooses them for
the prediction: non-negative matching pursuit in a metric that weighs errors by what they change in the logits. Either
gives an exact decomposition. Shapes: N tokens, C of a chunk, D hidden size, K prototypes, k active, V vocabulary.
"""

from __future__ import annotations

from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from prism_lightning.models.pursuit import Encoding, pursue

EncoderName = Literal["cosine", "pursuit"]
METRIC_FLOOR = 0.01  # share of the mean eigenvalue that is added to all, so that the metric can be inverted
METRIC_CHUNK_BYTES = 64 * 2**20  # of the probabilities [C, V]


class Encoder(Protocol):
    """Encodes hidden states with prototypes whose norms and products were computed once."""

    def __call__(self, z_ND: Tensor) -> Encoding:
        """Return the active prototypes and their activations, without gradients."""


class CosineEncoder:
    """The k prototypes of largest cosine; a_ti = max(cos, 0).

    Args:
        weight_KD: P.
        active: k.
    """

    def __init__(self, weight_KD: Tensor, active: int) -> None:
        self.active = active
        self.unit_KD = F.normalize(weight_KD.float(), dim=-1)

    def __call__(self, z_ND: Tensor) -> Encoding:
        """See `Encoder`."""
        z_ND = z_ND.float()
        projections_Nk, indices_Nk = F.linear(z_ND, self.unit_KD).topk(self.active)  # |z_t| does not change the order
        return Encoding(indices_Nk, projections_Nk.clamp_min(0) / z_ND.norm(dim=-1, keepdim=True).clamp_min(1e-12))


class PursuitEncoder:
    """At most k prototypes by non-negative matching pursuit of z A with the rows of P A.

    Args:
        weight_KD: P.
        active: k.
        metric_DD: A, symmetric.
    """

    def __init__(self, weight_KD: Tensor, active: int, metric_DD: Tensor) -> None:
        self.active, self.metric_DD = active, metric_DD.float()
        projected_KD = weight_KD.float() @ self.metric_DD
        self.length_K = projected_KD.norm(dim=-1).clamp_min(1e-12)
        self.unit_KD = projected_KD / self.length_K[:, None]

    def __call__(self, z_ND: Tensor) -> Encoding:
        """See `Encoder`."""
        indices_Nk, coefficients_Nk = pursue(z_ND.float() @ self.metric_DD, self.unit_KD, self.active)
        return Encoding(indices_Nk, coefficients_Nk / self.length_K[indices_Nk])


@torch.no_grad()
def logit_metric(head_VD: Tensor, z_ND: Tensor) -> Tensor:
    """Return A [D, D], symmetric, for which |A (z - zhat)|^2 / 2 is about the divergence of the two predictions.

    A^2 is the mean over tokens of the Fisher matrix of the head, W^T (diag(pi) - pi pi^T) W, with `METRIC_FLOOR` of its
    mean eigenvalue added: to second order, KL(softmax(W z) || softmax(W zhat)) = r^T W^T (diag(pi) - pi pi^T) W r / 2.

    Args:
        head_VD: W.
        z_ND: hidden states to average over.
    """
    head_VD, z_ND = head_VD.float(), z_ND.float()
    probability_V = torch.zeros(len(head_VD), device=z_ND.device)
    outer_DD = torch.zeros(2 * (head_VD.shape[1],), device=z_ND.device)
    for z_CD in z_ND.split(max(1, METRIC_CHUNK_BYTES // (4 * len(head_VD)))):
        pi_CV = (z_CD @ head_VD.T).softmax(-1)
        mean_CD = pi_CV @ head_VD
        probability_V += pi_CV.sum(0)
        outer_DD += mean_CD.T @ mean_CD
    fisher_DD = ((head_VD.T * (probability_V / len(z_ND))) @ head_VD - outer_DD / len(z_ND)).double()
    values_D, vectors_DD = torch.linalg.eigh(fisher_DD.cpu())
    values_D = values_D.clamp_min(0) + METRIC_FLOOR * values_D.mean()
    return ((vectors_DD * values_D.sqrt()) @ vectors_DD.T).float().to(z_ND.device)
