"""Gradients and curvatures that were tried for an index and lost: an index itself has none of them.

Shapes: N tokens, D hidden size, V vocabulary, K prototypes, k active, m coordinates.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from prism_lightning.attribution.curvature.dictionary import Dictionary
from prism_lightning.attribution.curvature.records import Records, head_chunks


def residual_gradient(dictionary: Dictionary, z_ND: Tensor, records: Records, scale: float) -> Records:
    """Return records that hold the gradient of the reconstruction term as well.

    Args:
        dictionary: the prototypes.
        z_ND: hidden states of the records' tokens.
        records: of the cross-entropy alone.
        scale: 2 w_rec / mean ||z||^2.
    """
    residual_ND = z_ND - dictionary.mixture(records.prototypes_Nk, records.activations_Nk)
    return records._replace(delta_ND=records.delta_ND - scale * residual_ND)


def activation_path_gradients(dictionary: Dictionary, z_ND: Tensor, records: Records) -> Tensor:
    """Return g_ti [N, k, D] with the gradient through the activation, (delta . p_i) da_ti/dp_i, added."""
    unit_z_ND, delta_ND, gradients = F.normalize(z_ND, dim=-1), records.delta_ND, []
    for i_N, a_N in zip(records.prototypes_Nk.unbind(-1), records.activations_Nk.unbind(-1), strict=True):
        # d cos(z, p)/dp = (z/|z| - cos p/|p|) / |p|, and delta . p times that; zero where ReLU cut the cosine off.
        slope_N = (delta_ND * dictionary.unit_KD[i_N]).sum(-1) * (a_N > 0)
        direction_ND = unit_z_ND - a_N[:, None] * dictionary.unit_KD[i_N]
        gradients.append(a_N[:, None] * delta_ND + slope_N[:, None] * direction_ND)
    return torch.stack(gradients, dim=1)


def block_eigenvalues(head_VD: Tensor, z_ND: Tensor, records: Records, size: int, basis_Dm: Tensor) -> Tensor:
    """Return lambda_im = E[a_ti^2 q_m^T M_t q_m] [K, m] in float64: each prototype's own curvature along a basis.

    Args:
        head_VD, z_ND: W, and the hidden states of the records' tokens.
        records: their prototypes and activations.
        size: K.
        basis_Dm: orthonormal columns q_m.
    """
    head_squared_Vm = (head_VD @ basis_Dm).square()
    total_Km = torch.zeros(size, basis_Dm.shape[1], dtype=torch.float64)
    for chunk in head_chunks(head_VD, z_ND):
        # q_m^T M_t q_m = sum_v pi_v (W_v . q_m)^2 - (mean . q_m)^2
        along_Cm = chunk.probabilities_CV @ head_squared_Vm - (chunk.mean_CD @ basis_Dm).square()
        indices_Ck, squared_Ck = records.prototypes_Nk[chunk.rows], records.activations_Nk[chunk.rows].square()
        for index_C, square_C in zip(indices_Ck.unbind(-1), squared_Ck.unbind(-1), strict=True):
            total_Km.index_add_(0, index_C, (square_C[:, None] * along_Cm).double())
    return total_Km / len(z_ND)
