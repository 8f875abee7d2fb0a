"""Records are the gradient of a token's loss with respect to the prototypes, as autograd gives it."""

import pytest
import torch
import torch.nn.functional as F
from support.corpus_model import hidden_and_targets

from benchmarks.choices.variants import activation_path_gradients, residual_gradient
from prism_lightning.attribution.curvature.dictionary import Dictionary
from prism_lightning.attribution.curvature.records import (
    Records,
    contrast_gradient,
    contrast_losses,
    head_chunks,
    loss_gradients,
    residuals,
)


@pytest.fixture
def tokens(model, store):
    """float64 hidden states, their targets, the head and the prototypes."""
    model = model.double()
    z_ND, targets_N = hidden_and_targets(model, store)
    return z_ND[:200], targets_N[:200], model.lm_head.weight.detach(), model.prototypes.weight.detach()


def deltas(head_VD, z_ND, targets_N):
    return loss_gradients(head_VD, z_ND, targets_N)[1]


def mixture_of(prototypes_KD, z_D, indices_k, with_activations):
    """zhat of one token; its activations differentiable or held fixed."""
    activations_k = F.cosine_similarity(z_D[None], prototypes_KD[indices_k]).clamp_min(0)
    if not with_activations:
        activations_k = activations_k.detach()
    return activations_k @ prototypes_KD[indices_k]


@pytest.mark.parametrize("activation_path", [False, True])
@pytest.mark.parametrize("objective", ["cross_entropy", "training"])
def test_records_equal_autograd(tokens, activation_path, objective):
    """The loss sees the residual held fixed, z = r + zhat(P): the routing of method section 2.

    The index has the first case; `benchmarks.choices` the others.
    """
    z_ND, targets_N, head_VD, prototypes_KD = tokens
    scale = 0.7 if objective == "training" else 0.0
    dictionary = Dictionary(prototypes_KD, 3)
    records = Records(*dictionary.assign(z_ND), deltas(head_VD, z_ND, targets_N))
    gradients_NkD = records.gradients_NkD()
    if scale:
        records = residual_gradient(dictionary, z_ND, records, scale)
        gradients_NkD = records.gradients_NkD()
    if activation_path:
        gradients_NkD = activation_path_gradients(dictionary, z_ND, records)
    for t in range(0, 200, 20):
        leaf_KD = prototypes_KD.clone().requires_grad_()
        mixture_D = mixture_of(leaf_KD, z_ND[t], records.prototypes_Nk[t], activation_path)
        routed_D = z_ND[t] - mixture_D.detach() + mixture_D
        loss = F.cross_entropy((head_VD @ routed_D)[None], targets_N[t : t + 1])
        # w_rec |r|^2 / norm, whose gradient with respect to zhat is -2 w_rec r / norm = -scale r
        loss = loss + scale / 2 * (z_ND[t] - mixture_D).square().sum()
        (expected_KD,) = torch.autograd.grad(loss, leaf_KD)
        got_KD = torch.zeros_like(expected_KD).index_add_(0, records.prototypes_Nk[t], gradients_NkD[t])
        assert (got_KD - expected_KD).abs().max() < 1e-12


def test_a_contrast_is_the_gradient_of_two_logits(tokens):
    z_ND, targets_N, head_VD, _ = tokens
    leaf_ND = z_ND.clone().requires_grad_()
    other_N = (targets_N + 1) % 300
    logits_NV = leaf_ND @ head_VD.T
    difference = logits_NV.gather(1, other_N[:, None]) - logits_NV.gather(1, targets_N[:, None])
    (expected_ND,) = torch.autograd.grad(difference.sum(), leaf_ND)
    assert torch.allclose(contrast_gradient(head_VD, targets_N, other_N), expected_ND)
    assert torch.allclose(contrast_losses(head_VD, z_ND, targets_N, other_N), difference[:, 0], atol=1e-12)


def test_residuals_and_gradients_are_those_of_the_logits_that_are_given(tokens):
    """As with an intervention, which changes the logits but not the hidden states."""
    z_ND, targets_N, head_VD, _ = tokens

    def logits_of(z_CD):
        return 0.5 * z_CD @ head_VD.T + torch.linspace(0, 1, 300)

    logits_NV = logits_of(z_ND).requires_grad_()
    losses_N = F.cross_entropy(logits_NV, targets_N, reduction="none")
    (gradient_NV,) = torch.autograd.grad(losses_N.sum(), logits_NV)
    got = residuals(head_VD, z_ND, targets_N, 4, logits_of)
    assert torch.allclose(got.losses_N, losses_N, atol=1e-12)
    assert torch.allclose(got.values_Nc, -gradient_NV.gather(1, got.tokens_Nc), atol=1e-12)
    got_losses_N, delta_ND = loss_gradients(head_VD, z_ND, targets_N, logits_of)
    assert torch.equal(got_losses_N, got.losses_N)
    assert torch.allclose(delta_ND, gradient_NV @ head_VD, atol=1e-12)


def test_chunks_of_the_head_do_not_show(tokens, monkeypatch):
    z_ND, targets_N, head_VD, _ = tokens
    whole_ND = deltas(head_VD, z_ND, targets_N)
    monkeypatch.setattr("prism_lightning.attribution.curvature.records.CHUNK_BYTES", 7 * 300 * 8)
    assert len(list(head_chunks(head_VD, z_ND))) == 29
    assert torch.allclose(deltas(head_VD, z_ND, targets_N), whole_ND, atol=1e-14)
