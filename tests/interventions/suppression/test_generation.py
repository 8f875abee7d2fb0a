"""Sampling with a cache of our own: the logits and tokens of `generate`, the distribution of the softmax."""

import numpy as np
import pytest
import torch

from prism_lightning.interventions.suppression.generation import GumbelNoise, sample_continuations

NO_ROWS = np.arange(0)


def greedy(model, logits=None):
    """A choice of the likeliest token; keeps the logits it saw."""

    def choose(z_ND, context_Nc, prompts_N, step):
        logits_NV = model.logits(z_ND)
        if logits is not None:
            logits.append(logits_NV)
        return logits_NV.argmax(-1)

    return choose


@pytest.fixture
def model(make_model, backbone):
    return make_model(backbone, num_prototypes=16, active_prototypes=2).eval()


@pytest.fixture
def ids_BP():
    return torch.randint(0, 300, (6, 9), generator=torch.Generator().manual_seed(0))


def test_logits_with_the_cache_are_those_without(model, ids_BP):
    logits = []
    tokens_BT, z_BTD = sample_continuations(model, ids_BP, np.arange(6), range(12), greedy(model, logits), None)
    with torch.no_grad():
        whole_BSV = model(torch.cat([ids_BP, tokens_BT], 1)).logits[:, 8:-1]
    assert torch.allclose(torch.stack(logits, 1), whole_BSV, atol=1e-5)
    assert torch.allclose(model.logits(z_BTD), whole_BSV, atol=1e-5)


def test_greedy_continuations_are_those_of_generate(model, ids_BP):
    """Also where rows end at different places, so that the cache drops some while others go on."""
    free_BT, _ = sample_continuations(model, ids_BP, np.arange(6), range(20), greedy(model), None)
    end = int(free_BT[2, 3])  # so that at least one text ends early
    tokens_BT, _ = sample_continuations(model, ids_BP, np.arange(6), range(20), greedy(model), end)
    settings = {"attention_mask": torch.ones_like(ids_BP), "do_sample": False, "max_new_tokens": 20}
    out_BT = model.generate(ids_BP, eos_token_id=end, pad_token_id=end, **settings)[:, 9:]
    lengths = []
    for row, expected in zip(tokens_BT.tolist(), out_BT.tolist(), strict=True):
        expected = expected[: expected.index(end) + 1] if end in expected else expected
        assert row[: len(expected)] == expected and set(row[len(expected) :]) <= {-1}
        lengths.append(len(expected))
    assert min(lengths) <= 4


def test_noise_makes_samples_of_the_softmax():
    logits_V = torch.tensor([2.0, 1.0, 0.0, -1.0, -3.0, 0.5, 0.5])  # an odd number of tokens
    noise_NV = GumbelNoise(0, 10, 7)(np.arange(20_000) // 10, np.arange(20_000) % 10)
    counts_V = torch.bincount((logits_V + noise_NV).argmax(-1), minlength=7)
    expected_V = logits_V.softmax(-1) * 20_000
    assert ((counts_V - expected_V) ** 2 / expected_V).sum() < 22.5  # chi-square of 6, .1 %
    assert noise_NV.isfinite().all()
    assert noise_NV.mean() == pytest.approx(0.5772, abs=0.02) and noise_NV.var() == pytest.approx(
        np.pi**2 / 6, abs=0.05
    )


def test_noise_is_that_of_the_prompt_and_the_step_whatever_is_asked_beside_it():
    noise = GumbelNoise(3, 5, 11)
    every_NV = noise(np.repeat(np.arange(4), 5), np.tile(np.arange(5), 4))
    assert torch.equal(noise([2, 0], [4, 1]), every_NV[[14, 1]])
    assert torch.equal(GumbelNoise(3, 5, 11)([3], [0]), every_NV[[15]])
    assert not torch.equal(GumbelNoise(4, 5, 11)([3], [0]), every_NV[[15]])
    assert len(every_NV.unique()) == every_NV.numel()  # no place has another's noise
