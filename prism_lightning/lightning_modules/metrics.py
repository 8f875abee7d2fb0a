"""Metrics of a language model and of its prototypes (docs/method.md, "Reported figures"). K: number of prototypes."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torchmetrics import Metric


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
