"""Encoders: which prototypes are active for a hidden state, and with which activations (method, section 2).

`cosine` is the paper's: the k prototypes of largest cosine, with the cosine as activation. `pursuit` chooses them for
the prediction, see `pursuit`. Either gives an exact decomposition. Shape suffixes: N tokens, n of a chunk, D hidden
size, K prototypes, k active, V vocabulary.
"""

from __future__ import annotations

from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from prism_lightning.models.pursuit import Encoding, Likeliest, PursuitTables, likeliest_tokens, pursue

EncoderName = Literal["cosine", "pursuit"]
METRIC_FLOOR = 0.01  # share of the mean eigenvalue that is added to all, so that the metric can be inverted
METRIC_CHUNK_BYTES = 64 * 2**20  # of the probabilities [n, V]


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
    """At most k prototypes by non-negative matching pursuit in the metric of each token's prediction.

    Args:
        weight_KD: P.
        active: k.
        metric_DD: F, the mean metric.
        head_VD: W.
    """

    def __init__(self, weight_KD: Tensor, active: int, metric_DD: Tensor, head_VD: Tensor) -> None:
        self.active = active
        self.tables = PursuitTables.of(head_VD.float(), metric_DD.float(), weight_KD.float())

    def __call__(self, z_ND: Tensor, likeliest: Likeliest | None = None) -> Encoding:
        """See `Encoder`; `likeliest` saves a product with the head, where it is known."""
        z_ND = z_ND.float()
        return pursue(z_ND, self.tables, self.active, likeliest or likeliest_tokens(self.tables.head_VD, z_ND))


@torch.no_grad()
def mean_metric(head_VD: Tensor, z_ND: Tensor) -> Tensor:
    """Return F [D, D], the mean over tokens of the head's Fisher matrix W^T (diag(pi) - pi pi^T) W.

    `METRIC_FLOOR` of its mean eigenvalue is added.

    Args:
        head_VD: W.
        z_ND: hidden states to average over.
    """
    head_VD, z_ND = head_VD.float(), z_ND.float()
    probability_V = torch.zeros(len(head_VD), device=z_ND.device)
    outer_DD = torch.zeros(2 * (head_VD.shape[1],), device=z_ND.device)
    for z_nD in z_ND.split(max(1, METRIC_CHUNK_BYTES // (4 * len(head_VD)))):
        pi_nV = (z_nD @ head_VD.T).softmax(-1)
        mean_nD = pi_nV @ head_VD
        probability_V += pi_nV.sum(0)
        outer_DD += mean_nD.T @ mean_nD
    fisher_DD = (head_VD.T * (probability_V / len(z_ND))) @ head_VD - outer_DD / len(z_ND)
    fisher_DD = (fisher_DD + fisher_DD.T) / 2
    return fisher_DD + METRIC_FLOOR * fisher_DD.diagonal().mean() * torch.eye(len(fisher_DD), device=z_ND.device)


def square_root(metric_DD: Tensor) -> Tensor:
    """Return the symmetric A with A A = F."""
    values_D, vectors_DD = torch.linalg.eigh(metric_DD.double().cpu())
    root_DD = (vectors_DD * values_D.clamp_min(0).sqrt()) @ vectors_DD.T
    return root_DD.float().to(metric_DD.device)
