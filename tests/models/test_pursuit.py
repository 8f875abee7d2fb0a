"""Matching pursuit against scipy's least squares and a pursuit over all prototypes; the metric against autograd."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import nnls
from torch.utils._python_dispatch import TorchDispatchMode

from prism_lightning.models import PrismForCausalLM, pursuit
from prism_lightning.models.encoders import CosineEncoder, PursuitEncoder, logit_metric
from prism_lightning.models.prototypes import PrototypeLayer, unexplained_variance
from prism_lightning.models.pursuit import pursue

N, D, K = 40, 16, 64
MARGIN = 0.02  # of unexplained variance: candidates of a few steps come from one search


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def problem(tokens=N, prototypes=K, width=D, seed=0):
    """Hidden states that share a mean, as real ones do, and unit prototypes, the first along that mean."""
    shared = 2 * drawn(width, seed=seed)
    z_ND = drawn(tokens, width, seed=seed + 1) + shared
    unit_KD = F.normalize(drawn(prototypes, width, seed=seed + 2) + 0.5 * shared, dim=-1)
    unit_KD[0] = F.normalize(shared, dim=0)
    return z_ND, unit_KD


def mixtures(z_ND, unit_KD, active):
    """zhat of the pursuit."""
    indices_Nk, coefficients_Nk = pursue(z_ND, unit_KD, active)
    return torch.einsum("nk,nkd->nd", coefficients_Nk, unit_KD[indices_Nk])


def whole_pursuit(z, unit_KD, active):
    """zhat [D] of one token when each step tries every prototype; the first is prototype 0."""
    z, units = z.double().numpy(), unit_KD.double().numpy()
    chosen = [0]
    solution, error = nnls(units[chosen].T, z)
    for _ in range(active - 1):
        chosen = [atom for atom, a in zip(chosen, solution, strict=True) if a > 0]
        trials = [(*nnls(units[[*chosen, atom]].T, z), atom) for atom in range(len(units)) if atom not in chosen]
        if not trials or min(trial[1] for trial in trials) > error - 1e-9:
            break
        solution, error, best = min(trials, key=lambda trial: trial[1])
        chosen.append(best)
    return torch.from_numpy(solution @ units[chosen]).float()


@pytest.mark.parametrize("active", [1, 2, 5, 12])
def test_coefficients_are_the_non_negative_least_squares_of_their_prototypes(active):
    z_ND, unit_KD = problem()
    indices_Nk, coefficients_Nk = pursue(z_ND, unit_KD, active)
    assert indices_Nk.shape == coefficients_Nk.shape == (N, active) and indices_Nk.dtype == torch.long
    assert (coefficients_Nk >= 0).all() and (coefficients_Nk[:, :-1] >= coefficients_Nk[:, 1:]).all()
    for z, indices, coefficients in zip(z_ND, indices_Nk, coefficients_Nk, strict=True):
        used = indices[coefficients > 0]
        assert len(set(used.tolist())) == len(used) >= active // 2
        expected, _ = nnls(unit_KD[used].T.double().numpy(), z.double().numpy())
        assert coefficients[coefficients > 0].numpy() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("active", [1, 3, 6])
def test_few_prototypes_are_searched_as_trying_all_of_them_at_every_step(active):
    z_ND, unit_KD = problem(prototypes=12)
    expected_ND = torch.stack([whole_pursuit(z, unit_KD, active) for z in z_ND])
    torch.testing.assert_close(mixtures(z_ND, unit_KD, active), expected_ND, atol=1e-3, rtol=0)


@pytest.mark.parametrize("active", [4, 10])
def test_candidates_of_a_search_lose_little_against_trying_all(active):
    z_ND, unit_KD = problem(tokens=16, prototypes=150, width=24)
    expected_ND = torch.stack([whole_pursuit(z, unit_KD, active) for z in z_ND])
    whole = unexplained_variance(z_ND, expected_ND)
    found = unexplained_variance(z_ND, mixtures(z_ND, unit_KD, active))
    assert abs(found - whole) < MARGIN  # greedy steps are no optimum, so that either may be ahead by chance
    cosines = CosineEncoder(unit_KD, active)(z_ND)
    nearest_ND = torch.einsum("nk,nkd->nd", cosines.activations_Nk, unit_KD[cosines.indices_Nk])
    assert found < unexplained_variance(z_ND, nearest_ND) - 0.1


def test_more_active_prototypes_explain_more():
    z_ND, unit_KD = problem(prototypes=300, width=24)
    errors = [float(unexplained_variance(z_ND, mixtures(z_ND, unit_KD, active))) for active in (1, 2, 4, 8, 16)]
    assert all(after < before for before, after in zip(errors, errors[1:], strict=False)), errors


@pytest.mark.parametrize("prototypes", [1, 5])
def test_all_prototypes_may_be_active(prototypes):
    z_ND, unit_KD = problem(prototypes=prototypes)
    indices_Nk, coefficients_Nk = pursue(z_ND, unit_KD, prototypes)
    assert indices_Nk.shape == (N, prototypes)
    assert all(sorted(row.tolist()) == list(range(prototypes)) for row in indices_Nk)
    expected = np.stack([nnls(unit_KD.T.double().numpy(), z.double().numpy())[0] for z in z_ND])
    found_NK = torch.zeros(N, prototypes).scatter(1, indices_Nk, coefficients_Nk)
    assert found_NK.numpy() == pytest.approx(expected, abs=1e-4)


def test_states_that_no_prototype_explains_have_no_activation():
    z_ND, unit_KD = problem()
    z_ND[3] = 0
    z_ND[5] = -10 * unit_KD.sum(0)
    unit_KD = F.normalize(unit_KD + 3 * unit_KD.mean(0), dim=-1)  # all within a half space
    _, coefficients_Nk = pursue(z_ND, unit_KD, 4)
    assert coefficients_Nk.isfinite().all() and not coefficients_Nk[[3, 5]].any() and coefficients_Nk[0].any()


def test_a_state_far_from_the_first_prototype_does_without_it():
    z_ND, unit_KD = problem()
    z_ND = z_ND - 1.1 * (z_ND @ unit_KD[0])[:, None] * unit_KD[0]
    indices_Nk, coefficients_Nk = pursue(z_ND, unit_KD, 4)
    assert (coefficients_Nk[:, 0] > 0).all() and not coefficients_Nk[indices_Nk == 0].any()


def test_copies_and_collinear_prototypes_change_no_mixture():
    """Copies bring nothing, and a matrix that cannot be inverted nothing infinite."""
    z_ND, unit_KD = problem(prototypes=4)
    copies_KD = torch.cat([unit_KD, unit_KD, F.normalize(unit_KD + 1e-6 * drawn(4, D), dim=-1)])
    indices_Nk, coefficients_Nk = pursue(z_ND, copies_KD, 6)
    assert coefficients_Nk.isfinite().all() and coefficients_Nk.max() < 100
    for indices, coefficients in zip(indices_Nk % 4, coefficients_Nk, strict=True):
        used = indices[coefficients > 0].tolist()
        assert len(set(used)) == len(used)
    torch.testing.assert_close(mixtures(z_ND, copies_KD, 6), mixtures(z_ND, unit_KD, 4), atol=1e-3, rtol=0)


def test_prototypes_of_zeros_are_never_active():
    z_ND, unit_KD = problem()
    weight_KD = unit_KD.clone()
    weight_KD[7:20] = 0
    indices_Nk, activations_Nk = PursuitEncoder(weight_KD, 5, torch.eye(D))(z_ND)
    dead = (indices_Nk >= 7) & (indices_Nk < 20)
    assert activations_Nk.isfinite().all() and not activations_Nk[dead].any()


def test_tokens_do_not_change_with_what_is_beside_them(monkeypatch):
    z_ND, unit_KD = problem(tokens=90)
    indices_Nk, coefficients_Nk = pursue(z_ND, unit_KD, 6)
    monkeypatch.setattr(pursuit, "CHUNK_BYTES", 7 * 4 * K * D)
    parts = [pursue(z_ND[start : start + 13], unit_KD, 6) for start in range(0, 90, 13)]
    found_NK = torch.zeros(90, K).scatter(1, torch.cat([p.indices_Nk for p in parts]), torch.cat([p[1] for p in parts]))
    expected_NK = torch.zeros(90, K).scatter(1, indices_Nk, coefficients_Nk)
    torch.testing.assert_close(found_NK, expected_NK, atol=1e-4, rtol=1e-4)


class LargestTensor(TorchDispatchMode):
    """Remembers the largest tensor that any operation returns."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


def test_memory_is_bounded_whatever_the_number_of_tokens():
    prototypes, width, largest = 512, 64, []
    for tokens in (8_000, 16_000):
        z_ND, unit_KD = problem(tokens, prototypes, width)
        with LargestTensor() as mode:
            pursue(z_ND, unit_KD, 4)
        largest.append(mode.numel)
    assert largest[0] < 8_000 * prototypes * width / 10  # no [N, K, D]
    assert largest[1] <= max(1.1 * largest[0], 16_000 * width)


def metric_of(width=D, seed=5):
    """A symmetric positive matrix that stretches directions differently."""
    root_DD = drawn(width, width, seed=seed) / width**0.5
    return root_DD @ root_DD.T + 0.2 * torch.eye(width)


@pytest.fixture
def layer():
    layer = PrototypeLayer(K, D, 5, "pursuit")
    layer.weight.data.copy_(problem()[1] * (1 + drawn(K, 1, seed=9).abs()))
    layer.metric.copy_(metric_of())
    return layer


def test_activations_are_coefficients_of_the_prototypes_themselves_in_the_metric(layer):
    z_ND, _ = problem()
    mixture, terms = layer(z_ND)
    assert terms is None
    weight_KD, metric_DD = layer.weight.detach().double(), layer.metric.double()
    expected_ND = torch.einsum("nk,nkd->nd", mixture.activations_Nk, layer.weight[mixture.indices_Nk])
    torch.testing.assert_close(mixture.mixture_ND, expected_ND, atol=1e-5, rtol=1e-5)
    for z, indices, activations in zip(z_ND, mixture.indices_Nk, mixture.activations_Nk, strict=True):
        used = indices[activations > 0]
        solution, _ = nnls((weight_KD[used] @ metric_DD).T.numpy(), (z.double() @ metric_DD).numpy())
        assert activations[activations > 0].numpy() == pytest.approx(solution, abs=1e-3)


def test_the_gradient_is_that_of_the_reconstruction_with_constant_coefficients(layer):
    z_ND, _ = problem()
    for commitment in (0.0, 0.4):
        layer.weight.grad = None
        z = z_ND.clone().requires_grad_()
        mixture, terms = layer(z, commitment=commitment, value_path=True)
        terms.reconstruction.backward(retain_graph=True)
        weight_KD, twin = layer.weight.detach().clone().requires_grad_(), z_ND.clone().requires_grad_()
        zhat_ND = torch.einsum("nk,nkd->nd", mixture.activations_Nk.detach(), weight_KD[mixture.indices_Nk])
        ((twin - zhat_ND).square().sum(-1).mean() / z_ND.square().sum(-1).mean()).backward()
        torch.testing.assert_close(layer.weight.grad, weight_KD.grad, atol=1e-6, rtol=1e-4)
        found = torch.zeros_like(z) if z.grad is None else z.grad
        torch.testing.assert_close(found, commitment * twin.grad, atol=1e-7, rtol=1e-4)
    layer.weight.grad = None
    delta_ND = drawn(N, D, seed=8)
    terms.value_mixture_ND.backward(delta_ND)
    expected_KD = torch.zeros(K, D)
    for column in range(5):
        expected_KD.index_add_(0, mixture.indices_Nk[:, column], mixture.activations_Nk[:, column, None] * delta_ND)
    torch.testing.assert_close(layer.weight.grad, expected_KD, atol=1e-5, rtol=1e-4)


def test_the_metric_is_saved_with_the_weights(make_model, layer, tmp_path):
    model = make_model(num_prototypes=K, active_prototypes=5, encoder="pursuit").eval()
    model.prototypes.metric.copy_(metric_of(32))
    z_ND = drawn(30, 32)
    expected = model.prototypes(z_ND)[0]
    model.save_pretrained(tmp_path)
    loaded = PrismForCausalLM.from_pretrained(tmp_path).eval()
    assert loaded.config.encoder == "pursuit" and torch.equal(loaded.prototypes.metric, model.prototypes.metric)
    for found, tensor in zip(loaded.prototypes(z_ND)[0], expected, strict=True):
        assert torch.equal(found, tensor)
    state = layer.state_dict()
    other = PrototypeLayer(K, D, 5, "pursuit")
    other.load_state_dict(state)
    assert torch.equal(other.metric, layer.metric) and "metric" not in PrototypeLayer(K, D, 5).state_dict()


def head_and_states(vocabulary=30, width=6, tokens=12):
    return drawn(vocabulary, width, seed=1), drawn(tokens, width, seed=2)


def test_the_squared_metric_is_the_mean_hessian_of_the_cross_entropy(monkeypatch):
    """Of any target: the Hessian of -log softmax(W z)[y] towards z does not depend on y."""
    from prism_lightning.models import encoders

    head_VD, z_ND = head_and_states()
    hessians = [
        torch.autograd.functional.hessian(lambda z, y=y: F.cross_entropy(head_VD @ z, torch.tensor(y)), z)
        for y, z in enumerate(z_ND)
    ]
    mean_DD = torch.stack(hessians).mean(0)
    metric_DD = logit_metric(head_VD, z_ND)
    assert torch.equal(metric_DD, metric_DD.T) or torch.allclose(metric_DD, metric_DD.T, atol=1e-6)
    floor = (metric_DD @ metric_DD - mean_DD).diagonal().mean()
    assert 0 < floor < 0.05 * mean_DD.diagonal().mean()
    torch.testing.assert_close(metric_DD @ metric_DD, mean_DD + floor * torch.eye(6), atol=1e-5, rtol=1e-4)
    monkeypatch.setattr(encoders, "METRIC_CHUNK_BYTES", 1)
    torch.testing.assert_close(logit_metric(head_VD, z_ND), metric_DD, atol=1e-5, rtol=1e-4)


def test_the_metric_measures_the_divergence_of_predictions_to_second_order():
    head_VD, z_ND = head_and_states(tokens=1)
    metric_DD = logit_metric(head_VD, z_ND).double()
    z = z_ND[0].double()
    for seed in range(6):
        step = 1e-2 * drawn(6, seed=10 + seed).double()
        log_p, log_q = ((head_VD.double() @ point).log_softmax(-1) for point in (z, z + step))
        divergence = float((log_p.exp() * (log_p - log_q)).sum())
        assert float((metric_DD @ step).square().sum() / 2) == pytest.approx(divergence, rel=0.1)


def test_a_head_that_cannot_tell_states_apart_still_has_a_metric_that_can_be_inverted():
    head_VD, z_ND = head_and_states()
    head_VD[:, 3:] = 0
    metric_DD = logit_metric(head_VD, z_ND)
    assert torch.linalg.eigvalsh(metric_DD).min() > 0.01 * torch.linalg.eigvalsh(metric_DD).max()
