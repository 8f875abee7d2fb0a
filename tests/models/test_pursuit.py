"""Matching pursuit against scipy's least squares and a pursuit over all prototypes; its metric against autograd."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import nnls
from support.largest_tensor import LargestTensor

from prism_lightning.models import PrismForCausalLM, encoders, pursuit
from prism_lightning.models.encoders import CosineEncoder, PursuitEncoder, mean_metric
from prism_lightning.models.prototypes import PrototypeLayer
from prism_lightning.models.pursuit import Encoding, PursuitTables, likeliest_tokens, weighted_errors

N, D, K, V = 40, 16, 64, 100
MARGIN = 0.02  # of the error's share: candidates of a few steps come from one search


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Problem:
    """Hidden states that share a mean, as real ones do, and prototypes, the first along that mean."""

    def __init__(self, tokens=N, prototypes=K, width=D):
        shared = 2 * drawn(width)
        self.z_ND = drawn(tokens, width, seed=1) + shared
        self.weight_KD = drawn(prototypes, width, seed=2) + 0.5 * shared
        self.weight_KD[0] = shared
        self.head_VD = 0.3 * drawn(V, width, seed=3)
        self.metric_DD = mean_metric(self.head_VD, self.z_ND)

    def pursue(self, active) -> Encoding:
        return PursuitEncoder(self.weight_KD, active, self.metric_DD, self.head_VD)(self.z_ND)

    def mixtures(self, active):
        indices_Nk, activations_Nk = self.pursue(active)
        return torch.einsum("nk,nkd->nd", activations_Nk, self.weight_KD[indices_Nk])

    def roots(self):
        """L^T [N, D, D] of every token, with L L^T its metric: lengths in the metric are lengths of L^T x."""
        tables = PursuitTables.of(self.head_VD, self.metric_DD, self.weight_KD)
        likeliest = likeliest_tokens(self.head_VD, self.z_ND)
        rows = [row.expand_as(self.z_ND) for row in torch.eye(self.z_ND.shape[1])]
        columns = [weighted_errors(row_ND, row_ND, tables, likeliest)[0] for row_ND in rows]
        return torch.linalg.cholesky(torch.stack(columns, 2).double()).mT

    def error(self, mixture_ND):
        """The pursuit's error as a share of that without prototypes."""
        errors, lengths = (
            (self.roots() @ x_ND.double()[:, :, None]).square().sum() for x_ND in (self.z_ND - mixture_ND, self.z_ND)
        )
        return float(errors / lengths)


def whole_pursuit(problem, active):
    """zhat [N, D] when each step tries every prototype; the first is prototype 0."""
    return torch.stack(
        [_whole(z, root, problem.weight_KD, active) for z, root in zip(problem.z_ND, problem.roots(), strict=True)]
    )


def _whole(z, root_DD, weight_KD, active):
    target, atoms_KD = (root_DD @ z.double()).numpy(), (weight_KD.double() @ root_DD.T).numpy()
    chosen = [0]
    solution, error = nnls(atoms_KD[chosen].T, target)
    for _ in range(active - 1):
        chosen, solution = [n for n, a in zip(chosen, solution, strict=True) if a > 0], solution[solution > 0]
        trials = [(*nnls(atoms_KD[[*chosen, n]].T, target), n) for n in range(len(atoms_KD)) if n not in chosen]
        if not trials or min(trial[1] for trial in trials) > error - 1e-9:
            break
        solution, error, best = min(trials, key=lambda trial: trial[1])
        chosen.append(best)
    return torch.from_numpy(solution @ weight_KD.double().numpy()[chosen]).float()


@pytest.mark.parametrize("active", [1, 2, 5, 12])
def test_activations_are_the_non_negative_least_squares_of_their_prototypes(active):
    problem = Problem()
    indices_Nk, activations_Nk = problem.pursue(active)
    assert indices_Nk.shape == activations_Nk.shape == (N, active) and indices_Nk.dtype == torch.long
    assert (activations_Nk >= 0).all()
    for z, root_DD, indices, activations in zip(problem.z_ND, problem.roots(), indices_Nk, activations_Nk, strict=True):
        used = indices[activations > 0]
        assert len(set(used.tolist())) == len(used) >= active // 2
        expected, _ = nnls((root_DD @ problem.weight_KD[used].T.double()).numpy(), (root_DD @ z.double()).numpy())
        assert activations[activations > 0].numpy() == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("active", [1, 3, 6])
def test_few_prototypes_are_searched_as_trying_all_of_them_at_every_step(active):
    problem = Problem(prototypes=12)
    found, whole = problem.error(problem.mixtures(active)), problem.error(whole_pursuit(problem, active))
    assert found == pytest.approx(whole, abs=1e-3)
    torch.testing.assert_close(problem.mixtures(active), whole_pursuit(problem, active), atol=5e-3, rtol=0)


@pytest.mark.parametrize("active", [4, 10])
def test_candidates_of_a_search_lose_little_against_trying_all(active):
    problem = Problem(tokens=16, prototypes=150, width=24)
    whole, found = (problem.error(m) for m in (whole_pursuit(problem, active), problem.mixtures(active)))
    assert abs(found - whole) < MARGIN  # greedy steps are no optimum, so that either may be ahead by chance
    cosines = CosineEncoder(problem.weight_KD, active)(problem.z_ND)
    nearest_ND = torch.einsum("nk,nkd->nd", cosines.activations_Nk, problem.weight_KD[cosines.indices_Nk])
    assert found < problem.error(nearest_ND) - 0.1


def test_more_active_prototypes_explain_more():
    problem = Problem(prototypes=300, width=24)
    errors = [problem.error(problem.mixtures(active)) for active in (1, 2, 4, 8, 16)]
    assert all(after < before for before, after in zip(errors, errors[1:], strict=False)), errors


@pytest.mark.parametrize("prototypes", [1, 5])
def test_all_prototypes_may_be_active(prototypes):
    problem = Problem(prototypes=prototypes)
    indices_Nk, activations_Nk = problem.pursue(prototypes)
    assert all(sorted(row.tolist()) == list(range(prototypes)) for row in indices_Nk)
    expected_NK = [
        nnls((root_DD @ problem.weight_KD.T.double()).numpy(), (root_DD @ z.double()).numpy())[0]
        for z, root_DD in zip(problem.z_ND, problem.roots(), strict=True)
    ]
    found_NK = torch.zeros(N, prototypes).scatter(1, indices_Nk, activations_Nk)
    assert found_NK.numpy() == pytest.approx(np.stack(expected_NK), abs=1e-3)


def test_states_of_zeros_have_no_activation():
    problem = Problem()
    problem.z_ND[3] = 0
    _, activations_Nk = problem.pursue(4)
    assert activations_Nk.isfinite().all() and not activations_Nk[3].any() and activations_Nk[0].any()


def test_a_state_that_the_first_prototype_does_not_explain_does_without_it():
    problem = Problem()
    problem.z_ND -= 1.1 * problem.z_ND.mean(0)
    indices_Nk, activations_Nk = problem.pursue(4)
    without_N = ~((indices_Nk == 0) & (activations_Nk > 0)).any(1)
    assert without_N.float().mean() > 0.3 and (activations_Nk[without_N].sum(1) > 0).any()


def test_copies_and_collinear_prototypes_change_no_mixture():
    """Copies bring nothing, and a matrix that cannot be inverted nothing infinite."""
    problem = Problem(prototypes=4)
    expected_ND, distinct_KD = problem.mixtures(4), problem.weight_KD
    problem.weight_KD = torch.cat([distinct_KD, 2 * distinct_KD, distinct_KD + 1e-6 * drawn(4, D)])
    indices_Nk, activations_Nk = problem.pursue(6)
    assert activations_Nk.isfinite().all() and activations_Nk.max() < 100
    for indices, activations in zip(indices_Nk % 4, activations_Nk, strict=True):
        used = indices[activations > 0].tolist()
        assert len(set(used)) == len(used)
    torch.testing.assert_close(problem.mixtures(6), expected_ND, atol=5e-3, rtol=0)


def test_prototypes_of_zeros_are_never_active():
    problem = Problem()
    problem.weight_KD[7:20] = 0
    indices_Nk, activations_Nk = problem.pursue(5)
    zero_Nk = (indices_Nk >= 7) & (indices_Nk < 20)
    assert activations_Nk.isfinite().all() and not activations_Nk[zero_Nk].any()


def test_tokens_do_not_change_with_what_is_beside_them(monkeypatch):
    problem = Problem(tokens=90)
    whole, states_ND = problem.pursue(6), problem.z_ND
    monkeypatch.setattr(pursuit, "CHUNK_BYTES", 20_000)
    parts = []
    for part_ND in states_ND.split(13):
        problem.z_ND = part_ND
        parts.append(problem.pursue(6))
    found_NK = torch.zeros(90, K).scatter(1, *(torch.cat(tensors) for tensors in zip(*parts, strict=True)))
    torch.testing.assert_close(found_NK, torch.zeros(90, K).scatter(1, *whole), atol=1e-3, rtol=1e-3)


def test_memory_is_bounded_whatever_the_number_of_tokens(monkeypatch):
    monkeypatch.setattr(pursuit, "CHUNK_BYTES", 16 * 2**20)
    prototypes, width, largest = 512, 64, []
    for tokens in (4_000, 8_000):
        problem = Problem(tokens, prototypes, width)
        encoder = PursuitEncoder(problem.weight_KD, 4, problem.metric_DD, problem.head_VD)
        with LargestTensor() as mode:
            encoder(problem.z_ND)
        largest.append(mode.numel)
    assert largest[0] < 4_000 * prototypes * width / 10  # no [N, K, D]
    assert largest[1] <= max(1.1 * largest[0], 8_000 * width)


@pytest.fixture
def layer():
    problem = Problem()
    layer = PrototypeLayer(K, D, 5, "pursuit")
    layer.weight.data.copy_(problem.weight_KD)
    layer.metric.copy_(problem.metric_DD)
    return layer


def test_the_gradient_is_that_of_the_error_in_the_metric_with_constant_activations(layer):
    problem = Problem()
    z_ND, root_NDD = problem.z_ND, problem.roots().float()
    for commitment in (0.0, 0.4):
        layer.weight.grad = None
        z = z_ND.clone().requires_grad_()
        mixture, terms = layer(z, commitment=commitment, value_path=True, head_VD=problem.head_VD)
        torch.testing.assert_close(terms.reconstruction.item(), problem.error(mixture.mixture_ND), atol=1e-4, rtol=1e-3)
        terms.reconstruction.backward(retain_graph=True)
        weight_KD, twin = layer.weight.detach().clone().requires_grad_(), z_ND.clone().requires_grad_()
        zhat_ND = torch.einsum("nk,nkd->nd", mixture.activations_Nk.detach(), weight_KD[mixture.indices_Nk])
        errors, lengths = ((root_NDD @ x[:, :, None]).square().sum() for x in (twin - zhat_ND, z_ND))
        (errors / lengths).backward()
        torch.testing.assert_close(layer.weight.grad, weight_KD.grad, atol=1e-5, rtol=1e-3)
        found = torch.zeros_like(z) if z.grad is None else z.grad
        torch.testing.assert_close(found, commitment * twin.grad, atol=1e-5, rtol=1e-3)
    layer.weight.grad = None
    delta_ND = drawn(N, D, seed=8)
    terms.value_mixture_ND.backward(delta_ND)
    expected_KD = torch.zeros(K, D)
    for column in range(5):
        expected_KD.index_add_(0, mixture.indices_Nk[:, column], mixture.activations_Nk[:, column, None] * delta_ND)
    torch.testing.assert_close(layer.weight.grad, expected_KD, atol=1e-5, rtol=1e-4)


def test_the_metric_is_saved_with_the_weights(make_model, tmp_path):
    model = make_model(num_prototypes=K, active_prototypes=5, encoder="pursuit").eval()
    head_VD, z_ND = model.lm_head.weight.detach(), drawn(30, 32)
    model.prototypes.metric.copy_(mean_metric(head_VD, z_ND))
    expected = model.prototypes(z_ND, head_VD=head_VD)[0]
    model.save_pretrained(tmp_path)
    loaded = PrismForCausalLM.from_pretrained(tmp_path).eval()
    assert loaded.config.encoder == "pursuit" and torch.equal(loaded.prototypes.metric, model.prototypes.metric)
    for found, tensor in zip(loaded.prototypes(z_ND, head_VD=head_VD)[0], expected, strict=True):
        assert torch.equal(found, tensor)
    assert "metric" not in PrototypeLayer(K, D, 5).state_dict()


def head_and_states(vocabulary=24, width=6, tokens=12):
    return drawn(vocabulary, width, seed=1), drawn(tokens, width, seed=2)


def hessians(head_VD, z_ND):
    """Of the cross-entropy towards every state: those of -log softmax(W z)[y], which do not depend on y."""
    return torch.stack(
        [
            torch.autograd.functional.hessian(lambda z, y=y: F.cross_entropy(head_VD @ z, torch.tensor(y)), z)
            for y, z in enumerate(z_ND)
        ]
    )


def test_the_mean_metric_is_the_mean_hessian_of_the_cross_entropy(monkeypatch):
    head_VD, z_ND = head_and_states()
    mean_DD, metric_DD = hessians(head_VD, z_ND).mean(0), mean_metric(head_VD, z_ND)
    assert torch.equal(metric_DD, metric_DD.T)
    floor = (metric_DD - mean_DD).diagonal().mean()
    assert 0 < floor < 0.05 * mean_DD.diagonal().mean()
    torch.testing.assert_close(metric_DD, mean_DD + floor * torch.eye(6), atol=1e-5, rtol=1e-4)
    monkeypatch.setattr(encoders, "METRIC_CHUNK_BYTES", 1)
    torch.testing.assert_close(mean_metric(head_VD, z_ND), metric_DD, atol=1e-5, rtol=1e-4)


def test_a_tokens_metric_is_its_own_hessian_and_measures_divergence_to_second_order(monkeypatch):
    """Where all tokens of the vocabulary are among the likeliest, and without the share of the mean metric."""
    monkeypatch.setattr(pursuit, "FLOOR", 0.0)
    head_VD, z_ND = head_and_states()
    tables = PursuitTables.of(head_VD, mean_metric(head_VD, z_ND), drawn(3, 6))
    likeliest = likeliest_tokens(head_VD, z_ND)
    step_ND = 1e-2 * drawn(12, 6, seed=4)
    found_ND, total = weighted_errors(step_ND, z_ND, tables, likeliest)
    torch.testing.assert_close(found_ND, (hessians(head_VD, z_ND) @ step_ND[:, :, None])[:, :, 0], atol=1e-6, rtol=1e-3)
    expected = torch.einsum("nd,nde,ne->", z_ND, hessians(head_VD, z_ND), z_ND)
    torch.testing.assert_close(total, expected, atol=1e-5, rtol=1e-3)
    log_p, log_q = (((z.double()) @ head_VD.double().T).log_softmax(-1) for z in (z_ND, z_ND + step_ND))
    divergence_N = (log_p.exp() * (log_p - log_q)).sum(-1)
    torch.testing.assert_close((step_ND * found_ND).sum(-1).double() / 2, divergence_N, atol=1e-7, rtol=0.1)


def test_a_head_that_cannot_tell_states_apart_still_has_a_metric_that_can_be_inverted():
    head_VD, z_ND = head_and_states()
    head_VD[:, 3:] = 0
    values_D = torch.linalg.eigvalsh(mean_metric(head_VD, z_ND))
    assert values_D.min() > 1e-3 * values_D.max()
