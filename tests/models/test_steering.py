"""Scaled prototype terms against the decomposition they scale."""

import pytest
import torch

from prism_lightning.common.errors import UserError
from prism_lightning.models import PrismForCausalLM, decompose
from prism_lightning.models.steering import Scaling, merged


@pytest.fixture
def model(make_model, backbone):
    model = make_model(backbone, num_prototypes=24, active_prototypes=3).eval()
    torch.manual_seed(1)
    model.prototypes.weight.data.normal_()
    return model


@pytest.fixture
def ids():
    return torch.randint(0, 300, (2, 20), generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def logits(model, ids):
    return model(ids).logits


def test_nothing_and_factor_one_change_no_bit(model, ids):
    before = logits(model, ids)
    for scalings in ([], [Scaling({3: 1})], [Scaling({3: 1}, (5, 6))], [Scaling(dict.fromkeys(range(24), 1.0))]):
        model.intervene(*scalings)
        assert torch.equal(logits(model, ids), before) and model.scalings == []


@pytest.mark.parametrize("factor", [0.0, 0.5, 2.0, -1.0])
def test_a_factor_changes_the_logits_by_exactly_its_prototypes_term(model, ids, factor):
    before = logits(model, ids)
    with torch.no_grad():
        z_ND = model.hidden_states(ids).flatten(0, 1)
        mixture = model.prototypes(z_ND)[0]
    for chosen in mixture.indices_Nk[7].tolist():
        a_N = (mixture.activations_Nk * (mixture.indices_Nk == chosen)).sum(-1)
        with torch.no_grad():
            term_NV = a_N[:, None] * (model.lm_head.weight @ model.prototypes.weight[chosen])
        model.intervene(Scaling({chosen: factor}))
        change_NV = (logits(model, ids) - before).flatten(0, 1)
        assert a_N[7] > 0 and term_NV[7].abs().max() > 0.01
        torch.testing.assert_close(change_NV, (factor - 1) * term_NV, atol=2e-5, rtol=1e-4)
        assert torch.equal(change_NV[a_N == 0], torch.zeros_like(change_NV[a_N == 0]))  # bit for bit elsewhere


def test_some_logits_alone_lose_a_term_and_the_others_keep_every_bit(model, ids):
    before = logits(model, ids).flatten(0, 1)
    with torch.no_grad():
        mixture = model.prototypes(model.hidden_states(ids).flatten(0, 1))[0]
    chosen, tokens = mixture.indices_Nk[7, 0].item(), (3, 8, 200)
    a_N = (mixture.activations_Nk * (mixture.indices_Nk == chosen)).sum(-1)
    model.intervene(Scaling({chosen: 0.0}, tokens))
    change_NV = logits(model, ids).flatten(0, 1) - before
    with torch.no_grad():
        term_NY = a_N[:, None] * (model.lm_head.weight[list(tokens)] @ model.prototypes.weight[chosen])
    torch.testing.assert_close(change_NV[:, list(tokens)], -term_NY, atol=2e-5, rtol=1e-4)
    others = [token for token in range(model.config.vocab_size) if token not in tokens]
    assert term_NY.abs().max() > 0.01 and not change_NV[:, others].any()
    split = decompose(model, ids, ids)
    torch.testing.assert_close(split.total_BT, split.logit_BT, atol=2e-5, rtol=1e-4)
    meant = torch.isin(ids, torch.tensor(tokens))[..., None] & (split.prototypes_BTk == chosen)
    assert torch.equal(split.factors_BTk == 0, meant)


def test_scalings_multiply_logit_by_logit(model, ids):
    """Whole and partial ones, overlapping, against one that is spelt out."""
    model.intervene(Scaling({1: 0.5, 2: 3.0}), Scaling({1: 0.5}, (4, 5)), Scaling({1: 4.0, 3: 0.0}, (5, 6)))
    found, together = logits(model, ids), model.scalings
    assert together[0] == Scaling({1: 0.5, 2: 3.0})
    assert Scaling({1: 2.0, 3: 0.0}, (5,)) in together and merged(together) == together
    for tokens, factors in (((4,), {1: 0.25, 2: 3.0}), ((5,), {2: 3.0, 3: 0.0}), ((6,), {1: 2.0, 2: 3.0, 3: 0.0})):
        model.intervene(Scaling(factors))
        torch.testing.assert_close(found[..., tokens], logits(model, ids)[..., tokens], atol=2e-5, rtol=1e-4)
    assert merged([Scaling({1: 2.0}), Scaling({1: 0.5})]) == [] == merged([Scaling({}, (1, 2))])


def test_the_decomposition_adds_up_under_factors(model, ids):
    plain = decompose(model, ids, ids)
    model.intervene(Scaling({i: 0.25 for i in range(12)}))
    split = decompose(model, ids, ids)
    torch.testing.assert_close(split.total_BT, split.logit_BT, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(split.logit_BT, logits(model, ids).gather(-1, ids[..., None])[..., 0])
    assert torch.equal(split.residual_BT, plain.residual_BT)
    scaled = split.prototypes_BTk < 12
    assert torch.equal(split.factors_BTk, torch.where(scaled, 0.25, 1.0))
    torch.testing.assert_close(split.contributions_BTk, plain.contributions_BTk * split.factors_BTk)


def test_a_saved_model_keeps_its_factors(model, ids, tmp_path):
    model.intervene(Scaling({2: 0.0, 5: 3.0}), Scaling({7: 0.5}, (1, 2, 3)))
    expected = logits(model, ids)
    model.save_pretrained(tmp_path)
    loaded = PrismForCausalLM.from_pretrained(tmp_path).eval()
    assert (
        loaded.scalings
        == model.scalings
        == [
            Scaling({2: 0.0, 5: 3.0}),
            Scaling({7: 0.5}, (1, 2, 3)),
        ]
    )
    assert torch.equal(logits(loaded, ids), expected)
    loaded.intervene()
    model.intervene()
    assert torch.equal(logits(loaded, ids), logits(model, ids))


def test_generation_with_a_cache_is_that_of_the_whole_text(model, ids):
    """Greedy tokens, one by one from a cache, are the likeliest of the suppressed logits of the whole text."""
    model.intervene(Scaling(dict.fromkeys(range(20), 0.0)))
    prompt = ids[:, :5]
    out = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=10, do_sample=False)
    expected = logits(model, out).argmax(-1)[:, 4:-1]
    assert torch.equal(out[:, 5:], expected)
    model.intervene()
    plain = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=10, do_sample=False)
    assert not torch.equal(out, plain)


def test_training_is_not_steered(model, ids):
    before = model.objective(ids[:, :-1], ids[:, 1:]).loss
    model.intervene(Scaling({0: 0.0}))
    assert torch.equal(model.objective(ids[:, :-1], ids[:, 1:]).loss, before)


def test_gradients_pass_through_a_steered_model(model, ids):
    model.intervene(Scaling({0: 0.0}))
    model(ids, labels=ids).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.backbone.parameters())


@pytest.mark.parametrize(
    ("factors", "said"),
    [
        (({24: 0.0},), "prototype 24 is not in the model"),
        (({-1: 0.0},), "prototype -1"),
        (({1: float("nan")},), "factor nan"),
        (({1: 0.0}, (9999,)), "token 9999 is not in the vocabulary"),
    ],
)
def test_factors_that_make_no_sense_are_refused_and_leave_the_model_as_it_is(model, factors, said):
    model.intervene(Scaling({1: 0.5}))
    with pytest.raises(UserError, match=said):
        model.intervene(Scaling(*factors))
    assert model.scalings == [Scaling({1: 0.5})]


def test_a_dense_model_has_nothing_to_scale(make_model):
    with pytest.raises(UserError, match="dense"):
        make_model().intervene(Scaling({0: 0.0}))


def test_terms_follow_a_change_of_the_prototypes(make_model, ids):
    """What is computed once for all tokens is computed anew when the prototypes are written to."""
    model = make_model(num_prototypes=16)
    model.intervene(Scaling(dict.fromkeys(range(16), 0.0)))
    with torch.no_grad():
        before = model(ids).logits
        model.prototypes.weight[3:] *= -1
        after = model(ids).logits
    model.intervene(Scaling(dict.fromkeys(range(16), 0.0)))
    assert not torch.equal(before, after) and torch.equal(after, model(ids).logits)


@pytest.fixture
def pursuing(make_model, ids):
    """A model whose prototypes are chosen by pursuit, in a metric that stretches some directions."""
    model = make_model(num_prototypes=24, active_prototypes=4, encoder="pursuit").eval()
    with torch.no_grad():
        z_ND = model.hidden_states(ids).flatten(0, 1)
        model.prototypes.weight.copy_(z_ND[:24] / 2)
        model.prototypes.metric.diagonal().copy_(torch.linspace(0.5, 2, z_ND.shape[1]))
    return model


def test_pursuit_factor_one_changes_no_bit_and_zero_takes_a_term_away(pursuing, ids):
    before = logits(pursuing, ids)
    pursuing.intervene(Scaling(dict.fromkeys(range(24), 1.0)))
    assert torch.equal(logits(pursuing, ids), before)
    with torch.no_grad():
        z_BTD = pursuing.hidden_states(ids)
        mixture = pursuing.prototypes(z_BTD.flatten(0, 1), head_VD=pursuing.lm_head.weight)[0]
    assert (mixture.activations_Nk > 0).sum(-1).float().mean() > 2
    for chosen in mixture.indices_Nk[7][mixture.activations_Nk[7] > 0].tolist():
        a_N = (mixture.activations_Nk * (mixture.indices_Nk == chosen)).sum(-1)
        pursuing.intervene(Scaling({chosen: 0.0}))
        removed_BTD = z_BTD - (a_N[:, None] * pursuing.prototypes.weight[chosen]).view_as(z_BTD)
        found = logits(pursuing, ids)
        with torch.no_grad():
            torch.testing.assert_close(found, pursuing.lm_head(removed_BTD), atol=2e-5, rtol=1e-4)
        untouched_N = a_N == 0
        assert torch.equal(found.flatten(0, 1)[untouched_N], before.flatten(0, 1)[untouched_N])
        assert (found - before).abs().max() > 1e-3


def test_the_decomposition_of_a_pursuit_adds_up_under_factors(pursuing, ids):
    pursuing.intervene(Scaling(dict.fromkeys(range(12), 0.25)), Scaling({14: 3.0}, (1, 2)))
    split = decompose(pursuing, ids, ids)
    torch.testing.assert_close(split.total_BT, split.logit_BT, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(split.logit_BT, logits(pursuing, ids).gather(-1, ids[..., None])[..., 0])
    assert (split.factors_BTk[split.prototypes_BTk < 12] == 0.25).all()
