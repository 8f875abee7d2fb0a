"""The decoder with its head: exact logits, gradient routing, Hugging Face round trips and generation."""

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from prism_lightning.models import PrismForCausalLM, decompose

PROTOTYPES = {"num_prototypes": 40, "active_prototypes": 4}


@pytest.fixture
def ids():
    return torch.randint(300, (2, 20), generator=torch.Generator().manual_seed(3))


def test_logits_are_backbone_and_head_bit_for_bit(make_model, backbone, ids):
    model = make_model(backbone, **PROTOTYPES).eval()
    expected = F.linear(model.backbone(input_ids=ids).last_hidden_state, model.lm_head.weight)
    assert torch.equal(model(ids).logits, expected)


def test_twins_start_from_the_same_decoder(make_model, backbone, ids):
    dense, prism = make_model(backbone), make_model(backbone, **PROTOTYPES)
    assert dense.prototypes is None
    assert torch.equal(dense.eval()(ids).logits, prism.eval()(ids).logits)


@pytest.mark.parametrize("to_prototypes", [False, True])
def test_routing_backbone_gradient_equals_the_dense_one(make_model, backbone, ids, to_prototypes):
    targets = ids.roll(-1, 1)
    dense = make_model(backbone)
    dense.objective(ids, targets).loss.backward()
    prism = make_model(backbone, **PROTOTYPES, commitment=0.0, cross_entropy_to_prototypes=to_prototypes)
    prism.objective(ids, targets).loss.backward()
    gradients = dict(prism.named_parameters())
    for name, parameter in dense.named_parameters():
        torch.testing.assert_close(gradients[name].grad, parameter.grad)


def test_routing_prototypes_receive_activation_times_delta(make_model, backbone, ids):
    targets = ids.roll(-1, 1)
    model = make_model(
        backbone,
        **PROTOTYPES,
        cross_entropy_to_prototypes=True,
        reconstruction_weight=0.0,
        prototype_to_token_weight=0.0,
        token_to_prototype_weight=0.0,
    )
    result = model.objective(ids, targets)
    result.loss.backward()
    probabilities = F.linear(result.hidden_ND, model.lm_head.weight).softmax(-1)
    onehot = F.one_hot(targets.flatten(), 300)
    delta = (probabilities - onehot) @ model.lm_head.weight / targets.numel()
    activations = torch.zeros(targets.numel(), 40).scatter(1, result.mixture.indices_Nk, result.mixture.activations_Nk)
    torch.testing.assert_close(model.prototypes.weight.grad, activations.T @ delta, atol=1e-7, rtol=1e-4)


def test_commitment_sends_gradients_to_the_backbone(make_model, ids):
    targets = ids.roll(-1, 1)
    grads = []
    for commitment in (0.0, 1.0):
        model = make_model(**PROTOTYPES, commitment=commitment)
        model.objective(ids, targets).loss.backward()
        grads.append(model.backbone.h[0].mlp.c_fc.weight.grad)
    assert not torch.allclose(grads[0], grads[1], rtol=1e-3)


def test_objective_is_the_weighted_sum_of_its_parts(make_model, ids):
    model = make_model(
        **PROTOTYPES, reconstruction_weight=2.0, prototype_to_token_weight=3.0, token_to_prototype_weight=5.0
    )
    result = model.objective(ids, ids)
    r, p2t, t2p = result.terms[:3]
    torch.testing.assert_close(result.loss, result.cross_entropy + 2 * r + 3 * p2t + 5 * t2p)
    torch.testing.assert_close(result.cross_entropy, F.cross_entropy(model(ids).logits.flatten(0, 1), ids.flatten()))


def test_bf16_autocast_stays_close(make_model, ids):
    model = make_model(**PROTOTYPES)
    exact = model.objective(ids, ids)
    with torch.autocast("cpu", torch.bfloat16):
        half = model.objective(ids, ids)
    half.loss.backward()
    torch.testing.assert_close(half.cross_entropy.float(), exact.cross_entropy, rtol=1e-2, atol=0)
    assert torch.isfinite(model.prototypes.weight.grad).all()


def test_labels_follow_the_hugging_face_convention(make_model, ids):
    model = make_model(**PROTOTYPES).eval()
    expected = F.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(model(ids, labels=ids).loss, expected)


@pytest.mark.parametrize("prototypes", [{}, PROTOTYPES])
def test_round_trip_keeps_the_logits(make_model, backbone, ids, tmp_path, prototypes):
    model = make_model(backbone, **prototypes).eval()
    model.save_pretrained(tmp_path)
    assert {p.suffix for p in tmp_path.iterdir()} == {".json", ".safetensors"}
    for again in (PrismForCausalLM.from_pretrained(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path)):
        assert torch.equal(again.eval()(ids).logits, model(ids).logits)
        for name, value in model.state_dict().items():
            assert torch.equal(again.state_dict()[name], value), name


def test_generation_with_and_without_cache_agrees(make_model, backbone, ids):
    model = make_model(backbone, **PROTOTYPES).eval()
    settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(ids, **settings), model.generate(ids, use_cache=False, **settings))


def test_matrix_parameters_leave_out_what_is_only_looked_up(make_model):
    model = make_model(**PROTOTYPES)
    everything = sum(p.numel() for p in model.parameters())
    assert model.matrix_parameters == everything - 64 * 32 - 40 * 32  # positions and prototypes; the tied head counts


@pytest.mark.parametrize("chosen", [None, "given"])
def test_decomposition_adds_up_to_the_logit(make_model, backbone, ids, chosen):
    model = make_model(backbone, **PROTOTYPES).eval()
    model.prototypes.weight.data.normal_()
    targets = ids.roll(-1, 1) if chosen else None
    split = decompose(model, ids, targets)
    logits = model(ids).logits
    targets = logits.argmax(-1) if targets is None else targets
    assert torch.equal(split.logit_BT, logits.gather(-1, targets[..., None])[..., 0])
    torch.testing.assert_close(split.total_BT, split.logit_BT, atol=1e-4, rtol=0)
    p, a = split.prototypes_BTk[0, 3, 1], split.activations_BTk[0, 3, 1]
    term = a * model.lm_head.weight[targets[0, 3]] @ model.prototypes.weight[p]
    torch.testing.assert_close(split.contributions_BTk[0, 3, 1], term)
    mixture_ND = model.prototypes(model.hidden_states(ids).flatten(0, 1))[0].mixture_ND
    alone_BTV = model.lm_head(mixture_ND).log_softmax(-1).view_as(logits)
    expected = alone_BTV.gather(-1, targets[..., None])[..., 0]
    torch.testing.assert_close(split.mixture_log_probability_BT, expected, atol=1e-4, rtol=0)


def test_dense_models_have_nothing_to_decompose(make_model, ids):
    with pytest.raises(ValueError, match="dense"):
        decompose(make_model(), ids)
