"""An index in the space of logits: its gradients are autograd's, its curvature the Gauss-Newton diagonal on average."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.corpus_model import hidden_and_targets
from support.curvature import dictionary_of

from prism_lightning.attribution.curvature.records import LogitRecords, residuals
from prism_lightning.attribution.index.base import Query
from prism_lightning.attribution.index.logit_influence import PRIOR
from prism_lightning.attribution.index.shards import LogitShard
from prism_lightning.attribution.settings import IndexSettings

DAMPING = IndexSettings().damping_share


def everything(index, model, store):
    """Prototypes, activations, targets and predicted probabilities of all training tokens."""
    z_ND, targets_N = hidden_and_targets(model, store)
    indices_Nk, activations_Nk = dictionary_of(index).assign(z_ND)
    return indices_Nk, activations_Nk, targets_N, model.lm_head(z_ND).softmax(-1).detach(), z_ND


def records(index, model, store, selection, competitors=0):
    indices_Nk, activations_Nk, targets_N, _, z_ND = everything(index, model, store)
    _, *entries = residuals(model.lm_head.weight.detach(), z_ND[selection], targets_N[selection], competitors)
    return LogitRecords(indices_Nk[selection], activations_Nk[selection], *entries)


def expected_scores(index, model, store, selection, competitors=0):
    """The formula with dense [N, K] and [K, V] matrices, summed over the query's tokens."""
    indices_Nk, activations_Nk, targets_N, pi_NV, _ = everything(index, model, store)
    size, vocabulary = index.num_prototypes, pi_NV.shape[1]
    a_NK = torch.zeros(len(targets_N), size).scatter_(1, indices_Nk, activations_Nk)
    target_errors_N = 1 - pi_NV.gather(1, targets_N[:, None])[:, 0]
    labels_VK = torch.zeros(vocabulary, size).index_add_(0, targets_N, a_NK.square() * target_errors_N[:, None])
    counts_VK = torch.zeros(vocabulary, size).index_add_(0, targets_N, (a_NK > 0).float())
    sum_target_error_V = torch.zeros(vocabulary).index_add_(0, targets_N, target_errors_N)
    separable_VK = sum_target_error_V[:, None] * a_NK.square().sum(0) / len(targets_N)
    curvature_VK = (counts_VK * labels_VK + PRIOR * separable_VK) / (counts_VK + PRIOR)
    curvature_VK += DAMPING * labels_VK[labels_VK > 0].mean()
    scores_N = torch.zeros(len(targets_N))
    for q in range(*selection.indices(len(targets_N))):
        residual_V = F.one_hot(targets_N[q], vocabulary) - pi_NV[q]
        tokens = pi_NV[q].scatter(0, targets_N[q], 2.0).topk(1 + competitors).indices
        kept_V = torch.zeros(vocabulary).scatter(0, tokens, residual_V[tokens])
        kernel_N = (a_NK * a_NK[q] / curvature_VK[targets_N]).sum(1)
        scores_N += kept_V[targets_N] * target_errors_N * kernel_N
    return scores_N.numpy()


def got_scores(index, query_records):
    hits = index.score(index.query(*query_records.arrays(slice(None))))
    out = np.zeros(index.tokens)
    out[hits.tokens] = hits.influence
    return out


@pytest.mark.parametrize("competitors", [0, 5])
@pytest.mark.parametrize("selection", [slice(77, 78), slice(300, 340)], ids=["token", "sequence"])
def test_scores_are_the_formula_with_dense_matrices(built, model, store, selection, competitors):
    index = built(space="logits")
    assert index.num_shards == 3
    expected_N = expected_scores(index, model, store, selection, competitors)
    got_N = got_scores(index, records(index, model, store, selection, competitors))
    assert np.abs(got_N - expected_N).max() < 2e-3 * np.abs(expected_N).max()  # entries are fp16
    assert (expected_N < 0).any() == (competitors > 0)


def test_records_are_autograds_gradients_with_respect_to_the_prototypes_logits(built, model, store):
    index = built(space="logits")
    indices_Nk, activations_Nk, targets_N, pi_NV, z_ND = everything(index, model, store)
    prototypes_KV = torch.zeros(index.num_prototypes, pi_NV.shape[1], requires_grad=True)
    for token in (5, 900):
        mixed_V = activations_Nk[token] @ prototypes_KV[indices_Nk[token]]
        # The logits as they are, plus what would come through the prototypes' own contributions.
        loss = F.cross_entropy((pi_NV[token].log() + mixed_V)[None], targets_N[token, None])
        (gradient_KV,) = torch.autograd.grad(loss, prototypes_KV)
        _, tokens, values = residuals(model.lm_head.weight.detach(), z_ND[token : token + 1], targets_N[token, None], 7)
        for target, value in zip(tokens[0], values[0], strict=True):
            expected_k = -activations_Nk[token] * value
            assert torch.allclose(gradient_KV[indices_Nk[token], target], expected_k, atol=1e-6)


def test_curvature_is_the_gauss_newton_diagonal_under_labels_of_the_models_own(model, store):
    """The mean over labels of a^2 (1 - pi), summed over lists, is the diagonal from an explicit Jacobian."""
    generator = np.random.default_rng(0)
    tokens, vocabulary, size = 6, 5, 4
    pi_NV = torch.from_numpy(generator.dirichlet(np.ones(vocabulary), tokens))
    prototypes = np.stack([generator.permutation(size)[:2] for _ in range(tokens)])
    activations = generator.random((tokens, 2))
    observed_KV = np.zeros((size, vocabulary))
    for label in range(vocabulary):
        for token in range(tokens):
            one = slice(token, token + 1)
            target_error = 1 - pi_NV[one, label].numpy()
            shard = LogitShard.of_tokens(
                prototypes[one], activations[one], target_error, np.array([label]), vocabulary, size
            )
            observed_KV.ravel()[shard.lists] += pi_NV[token, label].item() * shard.curvature
    expected_KV = torch.zeros(size, vocabulary, dtype=torch.float64)
    for token in range(tokens):

        def logits(prototypes_KV, token=token):
            return pi_NV[token].log() + torch.from_numpy(activations[token]) @ prototypes_KV[prototypes[token]]

        jacobian_VKV = torch.autograd.functional.jacobian(logits, torch.zeros(size, vocabulary, dtype=torch.float64))
        covariance_VV = torch.diag(pi_NV[token]) - torch.outer(pi_NV[token], pi_NV[token])
        expected_KV += torch.einsum("vki,vw,wki->ki", jacobian_VKV, covariance_VV, jacobian_VKV)
    assert np.allclose(observed_KV, expected_KV, rtol=1e-5)


def test_losses_and_residuals_by_chunks(model, store, monkeypatch):
    from prism_lightning.attribution.curvature import records as module

    z_ND, targets_N = hidden_and_targets(model, store)
    head_VD = model.lm_head.weight.detach()
    monkeypatch.setattr(module, "CHUNK_BYTES", 4 * 300 * 100)
    expected_N = F.cross_entropy(z_ND @ head_VD.T, targets_N, reduction="none")
    losses_N, targets_Nc, values_Nc = residuals(head_VD, z_ND, targets_N, 3)
    assert torch.allclose(losses_N, expected_N, atol=1e-5)
    assert torch.equal(targets_Nc[:, 0], targets_N)
    assert torch.allclose(values_Nc[:, 0], 1 - (-expected_N).exp(), atol=1e-5)
    assert (values_Nc[:, 1:] < 0).all() and (targets_Nc[:, 1:] != targets_N[:, None]).all()


def test_shard_and_batch_sizes_change_no_score(built, model, store):
    query_records = records(built("a", space="logits"), model, store, slice(100, 110))
    expected_N = got_scores(built("a", space="logits"), query_records)
    for name, settings in {"b": {"shard_tokens": 64}, "c": {"batch_tokens": 32}}.items():
        got_N = got_scores(built(name, space="logits", **settings), query_records)
        assert np.abs(got_N - expected_N).max() < 1e-4 * np.abs(expected_N).max()


def test_contributions_add_up_to_the_influence(built, model, store):
    index = built(space="logits")
    query = index.query(*records(index, model, store, slice(300, 303), 4).arrays(slice(None)))
    hits = index.score(query).strongest(20)
    for influence, of_token in zip(hits.influence, index.contributions_by_prototype(query, hits.tokens), strict=True):
        assert sum(value for _, value in of_token) == pytest.approx(influence, rel=1e-4)
        assert all(0 <= prototype < 24 for prototype, _ in of_token)


def test_postings_and_usage_list_every_active_token(built, model, store):
    index = built(space="logits")
    indices_Nk, activations_Nk, *_ = everything(index, model, store)
    usage_K = index.usage_K()
    assert usage_K.sum() == (activations_Nk > 0).sum()
    for prototype in range(24):
        tokens, activations = index.postings(prototype)
        token, slot = ((indices_Nk == prototype) & (activations_Nk > 0)).nonzero(as_tuple=True)
        assert np.array_equal(tokens, token.numpy()) and len(tokens) == usage_K[prototype]
        assert np.allclose(activations, activations_Nk[token, slot], atol=1e-3)


def test_entries_read_are_those_of_the_lists(built, model, store):
    index = built(space="logits")
    query_records = records(index, model, store, slice(50, 52))
    indices_Nk, activations_Nk, targets_N, *_ = everything(index, model, store)
    lists = {
        (i, t)
        for row, t in zip(query_records.prototypes_Nk.tolist(), query_records.targets_Nc[:, 0].tolist(), strict=True)
        for i in row
    }
    expected = sum(
        ((indices_Nk == prototype) & (activations_Nk > 0) & (targets_N == target)[:, None]).sum().item()
        for prototype, target in lists
    )
    assert index.entries_read(index.query(*query_records.arrays(slice(None)))) == expected


def test_a_query_about_lists_that_nothing_stands_on_has_no_hits(built, model, store):
    index = built(space="logits")
    indices_Nk, _, targets_N, *_ = everything(index, model, store)
    there = {(i, t) for row, t in zip(indices_Nk.tolist(), targets_N.tolist(), strict=True) for i in row}
    prototype, target = next((i, t) for i in range(24) for t in range(300) if (i, t) not in there)
    missing = np.array([[prototype]]), np.array([[1.0]]), np.array([[target]]), np.array([[1.0]])
    assert len(index.score(index.query(*missing)).tokens) == 0
    assert index.contributions_by_prototype(index.query(*missing), np.array([3, 4])) == [[], []]
    assert len(index.score(Query(np.empty(0, np.int64), np.empty((0, 1), np.float32))).tokens) == 0


def test_numbers_of_lists_fit_their_type():
    nothing = np.zeros((1, 1))
    for vocabulary, expected in ((50_000, np.uint32), (500_000, np.int64)):
        made = LogitShard.of_tokens(
            np.array([[65_535]]), nothing + 1, np.ones(1), np.array([vocabulary - 1]), vocabulary, 65_536
        )
        assert made.lists.dtype == expected and made.lists[0] == 65_536 * vocabulary - 1
    assert len(LogitShard.of_tokens(np.array([[3]]), nothing, np.ones(1), np.array([7]), 10, 8).lists) == 0


def test_lists_beyond_32_bits_are_found(built, model, store, monkeypatch):
    index = built(space="logits")
    query_records = records(index, model, store, slice(300, 303))
    expected_N, usage_K = got_scores(index, query_records), index.usage_K()
    for shard in index.shards:
        monkeypatch.setattr(shard, "lists", shard.lists.astype(np.int64))
    assert np.array_equal(got_scores(index, query_records), expected_N) and np.array_equal(index.usage_K(), usage_K)


@pytest.mark.filterwarnings("error")
def test_without_damping_missing_lists_divide_nothing(built, model, store):
    index = built(space="logits", damping=0.0)
    query_records = records(index, model, store, slice(0, 200), competitors=5)
    assert np.isfinite(got_scores(index, query_records)).all()


def test_an_empty_shard_has_no_hits(built, model, store, monkeypatch):
    index = built(space="logits")
    query_records = records(index, model, store, slice(300, 303))
    empty = LogitShard.of_tokens(np.zeros((5, 1), int), np.zeros((5, 1)), np.ones(5), np.zeros(5, int), 300, 24)
    expected = index.score(index.query(*query_records.arrays(slice(None))))
    monkeypatch.setitem(index.__dict__, "shards", [*index.shards, empty])
    hits = index.score(index.query(*query_records.arrays(slice(None))))
    assert np.array_equal(hits.tokens, expected.tokens) and index.usage_K().sum() > 0


def test_few_and_many_entries_add_up_alike(built, model, store, monkeypatch):
    from prism_lightning.attribution.index import logit_influence

    index = built(space="logits")
    query_records = records(index, model, store, slice(300, 340), competitors=3)
    found = []
    for dense in (0, 10**9):
        monkeypatch.setattr(logit_influence, "DENSE", dense)
        found.append(got_scores(index, query_records))
    assert np.abs(found[0] - found[1]).max() < 1e-5 * np.abs(found[0]).max()
