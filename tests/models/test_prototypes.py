"""The prototype layer against explicit formulas over the whole [N, K] matrix."""

import pytest
import torch
import torch.nn.functional as F
from support.largest_tensor import LargestTensor

from prism_lightning.models import prototypes as module
from prism_lightning.models.prototypes import (
    PrototypeLayer,
    nearest_prototypes,
    prototypes_from,
    revived_prototypes,
    route_cross_entropy,
    selected_dots,
    unexplained_variance,
)

N, D, K, ACTIVE = 50, 16, 24, 3


@pytest.fixture
def layer():
    torch.manual_seed(0)
    layer = PrototypeLayer(K, D, ACTIVE)
    layer.weight.data.normal_()
    return layer


@pytest.fixture
def z():
    return torch.randn(N, D, generator=torch.Generator().manual_seed(1))


def explicit(z, weight):
    """Cosines, activations and mixture from the whole matrix, differentiable by plain autograd."""
    cosine = F.normalize(z, dim=-1) @ F.normalize(weight, dim=-1).T
    mask = torch.zeros_like(cosine).scatter(1, cosine.topk(ACTIVE, dim=-1).indices, 1.0)
    activation = cosine.clamp_min(0) * mask
    return cosine, activation, activation @ weight


@pytest.mark.parametrize("chunk_rows", [1, 7, 1000])
def test_search_finds_what_brute_force_finds(z, layer, chunk_rows, monkeypatch):
    monkeypatch.setattr(module, "SEARCH_CHUNK_BYTES", chunk_rows * 4 * K)
    unit_z, unit_p = F.normalize(z, dim=-1), F.normalize(layer.weight.detach(), dim=-1)
    cosines, indices, token_of = nearest_prototypes(unit_z, unit_p, ACTIVE)
    whole = unit_z @ unit_p.T
    torch.testing.assert_close(cosines, whole.topk(ACTIVE, dim=-1).values)
    torch.testing.assert_close(whole.gather(1, indices), cosines)
    torch.testing.assert_close(whole[token_of, torch.arange(K)], whole.max(dim=0).values)


def test_mixture_equals_explicit_formula(z, layer):
    mixture, terms = layer(z)
    assert terms is None
    _, activation, expected = explicit(z, layer.weight)
    torch.testing.assert_close(mixture.mixture_ND, expected)
    torch.testing.assert_close(activation.gather(1, mixture.indices_Nk), mixture.activations_Nk)
    assert (mixture.activations_Nk >= 0).all()


@pytest.mark.parametrize("commitment", [0.0, 0.3, 1.0])
def test_gradients_of_all_terms_equal_autograd(z, layer, commitment):
    z1 = z.clone().requires_grad_()
    _, terms = layer(z1, commitment=commitment)
    (2 * terms.reconstruction + 3 * terms.prototype_to_token + 5 * terms.token_to_prototype).backward()

    z2, weight = z.clone().requires_grad_(), layer.weight.detach().clone().requires_grad_()
    cosine, _, mixture = explicit(z2, weight)
    reconstruction = (z2 - mixture).square().sum(-1).mean() / z.square().sum(-1).mean()
    (2 * reconstruction + 3 * (1 - cosine.max(0).values).mean() + 5 * (1 - cosine.max(1).values).mean()).backward()
    torch.testing.assert_close(layer.weight.grad, weight.grad)
    gradient = torch.zeros_like(z) if z1.grad is None else z1.grad
    torch.testing.assert_close(gradient, commitment * z2.grad)


def test_gradient_scale_scales_the_prototypes_gradient_alone(z, layer):
    grads = []
    for scale in (1.0, 1e-3):
        z1 = z.clone().requires_grad_()
        layer.weight.grad = None
        _, terms = layer(z1, commitment=1.0, gradient_scale=scale)
        terms.reconstruction.backward()
        grads.append((z1.grad, layer.weight.grad))
    torch.testing.assert_close(grads[1][0], grads[0][0])
    torch.testing.assert_close(grads[1][1], 1e-3 * grads[0][1])


def test_routing_hands_delta_whole_to_both_sides(z, layer):
    z1, delta = z.clone().requires_grad_(), torch.randn(N, D)
    mixture, terms = layer(z1, commitment=0.0, value_path=True)
    routed = route_cross_entropy(z1, terms.value_mixture_ND)
    assert torch.equal(routed, z1)
    routed.backward(delta)
    assert torch.equal(z1.grad, delta)
    expected = torch.zeros(K, D)
    for column in range(ACTIVE):
        expected.index_add_(0, mixture.indices_Nk[:, column], mixture.activations_Nk[:, column, None].detach() * delta)
    torch.testing.assert_close(layer.weight.grad, expected)


def test_selected_dots_equal_the_gathered_product(z, layer):
    indices = torch.randint(K, (N, ACTIVE))
    expected = torch.einsum("nd,nkd->nk", z, layer.weight[indices])
    torch.testing.assert_close(selected_dots(z, layer.weight, indices), expected)


def test_no_tensor_grows_as_tokens_times_prototypes(monkeypatch):
    tokens, prototypes, width, active = 2048, 512, 8, 16
    monkeypatch.setattr(module, "SEARCH_CHUNK_BYTES", 64 * 4 * prototypes)
    layer, z = PrototypeLayer(prototypes, width, active), torch.randn(tokens, width, requires_grad=True)
    with LargestTensor() as largest:
        _, terms = layer(z, commitment=1.0, value_path=True)
        sum(terms[:3]).backward()
    assert largest.numel <= max(64 * prototypes, tokens * active, tokens * width)
    assert largest.numel < tokens * active * width


def test_initial_prototypes_have_the_best_single_scale(z):
    table = prototypes_from(z, 10, ACTIVE, torch.Generator().manual_seed(0))
    layer = PrototypeLayer(10, D, ACTIVE)

    def error(scale):
        layer.weight.data.copy_(scale * table)
        return unexplained_variance(z, layer(z)[0].mixture_ND).item()

    assert error(1.0) < error(0.98) and error(1.0) < error(1.02)
    with pytest.raises(ValueError, match="cannot start"):
        prototypes_from(z[:5], 10, ACTIVE, torch.Generator())


def test_revival_moves_dead_prototypes_onto_poorly_explained_tokens(z, layer):
    dead = torch.zeros(K, dtype=torch.bool)
    dead[[2, 5]] = True
    mixture = z.clone()
    mixture[[7, 9]] = 0  # the only tokens left unexplained
    before = layer.weight.detach().clone()
    table = revived_prototypes(before, dead, z, mixture, torch.Generator().manual_seed(0))
    assert torch.equal(table[~dead], before[~dead])
    cosine = F.normalize(table[dead], dim=-1) @ F.normalize(z, dim=-1).T
    assert sorted(cosine.argmax(-1).tolist()) == [7, 9]
