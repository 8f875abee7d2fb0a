"""Our metrics against torchmetrics' own and explicit counts."""

import math

import pytest
import torch
from torchmetrics.text import Perplexity

from prism_lightning.lightning_modules.metrics import (
    Faithfulness,
    LanguageModelingMetric,
    PrototypeUsage,
    derived,
)
from prism_lightning.models.faithfulness import faithfulness_figures


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


def faithfulness(head, batches):
    metric = Faithfulness(head.in_features, head.out_features)
    for batch in batches:
        metric.update(head, *batch)
    return {name: value.item() for name, value in faithfulness_figures(metric.compute(), head).items()}


@torch.no_grad()
def test_faithfulness_equals_its_definition_on_every_seventh_token():
    torch.manual_seed(0)
    head = torch.nn.Linear(6, 11, bias=False)
    batches = [(z := torch.randn(n, 6) + 1, z + 0.3 * torch.randn(n, 6), torch.randint(11, (n,))) for n in (29, 15)]
    z, mixture, targets = (torch.cat([batch[i][::7] for batch in batches]) for i in range(3))
    assert len(z) == 5 + 3
    losses = [torch.nn.functional.cross_entropy(head(x), targets) for x in (z, mixture, z.mean(0).expand_as(z))]
    p, q = (torch.distributions.Categorical(logits=head(x)) for x in (z, mixture))
    expected = {
        "prediction_recovered": 1 - (losses[1] - losses[0]) / (losses[2] - losses[0]),
        "prediction_divergence": torch.distributions.kl_divergence(p, q).mean(),
        "top1_agreement": (p.logits.argmax(-1) == q.logits.argmax(-1)).float().mean(),
        "unexplained_centred_variance": (z - mixture).square().sum() / (z - z.mean(0)).square().sum(),
    }
    assert faithfulness(head, batches) == pytest.approx(
        {name: value.item() for name, value in expected.items()}, rel=1e-4
    )


@torch.no_grad()
def test_a_mixture_that_is_exact_recovers_everything_and_the_mean_nothing():
    torch.manual_seed(0)
    head, z, targets = torch.nn.Linear(6, 11, bias=False), torch.randn(70, 6) + 1, torch.randint(11, (70,))
    exact = faithfulness(head, [(z, z, targets)])
    assert exact == pytest.approx(
        {
            "prediction_recovered": 1,
            "prediction_divergence": 0,
            "top1_agreement": 1,
            "unexplained_centred_variance": 0,
        }
    )
    mean = faithfulness(head, [(z, z[::7].mean(0).expand_as(z), targets)])
    assert mean["prediction_recovered"] == pytest.approx(0, abs=1e-5)
    assert mean["unexplained_centred_variance"] == pytest.approx(1, rel=1e-5)


@torch.no_grad()
def test_figures_of_a_single_token_are_finite_or_left_out():
    """Its hidden state is the mean: there is nothing to recover, and no variance."""
    torch.manual_seed(0)
    head, z = torch.nn.Linear(6, 11, bias=False), torch.randn(5, 6)
    figures = faithfulness(head, [(z, z + 0.1, torch.randint(11, (5,)))])
    assert all(math.isfinite(value) for value in figures.values())
    assert set(figures) >= {"prediction_divergence", "top1_agreement"}


@torch.no_grad()
def test_a_model_without_context_has_nothing_to_recover():
    torch.manual_seed(0)
    head, z = torch.nn.Linear(6, 11, bias=False), torch.ones(70, 6)
    figures = faithfulness(head, [(z, z, torch.randint(11, (70,)))])
    assert set(figures) == {"prediction_divergence", "top1_agreement"}
