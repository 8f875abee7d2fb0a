"""Building shards of an index in the space of hidden states (`index/hidden_influence.py`).

Shapes: N tokens of a batch, n of them with a target, k active, D hidden size, m coordinates, h coordinates of a hidden
state.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from prism_lightning.attribution.build.base import ShardBuilder, array, rows_of
from prism_lightning.attribution.curvature.hessian import HessianSums, eigenbasis, mean_curvature
from prism_lightning.attribution.curvature.record_basis import RecordBasis, preconditioner
from prism_lightning.attribution.curvature.records import head_chunks, loss_gradient
from prism_lightning.attribution.index.quantisation import quantised
from prism_lightning.attribution.index.shards import HiddenShard, prototype_lists, total_of
from prism_lightning.attribution.settings import IndexSettings
from prism_lightning.common.devices import check_float64
from prism_lightning.models import PrismForCausalLM
from prism_lightning.models.blocks import BlockStates

CURVATURE_TOKENS = 65_536  # of the sample, for the basis of the records; S itself is summed over all tokens


class HiddenShardBuilder(ShardBuilder[HiddenShard]):
    """Builds shards with a whitened loss gradient for each token."""

    shard_type = HiddenShard

    @cached_property
    def record_basis(self) -> RecordBasis:
        """The bases of the records."""
        tensors = self.basis_tensors
        return RecordBasis(tensors["basis"], tensors["eigenvalues"], tensors.get("hidden"))

    @staticmethod
    def fit_basis(model: PrismForCausalLM, settings: IndexSettings, sample_ND: Tensor) -> dict[str, Tensor]:
        head_VD = model.lm_head.weight.detach()
        check_float64(head_VD.device, "--index.space hidden")
        step = max(1, len(sample_ND) // CURVATURE_TOKENS)
        rank = min(settings.rank or head_VD.shape[1], head_VD.shape[1])
        values_m, basis_Dm = eigenbasis(mean_curvature(head_VD, sample_ND[::step]), rank)
        tensors = {"basis": basis_Dm, "eigenvalues": values_m}
        tensors["reconstruction_scale"] = torch.zeros(1)  # read by earlier versions, which could have another value
        if settings.hidden_rank:
            second_DD = (sample_ND.T @ sample_ND).double() / len(sample_ND)
            hidden_h, hidden_Dh = eigenbasis(second_DD, min(settings.hidden_rank, len(second_DD)))
            tensors["hidden"] = hidden_Dh / hidden_h.sqrt()
        return tensors

    def begin(self) -> None:
        self.sums = HessianSums(self.head_VD, len(self.dictionary.unit_KD))
        self.parts: list[dict[str, np.ndarray]] = []

    def add(self, states: BlockStates, rows: int) -> None:
        deltas = [states.z_nD[:0]]
        indices_nk, activations_nk = self.dictionary.assign(states.z_nD)
        for chunk in head_chunks(self.head_VD, states.z_nD):
            self.sums.add(chunk, indices_nk[chunk.rows], activations_nk[chunk.rows])
            deltas.append(loss_gradient(self.head_VD, chunk.mean_CD, states.targets_n[chunk.rows]))
        activation_type = np.float32 if self.settings.precision == "fp32" else np.float16
        whitened_nm = torch.cat(deltas) @ self.record_basis.whitening_Dm
        coordinates, scales = quantised(array(whitened_nm), self.settings.precision)
        part = {
            "coordinates": coordinates,
            "prototypes": array(indices_nk).astype(np.uint32),
            "activations": array(activations_nk).astype(activation_type),
        }
        if scales is not None:
            part["scales"] = scales
        if self.record_basis.hidden_Dh is not None:
            hidden, hidden_scales = quantised(array(states.z_nD @ self.record_basis.hidden_Dh), "int8")
            assert hidden_scales is not None
            part |= {"hidden": hidden, "hidden_scales": hidden_scales}
        self.parts.append({name: rows_of(kept, states, rows) for name, kept in part.items()})

    def finish(self) -> HiddenShard:
        joined = {name: np.concatenate([part.pop(name) for part in self.parts]) for name in list(self.parts[0])}
        lists = prototype_lists(joined.pop("prototypes"), joined.pop("activations"), len(self.dictionary.unit_KD))
        return HiddenShard(
            **joined,
            **lists,
            sum_activation=array(self.sums.activation_K.float()),
            sum_curvature=array(self.sums.gauss_newton_DD()),
        )

    def curvature(self, shards: Sequence[HiddenShard], targets: int) -> dict[str, np.ndarray]:
        activation_K = total_of([shard.sum_activation for shard in shards]) / targets
        curvature_DD = total_of([shard.sum_curvature for shard in shards]) / targets
        return preconditioner(self.record_basis, activation_K, curvature_DD, targets, self.settings.damping_share)
