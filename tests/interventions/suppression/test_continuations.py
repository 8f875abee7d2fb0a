"""Continuations under conditions: only what a condition changes is sampled anew, as sampling all would."""

import numpy as np
import pytest
import torch
from support.text_losses import text_losses
from transformers import SequenceBiasLogitsProcessor

from prism_lightning.interventions.hidden_states import batches
from prism_lightning.interventions.intervention import temporary_scaling
from prism_lightning.interventions.suppression import continuations as continuing
from prism_lightning.interventions.suppression.behaviours import marked_passages
from prism_lightning.interventions.suppression.conditions import BiasedWords, ScaledPrototypes, WordBias, read
from prism_lightning.interventions.suppression.continuations import Continuer, prompts
from prism_lightning.interventions.suppression.settings import Sampling
from prism_lightning.models.steering import Scaling
from prism_lightning.run.training_data import data_of


@pytest.fixture(scope="module")
def texts(run):
    return data_of(run).train.texts(range(60))


@pytest.fixture(scope="module")
def starts(texts, loaded):
    return prompts(texts, loaded[1], Sampling(new_tokens=10), 40)


@pytest.fixture(scope="module")
def continuer(loaded, starts):
    return Continuer(loaded[0], starts, Sampling(new_tokens=10))


def conditions(model, tokenizer):
    words = WordBias.of(["self", "("], tokenizer, -3.0)
    return {
        "some prototypes": ScaledPrototypes(model, Scaling({3: 0.0, 17: 2.0})),
        "all prototypes": ScaledPrototypes(model, Scaling(dict.fromkeys(range(64), 0.0))),
        "words' logits": ScaledPrototypes(model, Scaling(dict.fromkeys(range(32), 0.0), words.first_tokens())),
        "bias": BiasedWords(model, words),
    }


@pytest.mark.parametrize("name", ["some prototypes", "all prototypes", "words' logits", "bias"])
def test_a_condition_samples_what_sampling_every_token_would(loaded, continuer, monkeypatch, name):
    """Against continuing every prompt from its beginning, with the condition's logits in all places."""
    condition = conditions(*loaded)[name]
    monkeypatch.setattr(continuing, "BATCH_PROMPTS", 7)  # several batches, each from its own first change
    new = continuer.under(condition)
    every_BT, _ = continuer._sample(np.arange(len(continuer.prompts_BP)), 0, condition.logits, lambda _: None)
    assert torch.equal(new.tokens_BT, every_BT)
    changed = (new.tokens_BT != continuer.plain.tokens_BT).any(1)
    # Ten tokens are never all the same without any prototype. Fewer may be: a text that ends at once often does so too.
    whole = continuer.plain.tokens_BT[:, -1] >= 0
    assert changed.any() and whole.sum() > len(whole) / 2
    assert changed[whole].all() if name == "all prototypes" else not changed[whole].all()


def test_the_same_seed_continues_alike_and_another_does_not(loaded, continuer, starts):
    model, _ = loaded
    again = Continuer(model, starts[:9], Sampling(new_tokens=10))
    assert torch.equal(again.plain.tokens_BT, continuer.plain.tokens_BT[:9])  # whatever prompts are beside them
    other = Continuer(model, starts[:9], Sampling(new_tokens=10, seed=1))
    assert not torch.equal(again.plain.tokens_BT, other.plain.tokens_BT)
    assert all(len(ids) <= 10 for ids in again.plain.ids())


def test_losses_of_continuations_are_those_of_the_plain_model(loaded, continuer, starts):
    model, tokenizer = loaded
    for new in (continuer.plain, continuer.under(conditions(model, tokenizer)["all prototypes"])):
        row = int(new.text_BT.sum(1).argmax())
        ids = torch.tensor([[*starts[row], *new.ids()[row]]])
        with torch.no_grad():
            expected = torch.nn.functional.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="sum")
        assert float(new.prompt_losses_BP[row].sum() + new.losses_BT[row][new.text_BT[row]].sum()) == pytest.approx(
            float(expected), rel=1e-4
        )


def test_text_behind_its_end_does_not_count(loaded, starts, monkeypatch):
    model, _ = loaded
    monkeypatch.setattr(model.generation_config, "eos_token_id", None)
    whole_BT = Continuer(model, starts, Sampling(new_tokens=10)).plain.tokens_BT
    end = int(whole_BT[0, 4])
    monkeypatch.setattr(model.generation_config, "eos_token_id", end)
    ended = Continuer(model, starts, Sampling(new_tokens=10)).plain
    for ids, whole in zip(ended.ids(), whole_BT.tolist(), strict=True):
        assert ids == (whole[: whole.index(end)] if end in whole else whole)
    assert len(ended.ids()[0]) <= 4 and (ended.losses_BT[ended.tokens_BT < 0] == 0).all()


@pytest.mark.parametrize("name", ["some prototypes", "all prototypes", "words' logits", "bias"])
def test_losses_of_clean_texts_are_those_of_all_logits(loaded, texts, name):
    model, tokenizer = loaded
    condition, words = conditions(model, tokenizer)[name], WordBias.of(["self", "("], tokenizer, 0.0)
    pieces = marked_passages(texts, [[] for _ in texts], tokenizer, model.config.context_length)
    for states in batches(model, pieces):
        losses_N = condition.losses(read(model, states, words))
        logits_NV = condition.logits(states.z_ND, states.context_Nc)
        expected_N = torch.nn.functional.cross_entropy(logits_NV, states.targets_N, reduction="none")
        assert torch.allclose(losses_N, expected_N, atol=1e-4)


def test_scaled_prototypes_are_those_of_the_model(loaded, texts):
    model, tokenizer = loaded
    pieces = marked_passages(texts, [[] for _ in texts], tokenizer, model.config.context_length)
    states = next(iter(batches(model, pieces)))
    own, scaling = Scaling({5: 0.5, 3: 2.0}), Scaling({3: 0.0, 17: 2.0}, (7, 9))
    with temporary_scaling(model, own):  # on top of the model's own
        condition = ScaledPrototypes(model, scaling)
        with temporary_scaling(model, scaling):
            assert torch.equal(condition.logits(states.z_ND, states.context_Nc), model.logits(states.z_ND))
    assert model.scalings == []


def test_a_bias_is_that_of_transformers(loaded, texts):
    model, tokenizer = loaded
    words = WordBias.of(["self", "return", "("], tokenizer, -2.5)
    assert any(len(ids) > 1 for ids in words.sequences)  # which look at the tokens before
    processor = SequenceBiasLogitsProcessor([[list(ids), words.bias] for ids in words.sequences])
    pieces = marked_passages(texts, [[] for _ in texts], tokenizer, model.config.context_length)
    states = next(iter(batches(model, pieces)))
    expected_NV = processor(states.context_Nc, model.logits(states.z_ND))
    biased_NV = BiasedWords(model, words).logits(states.z_ND, states.context_Nc)
    assert torch.allclose(biased_NV, expected_NV, atol=1e-5)


def test_a_bias_on_words_raises_their_loss_and_that_of_no_other_text(loaded):
    model, tokenizer = loaded
    texts = ["import os\nimport sys\n", "def f(self):\n    return self\n", "class A:\n    pass\n", "x = 1\n"] * 2
    pieces = marked_passages(texts, [[] for _ in texts], tokenizer, model.config.context_length)
    states = list(batches(model, pieces))
    words = WordBias.of(["self"], tokenizer, -8.0)
    plain_G, _ = text_losses(model, states, len(texts))
    biased_G = np.zeros(len(texts))
    for part in states:
        losses_N = BiasedWords(model, words).losses(read(model, part, words))
        biased_G += np.bincount(part.text_N, losses_N.numpy(), len(texts))
    assert all(biased > plain + 4 for biased, plain, t in zip(biased_G, plain_G, texts, strict=True) if "self" in t)
    assert all(
        biased < plain + 1e-3 for biased, plain, t in zip(biased_G, plain_G, texts, strict=True) if "self" not in t
    )
