"""Our metrics against torchmetrics' own and explicit counts."""

import math

import pytest
import torch
from torchmetrics.text import Perplexity

from prism_lightning.lightning_modules.metrics import (
    LanguageModelingMetric,
    PrototypeUsage,
    derived,
)


def test_perplexity_equals_torchmetrics_over_uneven_batches():
    ours, theirs = LanguageModelingMetric(), Perplexity()
    for tokens in (5, 17, 2):
        logits, targets = torch.randn(1, tokens, 11), torch.randint(11, (1, tokens))
        ours.update(torch.nn.functional.cross_entropy(logits[0], targets[0]), tokens)
        theirs.update(logits, targets)
    values = derived(ours.compute(), bytes_per_token=3.0)
    assert values["perplexity"].item() == pytest.approx(theirs.compute().item(), rel=1e-5)
    assert values["bits_per_byte"].item() == pytest.approx(math.log2(values["perplexity"].item()) / 3.0)


def test_usage_counts_dead_entropy_and_active():
    metric = PrototypeUsage(4)
    metric.update(torch.tensor([2, 2, 0, 0]), tokens=2)
    metric.update(torch.tensor([2, 2, 0, 0]), tokens=6)
    values = metric.compute()
    assert values["dead_share"] == 0.5 and values["active_per_token"] == 1.0
    assert values["usage_entropy"].item() == pytest.approx(0.5)  # log 2 / log 4
