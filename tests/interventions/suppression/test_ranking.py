"""Removal effects against removing one prototype at a time from the whole model."""

import numpy as np
import pytest
from support.text_losses import text_losses

from prism_lightning.interventions.hidden_states import batches
from prism_lightning.interventions.intervention import temporary_scaling
from prism_lightning.interventions.suppression.behaviours import WordBehaviour, marked_passages
from prism_lightning.interventions.suppression.conditions import WordBias
from prism_lightning.interventions.suppression.random_draws import usage_matched_prototypes
from prism_lightning.interventions.suppression.ranking import Effects, RankingTexts, removal_effects
from prism_lightning.models.steering import Scaling

TEXTS = [
    "import os\nimport sys\n",
    "def f(self):\n    return self\n",
    "class A:\n    pass\n",
    "return None\n",
    "x = 1\n",
] * 2


@pytest.fixture(scope="module")
def effects(loaded):
    model, tokenizer = loaded
    behaviour = WordBehaviour(["self"], tokenizer)
    shows_behaviour = np.array([behaviour.present(text) for text in TEXTS])
    pieces = marked_passages(TEXTS, [behaviour.spans(text) for text in TEXTS], tokenizer, model.config.context_length)
    tokens = WordBias.of(["self"], tokenizer, 0.0).first_tokens()
    texts = RankingTexts(pieces, shows_behaviour)
    return pieces, shows_behaviour, *removal_effects(model, texts, lambda *_: None, tokens), tokens


def test_work_and_cost_are_what_removing_the_prototype_from_the_model_does(loaded, effects):
    model, _ = loaded
    pieces, shows_behaviour, from_all, *_ = effects
    marked = sum(p.marked_T.sum() for p in pieces)
    assert from_all.behaviour_tokens == marked > 0
    assert from_all.other_tokens == sum(len(p.marked_T) for p in pieces if not shows_behaviour[p.text])
    states = list(batches(model, pieces))
    plain_G, tokens_G = text_losses(model, states, len(TEXTS))
    for prototype in np.argsort(-from_all.usage_K)[:8].tolist():
        with temporary_scaling(model, Scaling({prototype: 0.0})):
            losses_G, _ = text_losses(model, states, len(TEXTS))
        rise = (losses_G - plain_G)[~shows_behaviour].sum() / tokens_G[~shows_behaviour].sum()
        assert from_all.collateral_effect_K[prototype] == pytest.approx(rise, abs=2e-5)
    assert np.abs(from_all.collateral_effect_K).max() > 1e-3 and np.abs(from_all.behaviour_effect_K).max() > 1e-3


def test_removal_from_some_logits_is_that_of_the_model_too(loaded, effects):
    model, _ = loaded
    pieces, shows_behaviour, from_all, from_tokens, tokens = effects
    states = list(batches(model, pieces))
    plain_G, tokens_G = text_losses(model, states, len(TEXTS))
    for prototype in np.argsort(-np.abs(from_tokens.collateral_effect_K))[:4].tolist():
        with temporary_scaling(model, Scaling({prototype: 0.0}, tokens)):
            losses_G, _ = text_losses(model, states, len(TEXTS))
        rise = (losses_G - plain_G)[~shows_behaviour].sum() / tokens_G[~shows_behaviour].sum()
        assert from_tokens.collateral_effect_K[prototype] == pytest.approx(rise, abs=2e-5)
    assert np.abs(from_tokens.collateral_effect_K).sum() < np.abs(from_all.collateral_effect_K).sum() / 2


def test_errors_are_those_of_a_ratio_over_texts(loaded, effects):
    """The same from the texts' own sums, for one prototype."""
    model, _ = loaded
    pieces, shows_behaviour, from_all, *_ = effects
    prototype = int(np.argmax(np.abs(from_all.collateral_effect_K)))
    states = list(batches(model, pieces))
    plain_G, tokens_G = text_losses(model, states, len(TEXTS))
    with temporary_scaling(model, Scaling({prototype: 0.0})):
        losses_G, _ = text_losses(model, states, len(TEXTS))
    rise, tokens = (losses_G - plain_G)[~shows_behaviour], tokens_G[~shows_behaviour]
    mean = rise.sum() / tokens.sum()
    expected = np.sqrt(((rise - mean * tokens) ** 2).sum()) / tokens.sum()
    assert from_all.collateral_effect_error_K[prototype] == pytest.approx(expected, rel=1e-3)


def test_only_prototypes_that_work_beyond_doubt_are_ranked(effects):
    _, _, from_all, *_ = effects
    ranked = from_all.ranked()
    assert all(from_all.behaviour_effect_K[i] > 3 * from_all.behaviour_effect_error_K[i] for i in ranked)
    assert len(set(ranked)) == len(ranked) < len(from_all.behaviour_effect_K)


def test_noise_is_not_ranked_and_work_is():
    generator, size = np.random.default_rng(0), 5000
    errors = np.full(size, 0.1)
    work = generator.normal(0, 0.1, size)
    work[[3, 7]] = 1.0, 2.0
    cost = np.full(size, 0.01)
    ranked = Effects(work, errors, cost, np.zeros(size), np.ones(size, np.int64), 100, 100).ranked()
    assert ranked[:2] == [7, 3] and len(ranked) <= 3


def test_random_prototypes_are_used_as_often_and_are_others():
    usage_K = np.arange(1000)[::-1].copy()
    chosen = [10, 500, 990]
    matches = usage_matched_prototypes(chosen, usage_K, np.random.default_rng(0))
    assert not set(matches) & set(chosen) and len(set(matches)) == 3
    assert all(abs(int(usage_K[a]) - int(usage_K[b])) <= 20 for a, b in zip(matches, chosen, strict=True))
