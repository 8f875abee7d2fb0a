"""Influence through the head's input alone, from cached gradients sum_t z_t delta_t^T of all training sequences.

The parameters are those of a dense D x D matrix between hidden states and head, at the identity: what prototypes
would be without their locality. With C = E[z z^T], M_t = W^T (diag(pi) - pi pi^T) W and S = E[M_t], a query's gradient
G = sum_t w_t z_t delta_t^T is divided by the Kronecker product of C and S ("kfac"), by its eigenvalue-corrected form
("ekfac": in the eigenbases of C and S, by E[(u_i . z_t)^2 v_j^T M_t v_j], in closed form), or by nothing ("identity").
A training sequence then scores sum_t z_t^T G delta_t, the product of G with its own gradient.

Shapes: N training tokens, S sequences, B of them at once, T targets, D hidden size, m coordinates kept of each side.
"""

from __future__ import annotations

from math import isqrt
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from benchmarks.attribution.task import BATCH, Method, Queries, Task
from prism_lightning.attribution.curvature.hessian import eigenbasis
from prism_lightning.attribution.curvature.records import head_chunks, loss_gradient
from prism_lightning.attribution.index.quantisation import quantised
from prism_lightning.common.files import map_file, write_file

CHUNK = 2**22  # coordinates scored at once


class Head(Method):
    """Cached gradients of sequences, whitened on both sides, in as many coordinates as the bytes allow.

    Args:
        task, folder: see `Method`.
        curvature: "kfac", "ekfac" or "identity".
        damping: share of the mean eigenvalue of each factor ("kfac"), or of their products ("ekfac").
        bytes_per_token: of the gradients: the leading m x m coordinates in int8 and a scale for each sequence; None
            keeps all in float32.
    """

    def __init__(
        self,
        task: Task,
        folder: Path,
        curvature: Literal["kfac", "ekfac", "identity"] = "kfac",
        damping: float = 1e-3,
        bytes_per_token: int | None = None,
    ) -> None:
        super().__init__(task, folder)
        self.curvature, self.damping = curvature, damping
        self.kept: int = task.model.config.hidden_size
        if bytes_per_token is not None:
            self.kept = min(self.kept, isqrt(bytes_per_token * (task.train_SL.shape[1] - 1) - 2))
        self.precision = "fp32" if bytes_per_token is None else "int8"

    @torch.no_grad()
    def fit(self) -> None:
        model, head_VD = self.task.model, self.task.model.lm_head.weight.detach()
        parts: list[tuple[Tensor, Tensor]] = []
        probability_V = torch.zeros(len(head_VD), dtype=torch.float64)
        outer_DD = torch.zeros(2 * (head_VD.shape[1],), dtype=torch.float64)
        for ids_BL in self.task.train_SL.split(BATCH):
            z_ND, delta_ND, mean_ND, sums_V = _records(model, head_VD, ids_BL)
            probability_V += sums_V
            outer_DD += (mean_ND.T @ mean_ND).double()
            parts.append((z_ND, delta_ND))
        z_ND, delta_ND = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        tokens = len(z_ND)
        float64_VD = head_VD.double()
        curvature_DD = (float64_VD.T @ (probability_V[:, None] * float64_VD) - outer_DD) / tokens
        tensors: dict[str, np.ndarray] = {}
        sides = []
        for name, rows_ND, moment_DD in (
            ("hidden", z_ND, (z_ND.T @ z_ND).double() / tokens),
            ("gradient", delta_ND, curvature_DD),
        ):
            values_m, basis_Dm = eigenbasis(moment_DD, self.kept)
            tensors |= {f"{name}_basis": basis_Dm.float().numpy(), f"{name}_values": values_m.float().numpy()}
            sides.append((rows_ND @ (basis_Dm / values_m.sqrt()).float()).view(len(self.task.train_SL), -1, self.kept))
        if self.curvature == "ekfac":
            tensors["products"] = self._products(head_VD, z_ND, tensors).numpy()
        gradients, scales = [], []
        for z_BTm, delta_BTm in zip(*(side_STm.split(BATCH) for side_STm in sides), strict=True):
            rows, scales_B = quantised((z_BTm.transpose(1, 2) @ delta_BTm).flatten(1).numpy(), self.precision)
            gradients.append(rows)
            scales += [] if scales_B is None else [scales_B]
        tensors |= {"gradients": np.concatenate(gradients)} | ({"scales": np.concatenate(scales)} if scales else {})
        write_file(self.folder / "gradients.safetensors", tensors)

    def _products(self, head_VD: Tensor, z_ND: Tensor, tensors: dict[str, np.ndarray]) -> Tensor:
        """E[(u_i . z)^2 v_j^T M_t v_j], [m, m]."""
        hidden_Dm, gradient_Dm = (torch.from_numpy(tensors[f"{name}_basis"]) for name in ("hidden", "gradient"))
        squared_Vm = (head_VD @ gradient_Dm).square()
        total = torch.zeros(self.kept, self.kept, dtype=torch.float64)
        for chunk in head_chunks(head_VD, z_ND):
            along_Cm = chunk.probabilities_CV @ squared_Vm - (chunk.mean_CD @ gradient_Dm).square()
            total += ((z_ND[chunk.rows] @ hidden_Dm).square().T @ along_Cm).double()
        return (total / len(z_ND)).float()

    def open(self) -> None:
        self.state = map_file(self.folder / "gradients.safetensors")

    @torch.no_grad()
    def scores(self, queries: Queries) -> Tensor:
        queries_Qf = self._matrices(queries).flatten(1)
        stored, step = self.state["gradients"], max(1, CHUNK // queries_Qf.shape[1])
        parts = (stored[start : start + step].astype(np.float32) for start in range(0, len(stored), step))
        scores_QS = torch.cat([queries_Qf @ torch.from_numpy(rows_Sf).T for rows_Sf in parts], dim=1)
        if "scales" in self.state:
            scores_QS *= torch.from_numpy(self.state["scales"].astype(np.float32))
        return scores_QS

    def _matrices(self, queries: Queries) -> Tensor:
        """[Q, m, m]: gradients of the queries, in whitened coordinates, divided by the curvature."""
        model, head_VD = self.task.model, self.task.model.lm_head.weight.detach()
        values = {n: torch.tensor(self.state[f"{n}_values"]) for n in ("hidden", "gradient")}
        whitening = {n: torch.tensor(self.state[f"{n}_basis"]) / values[n].sqrt() for n in values}
        weights_QT = queries.weights_QT
        num_targets = int(weights_QT.any(0).nonzero().max()) + 1
        z_ND, delta_ND, _, _ = _records(model, head_VD, queries.ids_QL[:, : num_targets + 1])
        shape = (len(weights_QT), num_targets, -1)
        z_QTm = (z_ND @ whitening["hidden"]).view(shape) * weights_QT[:, :num_targets, None]
        matrices_Qmm = z_QTm.transpose(1, 2) @ (delta_ND @ whitening["gradient"]).view(shape)
        outer_mm = values["hidden"][:, None] * values["gradient"]  # undoes the whitening of both sides
        if self.curvature == "identity":
            return matrices_Qmm * outer_mm
        if self.curvature == "ekfac":
            products_mm = torch.tensor(self.state["products"])
            return matrices_Qmm * outer_mm / (products_mm + self.damping * products_mm.mean())
        damped = [v + self.damping * v.mean() for v in values.values()]
        return matrices_Qmm * outer_mm / (damped[0][:, None] * damped[1])


def _records(model: torch.nn.Module, head_VD: Tensor, ids_BL: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """z, delta and the head rows' mean under the predictions [N, D], and the summed predictions [V] in float64."""
    z_ND = model.hidden_states(ids_BL[:, :-1]).flatten(0, 1)  # type: ignore[operator]
    chunks = [(chunk.mean_CD, chunk.probabilities_CV.sum(0).double()) for chunk in head_chunks(head_VD, z_ND)]
    mean_ND = torch.cat([mean for mean, _ in chunks])
    sums_V = torch.stack([sums for _, sums in chunks]).sum(0)
    return z_ND, loss_gradient(head_VD, mean_ND, ids_BL[:, 1:].flatten()), mean_ND, sums_V
