"""How much of a prediction the prototypes carry: the mixture's own prediction beside the model's (docs/method.md).

Shapes: N tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class PredictionComparison(NamedTuple):
    """The model's prediction W z of N tokens, and that of the mixture alone, W zhat."""

    loss_N: Tensor  # cross-entropy of the target, in nats
    mixture_loss_N: Tensor  # the same under the mixture's prediction
    divergence_N: Tensor  # KL(softmax(W z) || softmax(W zhat)), in nats
    agrees_N: Tensor  # whether both have the same likeliest token


def compare_predictions(logits_NV: Tensor, mixture_logits_NV: Tensor, targets_N: Tensor) -> PredictionComparison:
    """Return the comparison of two predictions, token by token."""
    log_p_NV = logits_NV.float().log_softmax(-1)
    log_q_NV = mixture_logits_NV.float().log_softmax(-1)
    return PredictionComparison(
        loss_N=-log_p_NV.gather(1, targets_N[:, None])[:, 0],
        mixture_loss_N=-log_q_NV.gather(1, targets_N[:, None])[:, 0],
        divergence_N=(log_p_NV.exp() * (log_p_NV - log_q_NV)).sum(-1),
        agrees_N=log_p_NV.argmax(-1) == log_q_NV.argmax(-1),
    )
