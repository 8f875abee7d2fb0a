"""Scaled prototype terms: logits' = W (z + sum_i (f_i - 1) a_i p_i), an intervention's effect (method, section 5).

Shapes: N tokens, D hidden size, K prototypes, k active per token.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from prism_lightning.models.prototypes import PrototypeLayer, mix


class ScaledTerms:
    """What factors on prototypes add to a hidden state; all that does not depend on the state is computed once.

    Args:
        layer: the model's prototypes.
        factors_K: f; 0 removes a prototype's term, 1 leaves it.
    """

    def __init__(self, layer: PrototypeLayer, factors_K: Tensor) -> None:
        self.active, self.weight_KD = layer.active, layer.weight.detach()
        self.unit_KD = F.normalize(self.weight_KD.float(), dim=-1)
        self.change_K = factors_K - 1

    def assign(self, z_ND: Tensor) -> tuple[Tensor, Tensor]:
        """S_t and a_ti [N, k], as `PrototypeLayer` finds them."""
        cosines_Nk, indices_Nk = (F.normalize(z_ND.float(), dim=-1) @ self.unit_KD.T).topk(self.active)
        return indices_Nk, cosines_Nk.clamp_min(0)

    def __call__(self, z: Tensor) -> Tensor:
        """z + sum_i (f_i - 1) a_i p_i [..., D]; z itself, bit for bit, where no scaled prototype is active."""
        with torch.no_grad():  # gradients reach z as if nothing were scaled
            indices_Nk, activations_Nk = self.assign(z.reshape(-1, z.shape[-1]))
            added_ND = mix(indices_Nk, activations_Nk * self.change_K[indices_Nk], self.weight_KD)
        return z + added_ND.view_as(z).to(z.dtype)
