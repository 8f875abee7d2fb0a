"""Influence through the prototypes under their whole Gauss-Newton matrix, solved by conjugate gradients.

It includes what the index leaves out of the curvature: blocks between different prototypes, and a curvature of the head
that differs from token to token. One product with the matrix costs two passes of the head over all training tokens, so
it serves a few queries on a small corpus: it measures the effect of the index's approximation on the ranking.

Shapes: N training tokens, C of them at once, Q queries, K prototypes, k active, D hidden size, V vocabulary.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from benchmarks.attribution.methods.prototypes import Prototypes
from benchmarks.attribution.task import Queries, Task, hidden, loss_gradients
from prism_lightning.attribution.curvature.records import Records
from prism_lightning.inspection.localisation import curvatures
from prism_lightning.models.prototypes import mix

CHUNK = 1024  # training tokens at once
QUERIES = 16  # solved together
TOLERANCE, MOST_STEPS = 1e-2, 100


class ExactPrototypes(Prototypes):
    """The same dictionary and records as `Prototypes`, divided by (G + damping mean(diagonal of G) I) as a whole."""

    def __init__(self, task: Task, folder: Path, damping: float = 1e-3, **settings: object) -> None:
        super().__init__(task, folder, damping, space="hidden", **settings)  # type: ignore[arg-type]
        self.steps: list[int] = []

    @torch.no_grad()
    def open(self) -> None:
        super().open()
        self.head_VD = self.task.model.lm_head.weight.detach()
        self.z_ND = hidden(self.task.model, self.task.train_SL)
        delta_ND = loss_gradients(self.task.model, self.z_ND, self.task.train_SL[:, 1:].flatten())
        self.stored = Records(*self.dictionary.assign(self.z_ND), delta_ND)
        size = len(self.dictionary.unit_KD)
        squared_Nk = self.stored.activations_Nk.square()
        self.activation_K = torch.zeros(size).index_add_(0, self.stored.prototypes_Nk.flatten(), squared_Nk.flatten())
        self.activation_K /= len(self.z_ND)
        # All M_t take 1.2 GB for 32,000 tokens and D = 96; a product then takes a second in place of a minute.
        self.curvature_NDD = curvatures(self.head_VD, self.z_ND)
        self.curvature_DD = self.curvature_NDD.mean(0)
        self.ridge = self.damping * (self.activation_K.mean() * self.curvature_DD.diagonal().mean()).item()

    @torch.no_grad()
    def scores(self, queries: Queries) -> Tensor:
        records, query_N = self.records(queries)
        assert isinstance(records, Records)
        out = []
        for start in range(0, len(queries.ids_QL), QUERIES):
            chosen = torch.arange(start, min(start + QUERIES, len(queries.ids_QL)))
            gradients_QKD = torch.stack(
                [self._gradient(records, torch.from_numpy(query_N) == query) for query in chosen]
            )
            out.append(self._by_sequence(self.solved(gradients_QKD)))
        return torch.cat(out) / len(self.z_ND)

    def _gradient(self, records: Records, in_query_N: Tensor) -> Tensor:
        """The gradient [K, D] of a query with respect to all prototypes."""
        gradient_KD = torch.zeros_like(self.dictionary.prototypes_KD)
        return gradient_KD.index_add_(
            0, records.prototypes_Nk[in_query_N].flatten(), records.gradients_NkD()[in_query_N].flatten(0, 1)
        )

    def _by_sequence(self, vectors_QKD: Tensor) -> Tensor:
        """Dot products [Q, S] with the summed gradients of every sequence."""
        indices_Nk, activations_Nk = self.stored.prototypes_Nk, self.stored.activations_Nk
        rows = [(mix(indices_Nk, activations_Nk, v_KD) * self.stored.delta_ND).sum(-1) for v_KD in vectors_QKD]
        return torch.stack(rows).view(len(rows), len(self.task.train_SL), -1).sum(-1)

    def product(self, vectors_QKD: Tensor) -> Tensor:
        """Return (G + ridge) v with G_ij = E_t[a_ti a_tj W^T (diag(pi_t) - pi_t pi_t^T) W]."""
        vectors_KQD = vectors_QKD.transpose(0, 1)
        out_KQD = self.ridge * vectors_KQD
        for start in range(0, len(self.z_ND), CHUNK):
            rows = slice(start, start + CHUNK)
            indices_Ck, activations_Ck = self.stored.prototypes_Nk[rows], self.stored.activations_Nk[rows]
            along_CQD = mix(indices_Ck, activations_Ck, vectors_KQD.flatten(1)).view(-1, *vectors_KQD.shape[1:])
            image_CQD = along_CQD @ self.curvature_NDD[rows] / len(self.z_ND)
            for index_C, a_C in zip(indices_Ck.T, activations_Ck.T, strict=True):
                out_KQD.index_add_(0, index_C, a_C[:, None, None] * image_CQD)
        return out_KQD.transpose(0, 1)

    def solved(self, gradients_QKD: Tensor) -> Tensor:
        """Return (G + ridge)^-1 g of every query, by conjugate gradients with the separable preconditioner."""
        eye_DD = torch.eye(len(self.curvature_DD))
        share = self.damping * self.curvature_DD.diagonal().mean()
        inverse_DD = torch.linalg.inv(self.curvature_DD + share * eye_DD)
        inverse_K1 = 1 / (self.activation_K + self.damping * self.activation_K.mean())[:, None]
        solution = torch.zeros_like(gradients_QKD)
        residual = gradients_QKD.clone()
        direction = conditioned = inverse_K1 * (residual @ inverse_DD)
        energy_Q = _dot(residual, conditioned)
        goal_Q = TOLERANCE**2 * energy_Q
        for step in range(MOST_STEPS):
            if (energy_Q <= goal_Q).all():
                self.steps.append(step)
                break
            image = self.product(direction)
            rate_Q = energy_Q / _dot(direction, image).clamp_min(1e-30)
            solution += rate_Q[:, None, None] * direction
            residual -= rate_Q[:, None, None] * image
            conditioned = inverse_K1 * (residual @ inverse_DD)
            before_Q, energy_Q = energy_Q, _dot(residual, conditioned)
            direction = conditioned + (energy_Q / before_Q.clamp_min(1e-30))[:, None, None] * direction
        else:
            self.steps.append(MOST_STEPS)
        return solution


def _dot(left_QKD: Tensor, right_QKD: Tensor) -> Tensor:
    return (left_QKD * right_QKD).flatten(1).sum(1)
