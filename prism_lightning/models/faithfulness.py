"""How much of a prediction the prototypes carry: the mixture's own prediction beside the model's (docs/method.md).

Shapes: N tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

FIGURES = (
    "prediction_recovered",
    "prediction_divergence",
    "top1_agreement",
    "unexplained_variance",
    "unexplained_centred_variance",
)
HEAD_ROWS = 256  # of logits at a time
ROUNDING = 1e-5  # relative: sums of fp32 values differ by 1e-7 for equal predictions


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


class PredictionSums(NamedTuple):
    """Sums over tokens that `faithfulness_figures` needs, each a tensor; their sums over batches are those of all."""

    tokens: Tensor
    loss: Tensor
    mixture_loss: Tensor
    divergence: Tensor
    agreements: Tensor
    squared_norm: Tensor
    squared_residual: Tensor
    hidden_D: Tensor
    counts_V: Tensor  # of the targets


def prediction_sums(
    head: Callable[[Tensor], Tensor], z_ND: Tensor, mixture_ND: Tensor, targets_N: Tensor
) -> PredictionSums:
    """Return the sums over some tokens, in fp64; the head, which returns logits, is called twice."""
    logits_NV = head(z_ND)
    compared = compare_predictions(logits_NV, head(mixture_ND), targets_N)
    sums = PredictionSums(
        tokens=torch.tensor(len(targets_N), device=z_ND.device),
        loss=compared.loss_N.sum(),
        mixture_loss=compared.mixture_loss_N.sum(),
        divergence=compared.divergence_N.sum(),
        agreements=compared.agrees_N.sum(),
        squared_norm=z_ND.float().square().sum(),
        squared_residual=(z_ND - mixture_ND).float().square().sum(),
        hidden_D=z_ND.float().sum(0),
        counts_V=torch.bincount(targets_N, minlength=logits_NV.shape[1]),
    )
    return PredictionSums(*(value.double() for value in sums))


def mixture_faithfulness(
    head: Callable[[Tensor], Tensor], z_ND: Tensor, mixture_ND: Tensor, targets_N: Tensor
) -> dict[str, float]:
    """Return `FIGURES` of a mixture on some tokens, a bounded number of them at a time; left out as below."""
    chunks = zip(*(tensor.split(HEAD_ROWS) for tensor in (z_ND, mixture_ND, targets_N)), strict=True)
    parts = [prediction_sums(head, *chunk) for chunk in chunks]
    sums = PredictionSums(*(torch.stack(values).sum(0) for values in zip(*parts, strict=True)))
    figures = faithfulness_figures(sums, head) | {"unexplained_variance": sums.squared_residual / sums.squared_norm}
    return {name: value.item() for name, value in figures.items()}


def faithfulness_figures(sums: PredictionSums, head: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """Return the comparison of the mixture's predictions with the model's (docs/method.md, "Reported figures").

    The figures are `prediction_divergence` (nats), `top1_agreement`, `prediction_recovered` and
    `unexplained_centred_variance`. The last two are left out where they would divide by zero, up to rounding: where the
    model predicts as its mean hidden state does, and where the hidden states do not vary, as those of a single token.
    `fit` refuses a model whose figures are not finite.

    Args:
        sums: of all tokens.
        head: returns logits of hidden states; the mean hidden state is the prediction without any context.
    """
    tokens = sums.tokens
    mean_D = sums.hidden_D / tokens
    log_mean_V = F.log_softmax(head(mean_D.float()[None])[0].double(), -1)
    loss, mixture_loss, mean_loss = sums.loss, sums.mixture_loss, -(sums.counts_V * log_mean_V).sum()
    centred = sums.squared_norm - tokens * mean_D.square().sum()
    figures = {"prediction_divergence": sums.divergence / tokens, "top1_agreement": sums.agreements / tokens}
    if (mean_loss - loss).abs() > ROUNDING * loss:
        figures["prediction_recovered"] = 1 - (mixture_loss - loss) / (mean_loss - loss)
    if centred > ROUNDING * sums.squared_norm:
        figures["unexplained_centred_variance"] = sums.squared_residual / centred
    return figures
