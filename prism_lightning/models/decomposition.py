"""The exact split of a logit into one term per active prototype and a residual term (method, section 2).

Shape suffixes: B texts, T positions, N = B T tokens, D hidden size, V vocabulary, k active prototypes per token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from prism_lightning.models.language_model import PrismForCausalLM
from prism_lightning.models.prototypes import selected_dots


@dataclass
class Decomposition:
    """The terms of logits[y] = residual + sum over k of contributions, for one target token y at every position.

    If an intervention scales prototypes, it scales the logit and the contributions alike (method, section 5).
    """

    targets_BT: Tensor  # y, the target token
    logit_BT: Tensor  # the model's own logit of y
    log_probability_BT: Tensor  # of y, in nats
    mixture_log_probability_BT: Tensor  # of y by the contributions alone, without the residuals of all logits
    residual_BT: Tensor  # W_y . r_t
    prototypes_BTk: Tensor  # S_t
    activations_BTk: Tensor  # a_ti
    factors_BTk: Tensor  # f_iy, 1 without an intervention
    contributions_BTk: Tensor  # f_iy a_ti W_y . p_i

    @property
    def total_BT(self) -> Tensor:
        """Residual plus all contributions; equals `logit_BT` up to rounding."""
        return self.residual_BT + self.contributions_BTk.sum(-1)


@torch.no_grad()
def decompose(model: PrismForCausalLM, input_ids_BT: Tensor, targets_BT: Tensor | None = None) -> Decomposition:
    """Return the decomposition of one target token's logit at every position.

    Args:
        model: a PRISM model.
        input_ids_BT: token ids.
        targets_BT: the target tokens; by default the likeliest token at every position.

    Raises:
        ValueError: a dense model.
    """
    if model.prototypes is None:
        raise ValueError("this model is dense: it has no prototypes to decompose its logits into")
    z_BTD = model.hidden_states(input_ids_BT)
    logits_BTV = model.logits(z_BTD)
    targets_BT = logits_BTV.argmax(-1) if targets_BT is None else targets_BT
    z_ND = z_BTD.flatten(0, 1)
    mixture = model.prototypes(z_ND, head_VD=model.lm_head.weight)[0]
    head_ND = model.lm_head.weight[targets_BT.flatten()]
    dots_Nk = selected_dots(head_ND, model.prototypes.weight, mixture.indices_Nk)
    factors_Nk = model.scaled_terms().factors(mixture.indices_Nk, targets_BT.flatten())
    shape = (*targets_BT.shape, -1)
    targets_BT1 = targets_BT[..., None]
    mixture_logits_BTV = logits_BTV - model.lm_head(z_BTD - mixture.mixture_ND.view_as(z_BTD))
    return Decomposition(
        targets_BT=targets_BT,
        logit_BT=logits_BTV.gather(-1, targets_BT1)[..., 0],
        log_probability_BT=logits_BTV.float().log_softmax(-1).gather(-1, targets_BT1)[..., 0],
        mixture_log_probability_BT=mixture_logits_BTV.float().log_softmax(-1).gather(-1, targets_BT1)[..., 0],
        residual_BT=(head_ND * (z_ND - mixture.mixture_ND)).sum(-1).view(targets_BT.shape),
        prototypes_BTk=mixture.indices_Nk.view(shape),
        activations_BTk=mixture.activations_Nk.view(shape),
        factors_BTk=factors_Nk.view(shape),
        contributions_BTk=(factors_Nk * mixture.activations_Nk * dots_Nk).view(shape),
    )


@torch.no_grad()
def promoted_tokens(model: PrismForCausalLM, prototype: int, count: int) -> list[int]:
    """Return the ids of the tokens whose logits a prototype raises most: the largest entries of W p_i."""
    assert model.prototypes is not None
    return model.lm_head(model.prototypes.weight[prototype]).topk(count).indices.tolist()
