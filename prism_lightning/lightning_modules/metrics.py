"""Metrics of a language model and of its prototypes (docs/method.md, "Reported figures").

K: number of prototypes, D: hidden size, V: vocabulary, N: tokens of a batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torchmetrics import Metric

from prism_lightning.models.faithfulness import PredictionSums, prediction_sums


class LanguageModelingMetric(Metric):
    """The mean cross-entropy in nats per token, from the means of batches weighted by their tokens.

    The head computes the cross-entropy without [tokens, vocabulary] logits, which a stock metric would need.
    """

    nats: Tensor
    tokens: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("nats", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("tokens", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, cross_entropy: Tensor, tokens: int) -> None:
        """Add a batch: its mean cross-entropy in nats per token and its number of tokens."""
        self.nats += cross_entropy.detach().double() * tokens
        self.tokens += tokens

    def compute(self) -> Tensor:
        """Return the mean loss in nats per token."""
        return self.nats / self.tokens


def derived(loss: Tensor, bytes_per_token: float) -> dict[str, Tensor]:
    """Return loss (nats per token), perplexity (per token) and bits per UTF-8 byte."""
    return {"loss": loss, "perplexity": loss.exp(), "bits_per_byte": loss / (math.log(2) * bytes_per_token)}


class PrototypeUsage(Metric):
    """Dead share, entropy of usage and active prototypes per token."""

    counts: Tensor
    tokens: Tensor

    def __init__(self, num_prototypes: int) -> None:
        super().__init__()
        self.add_state("counts", torch.zeros(num_prototypes, dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("tokens", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, counts_K: Tensor, tokens: int) -> None:
        """Add a batch: the number of tokens for which each prototype was active [K], and the number of all tokens."""
        self.counts += counts_K
        self.tokens += tokens

    def compute(self) -> dict[str, Tensor]:
        """Return `dead_share` (of K), `usage_entropy` (as a share of log K; 1 is even use) and `active_per_token`."""
        share_K = self.counts / self.counts.sum().clamp_min(1)
        entropy = -torch.xlogy(share_K, share_K).sum() / math.log(max(2, len(share_K)))
        return {
            "dead_share": (self.counts == 0).float().mean(),
            "usage_entropy": entropy,
            "active_per_token": self.counts.sum() / self.tokens.clamp_min(1),
        }


class Faithfulness(Metric):
    """How much of the predictions the mixture carries without the residual, on a sample of the tokens."""

    EVERY = 7  # tokens; two more products with the head for all tokens would take as long as the rest of a validation

    def __init__(self, hidden_size: int, vocab_size: int) -> None:
        super().__init__()
        sizes = {"hidden_D": (hidden_size,), "counts_V": (vocab_size,)}
        for name in PredictionSums._fields:
            self.add_state(name, torch.zeros(sizes.get(name, ()), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, head: Callable[[Tensor], Tensor], z_ND: Tensor, mixture_ND: Tensor, targets_N: Tensor) -> None:
        """Add every seventh token of a batch.

        Args:
            head: returns logits of hidden states; it is called twice, on every rank alike.
            z_ND, mixture_ND: hidden states and their mixtures of prototypes.
            targets_N: target tokens.
        """
        z_ND, mixture_ND, targets_N = (rows[:: self.EVERY] for rows in (z_ND, mixture_ND, targets_N))
        values = prediction_sums(head, z_ND, mixture_ND, targets_N)
        for name, value in values._asdict().items():
            setattr(self, name, getattr(self, name) + value)

    def compute(self) -> PredictionSums:
        """Return the sums over all batches and ranks."""
        return PredictionSums(*(getattr(self, name) for name in PredictionSums._fields))
