"""Matching pursuit against scipy's least squares and a pursuit over all prototypes; the metric against autograd."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import nnls
from torch.utils._python_dispatch import TorchDispatchMode

from prism_lightning.models import PrismForCausalLM, pursuit
from prism_lightning.models.encoders import CosineEncoder, PursuitEncoder, mean_metric, square_root
from prism_lightning.models.prototypes import PrototypeLayer, unexplained_variance
from prism_lightning.models.pursuit import FLOOR, Likeliest, PursuitTables, likeliest_tokens
from prism_lightning.models.pursuit import pursue as pursue_by_prediction

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


def pursue(z_ND, unit_KD, active):
    """The pursuit that measures errors by their squared length: no token is likely, and F is the identity."""
    nothing = Likeliest(torch.zeros(len(z_ND), 1, dtype=torch.long), torch.zeros(len(z_ND), 1))
    tables = PursuitTables.of(torch.zeros(1, z_ND.shape[1]), None, unit_KD)
    return pursue_by_prediction(z_ND, tables, active, nothing)


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
    indices_Nk, activations_Nk = PursuitEncoder(weight_KD, 5, torch.eye(D), drawn(50, D, seed=4))(z_ND)
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


HEAD_VD = 0.3 * drawn(50, D, seed=4)


def token_metrics(layer, z_ND, count=32):
    """M_t [N, D, D] of every token, from its formula."""
    head_VD, metrics = HEAD_VD.double(), []
    for z in z_ND.double():
        pi, tokens = (head_VD @ z).softmax(-1).topk(count)
        centred = head_VD[tokens] - (pi @ head_VD[tokens]) / pi.sum()
        own_DD = torch.einsum("c,cd,ce->de", pi, centred, centred)
        metrics.append((1 - pi.sum() + FLOOR) * layer.metric.double() + own_DD)
    return torch.stack(metrics)


def test_activations_are_non_negative_least_squares_in_the_metric_of_each_token(layer):
    z_ND, _ = problem()
    mixture, terms = layer(z_ND, head_VD=HEAD_VD)
    assert terms is None
    expected_ND = torch.einsum("nk,nkd->nd", mixture.activations_Nk, layer.weight[mixture.indices_Nk])
    torch.testing.assert_close(mixture.mixture_ND, expected_ND, atol=1e-5, rtol=1e-5)
    chosen = zip(z_ND, mixture.indices_Nk, mixture.activations_Nk, token_metrics(layer, z_ND), strict=True)
    for z, indices, activations, metric_DD in chosen:
        used = indices[activations > 0]
        root_DD = torch.linalg.cholesky(metric_DD).T
        solution, _ = nnls((root_DD @ layer.weight[used].double().T).detach().numpy(), (root_DD @ z.double()).numpy())
        assert activations[activations > 0].numpy() == pytest.approx(solution, abs=1e-3)


def test_known_likeliest_tokens_change_nothing(layer):
    z_ND, _ = problem()
    likeliest = likeliest_tokens(HEAD_VD, z_ND)
    probabilities_NV = (z_ND @ HEAD_VD.T).softmax(-1)
    torch.testing.assert_close(likeliest.probabilities_Nc, probabilities_NV.topk(32, dim=1).values)
    for found, expected in zip(
        layer(z_ND, head_VD=HEAD_VD)[0], layer(z_ND, head_VD=HEAD_VD, likeliest=likeliest)[0], strict=True
    ):
        assert torch.equal(found, expected)


def test_the_metric_of_each_token_lowers_the_divergence_of_its_prediction(layer):
    """Against the mean metric alone, with as many prototypes."""
    z_ND, _ = problem(tokens=200)
    layer.metric.copy_(mean_metric(HEAD_VD, z_ND))
    logits_NV = z_ND @ HEAD_VD.T

    def divergence(mixture_ND):
        log_q_NV = (mixture_ND @ HEAD_VD.T).log_softmax(-1)
        return F.kl_div(log_q_NV, logits_NV.log_softmax(-1), reduction="batchmean", log_target=True)

    root_DD = square_root(layer.metric)
    alone = pursue(z_ND @ root_DD, layer.weight.detach() @ root_DD, 5)
    alone_ND = torch.einsum("nk,nkd->nd", alone.activations_Nk, layer.weight[alone.indices_Nk])
    assert divergence(layer(z_ND, head_VD=HEAD_VD)[0].mixture_ND) < 0.8 * divergence(alone_ND)


def test_the_gradient_is_that_of_the_error_in_the_metric_with_constant_activations(layer):
    z_ND, _ = problem()
    metrics_NDD = token_metrics(layer, z_ND).float()

    def squared(x_ND):
        return torch.einsum("nd,nde,ne->", x_ND, metrics_NDD, x_ND)

    for commitment in (0.0, 0.4):
        layer.weight.grad = None
        z = z_ND.clone().requires_grad_()
        mixture, terms = layer(z, commitment=commitment, value_path=True, head_VD=HEAD_VD)
        terms.reconstruction.backward(retain_graph=True)
        weight_KD, twin = layer.weight.detach().clone().requires_grad_(), z_ND.clone().requires_grad_()
        zhat_ND = torch.einsum("nk,nkd->nd", mixture.activations_Nk.detach(), weight_KD[mixture.indices_Nk])
        loss = squared(twin - zhat_ND) / squared(z_ND)
        loss.backward()
        torch.testing.assert_close(terms.reconstruction, loss, atol=1e-6, rtol=1e-4)
        torch.testing.assert_close(layer.weight.grad, weight_KD.grad, atol=1e-6, rtol=1e-3)
        found = torch.zeros_like(z) if z.grad is None else z.grad
        torch.testing.assert_close(found, commitment * twin.grad, atol=1e-7, rtol=1e-3)
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
    head_VD = model.lm_head.weight
    expected = model.prototypes(z_ND, head_VD=head_VD)[0]
    model.save_pretrained(tmp_path)
    loaded = PrismForCausalLM.from_pretrained(tmp_path).eval()
    assert loaded.config.encoder == "pursuit" and torch.equal(loaded.prototypes.metric, model.prototypes.metric)
    for found, tensor in zip(loaded.prototypes(z_ND, head_VD=head_VD)[0], expected, strict=True):
        assert torch.equal(found, tensor)
    state = layer.state_dict()
    other = PrototypeLayer(K, D, 5, "pursuit")
    other.load_state_dict(state)
    assert torch.equal(other.metric, layer.metric) and "metric" not in PrototypeLayer(K, D, 5).state_dict()


def head_and_states(vocabulary=30, width=6, tokens=12):
    return drawn(vocabulary, width, seed=1), drawn(tokens, width, seed=2)


def test_the_mean_metric_is_the_mean_hessian_of_the_cross_entropy(monkeypatch):
    """Of any target: the Hessian of -log softmax(W z)[y] towards z does not depend on y."""
    from prism_lightning.models import encoders

    head_VD, z_ND = head_and_states()
    hessians = [
        torch.autograd.functional.hessian(lambda z, y=y: F.cross_entropy(head_VD @ z, torch.tensor(y)), z)
        for y, z in enumerate(z_ND)
    ]
    mean_DD = torch.stack(hessians).mean(0)
    metric_DD = mean_metric(head_VD, z_ND)
    assert torch.equal(metric_DD, metric_DD.T)
    floor = (metric_DD - mean_DD).diagonal().mean()
    assert 0 < floor < 0.05 * mean_DD.diagonal().mean()
    torch.testing.assert_close(metric_DD, mean_DD + floor * torch.eye(6), atol=1e-5, rtol=1e-4)
    root_DD = square_root(metric_DD)
    torch.testing.assert_close(root_DD @ root_DD, metric_DD, atol=1e-5, rtol=1e-4)
    monkeypatch.setattr(encoders, "METRIC_CHUNK_BYTES", 1)
    torch.testing.assert_close(mean_metric(head_VD, z_ND), metric_DD, atol=1e-5, rtol=1e-4)


def test_a_metric_measures_the_divergence_of_predictions_to_second_order():
    head_VD, z_ND = head_and_states(tokens=1)
    metric_DD = mean_metric(head_VD, z_ND).double()
    z = z_ND[0].double()
    for seed in range(6):
        step = 1e-2 * drawn(6, seed=10 + seed).double()
        log_p, log_q = ((head_VD.double() @ point).log_softmax(-1) for point in (z, z + step))
        divergence = float((log_p.exp() * (log_p - log_q)).sum())
        assert float(step @ metric_DD @ step / 2) == pytest.approx(divergence, rel=0.1)


def test_a_head_that_cannot_tell_states_apart_still_has_a_metric_that_can_be_inverted():
    head_VD, z_ND = head_and_states()
    head_VD[:, 3:] = 0
    values = torch.linalg.eigvalsh(mean_metric(head_VD, z_ND))
    assert values.min() > 1e-3 * values.max()
