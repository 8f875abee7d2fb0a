"""The methods of our own against brute force over every pair of tokens."""

import pytest
import torch
from support.bm25 import bm25_scores
from support.tiny_llama import tiny_llama
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerFast

from benchmarks.attribution.methods.exact import ExactPrototypes
from benchmarks.attribution.methods.head import Head
from benchmarks.attribution.methods.prototypes import Prototypes, polished
from benchmarks.attribution.methods.simple import Bm25, HiddenCosine, Random
from benchmarks.attribution.methods.target_match import TargetKernel
from benchmarks.attribution.registry import make
from benchmarks.attribution.task import Queries, Task
from prism_lightning.attribution.curvature.records import Records
from prism_lightning.attribution.index.logit_influence import PRIOR
from prism_lightning.common.errors import UserError

VOCABULARY, LENGTH = 48, 9


@pytest.fixture(scope="module")
def task():
    model = tiny_llama(12, num_hidden_layers=1, intermediate_size=32)
    return Task(model, torch.randint(VOCABULARY, (21, LENGTH)))


@pytest.fixture(scope="module")
def queries():
    ids = torch.randint(VOCABULARY, (4, LENGTH), generator=torch.Generator().manual_seed(1))
    return Queries(ids, torch.tensor([[1.0] * 8, [0] * 3 + [1] + [0] * 4, [0] * 7 + [2], [0.5] * 8]))


@torch.no_grad()
def states(model, ids):
    """z and delta [.., T, D] and the head's curvature M_t [.., T, D, D] of every target."""
    head = model.lm_head.weight
    z = model.hidden_states(ids[:, :-1])
    p = (z @ head.T).softmax(-1)
    mean = p @ head
    curvature = torch.einsum("btv,vd,ve->btde", p, head, head) - mean[..., None] * mean[..., None, :]
    return z, mean - head[ids[:, 1:]], curvature


def expected_head(task, queries, divide):
    """Scores [Q, S] from the gradients' [D, D] matrices, divided by a curvature."""
    z, delta, _ = states(task.model, queries.ids_QL)
    asked = torch.einsum("qt,qtd,qte->qde", queries.weights_QT, z, delta)
    z, delta, _ = states(task.model, task.train_SL)
    return torch.einsum("qde,sde->qs", divide(asked), torch.einsum("std,ste->sde", z, delta))


def moments(task):
    z, _, curvature = states(task.model, task.train_SL)
    return (z.flatten(0, 1).T @ z.flatten(0, 1)) / z[..., 0].numel(), curvature.mean((0, 1)), z, curvature


def opened(method):
    method.fit()
    method.open()
    return method


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-3 * expected.abs().max().item())


def test_head_without_curvature_is_the_gradient_dot_product(task, queries, tmp_path):
    found = opened(Head(task, tmp_path, "identity")).scores(queries)
    close(found, expected_head(task, queries, lambda g: g))
    rows = []
    for part in (Queries.of_sequences(task.train_SL), queries):
        matrix = torch.eye(16, requires_grad=True)  # in front of the head
        logits = task.model.hidden_states(part.ids_QL[:, :-1]) @ matrix @ task.model.lm_head.weight.T
        losses = cross_entropy(logits.transpose(1, 2), part.ids_QL[:, 1:], reduction="none") * part.weights_QT
        rows.append([torch.autograd.grad(loss, matrix, retain_graph=True)[0].flatten() for loss in losses.sum(1)])
    close(found, torch.stack(rows[1]) @ torch.stack(rows[0]).T)


def test_head_kfac_divides_by_both_factors(task, queries, tmp_path):
    hidden, gradient, _, _ = moments(task)
    eye = torch.eye(16)
    left, right = (torch.linalg.inv(m + 0.01 * m.diagonal().mean() * eye) for m in (hidden, gradient))
    method = opened(Head(task, tmp_path, damping=0.01))
    close(method.scores(queries), expected_head(task, queries, lambda g: left @ g @ right))


def test_head_ekfac_divides_by_the_corrected_eigenvalues(task, queries, tmp_path):
    hidden, gradient, z, curvature = moments(task)
    u, v = (torch.linalg.eigh(m)[1] for m in (hidden, gradient))
    along = torch.einsum("stde,dj,ej->stj", curvature, v, v)
    products = torch.einsum("sti,stj->ij", (z @ u).square(), along) / z[..., 0].numel()
    damped = products + 0.01 * products.mean()
    method = opened(Head(task, tmp_path, "ekfac", 0.01))
    close(method.scores(queries), expected_head(task, queries, lambda g: u @ ((u.T @ g @ v) / damped) @ v.T))


def test_head_keeps_its_bytes(task, queries, tmp_path):
    whole = opened(Head(task, tmp_path / "whole")).scores(queries)
    narrow = opened(Head(task, tmp_path / "narrow", bytes_per_token=34))
    assert narrow.state["gradients"].nbytes + narrow.state["scales"].nbytes == 21 * (16 * 16 + 2)
    assert torch.corrcoef(torch.stack([whole.flatten(), narrow.scores(queries).flatten()]))[0, 1] > 0.999
    tight = opened(Head(task, tmp_path / "tight", bytes_per_token=10))
    assert tight.state["gradients"].shape == (21, 8 * 8)  # 80 bytes a sequence, less its scale


@torch.no_grad()
def expected_prototypes(task, queries, method):
    """sum_i a_qi a_si / A_ii delta_q^T S^-1 delta_s over all pairs of tokens, over the number of training tokens."""
    z, delta, curvature = states(task.model, task.train_SL)
    stored = Records(*method.dictionary.assign(z.flatten(0, 1)), delta.flatten(0, 1))
    z, delta, _ = states(task.model, queries.ids_QL)
    asked = Records(*method.dictionary.assign(z.flatten(0, 1)), delta.flatten(0, 1))
    size, tokens = len(method.dictionary.unit_KD), len(stored.prototypes_Nk)
    dense = [
        torch.zeros(len(r.prototypes_Nk), size).scatter_(1, r.prototypes_Nk, r.activations_Nk) for r in (asked, stored)
    ]
    usage = dense[1].square().mean(0)
    usage = usage + method.damping * usage.mean()
    mean = curvature.mean((0, 1))
    inverse = torch.linalg.inv(mean + method.damping * mean.diagonal().mean() * torch.eye(16))
    pairs = (dense[0] / usage @ dense[1].T) * (asked.delta_ND @ inverse @ stored.delta_ND.T)
    by_query = (pairs * queries.weights_QT.reshape(-1, 1)).view(len(queries.ids_QL), -1, pairs.shape[1]).sum(1)
    return by_query.view(len(by_query), len(task.train_SL), -1).sum(-1) / tokens


FITTED = {"tokens_per_prototype": 8, "active": 2, "fit_steps": 5}


@pytest.mark.parametrize("settings", [{"dictionary": "model"}, FITTED, FITTED | {"encoder": "pursuit"}])
def test_prototypes_are_the_brute_force_sum(task, queries, tmp_path, settings):
    method = opened(Prototypes(task, tmp_path, space="hidden", precision="fp32", **settings))
    close(method.scores(queries), expected_prototypes(task, queries, method))
    method.damping = 0.1
    method.damping = 0.5
    close(method.scores(queries), expected_prototypes(task, queries, method))


def test_top_names_the_best_sequences_that_share_a_prototype(task, queries, tmp_path):
    method = opened(Prototypes(task, tmp_path, space="hidden", tokens_per_prototype=4, active=1, fit_steps=0))
    scores, top = method.scores(queries), method.top(queries, 100)
    for row, best in zip(scores, top, strict=True):
        found = best[best >= 0]
        assert (row[found].diff() <= 0).all()
        assert len(found) == len(row.nonzero())
        assert row[found[0]] == row[row != 0].max()
    token = queries.part(1, 2)
    touched = method.index.usage_K()[method.records(token)[0].prototypes_Nk[0].item()]
    assert method.share_read(token) == pytest.approx(touched / method.index.tokens)


def test_polishing_explains_more_and_leaves_the_model_alone(task, tmp_path):
    before = task.model.prototypes.weight.clone()
    better = Prototypes(task._replace(model=polished(task, 50)), tmp_path / "a", dictionary="model")
    plain = Prototypes(task, tmp_path / "b", dictionary="model")
    assert opened(better).unexplained_variance() < opened(plain).unexplained_variance()
    assert torch.equal(task.model.prototypes.weight, before)


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    words = {f"w{n}": n for n in range(VOCABULARY)}
    backend = Tokenizer(models.WordLevel(words, unk_token="w0"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Whitespace(), decoders.WordPiece()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def test_bm25_is_the_formula(task, queries, tmp_path, tokenizer):
    whole = Queries.of_sequences(queries.ids_QL)
    found = opened(Bm25(task, tmp_path, tokenizer)).scores(whole)
    texts = [tokenizer.batch_decode(ids) for ids in (whole.ids_QL, task.train_SL)]
    torch.testing.assert_close(found, bm25_scores(*texts), rtol=1e-5, atol=1e-5)


def test_bm25_of_a_token_query_ends_with_the_target(task, queries, tmp_path, tokenizer):
    method = opened(Bm25(task, tmp_path, tokenizer))
    found = method.scores(queries.part(1, 2))
    texts = tokenizer.batch_decode([queries.ids_QL[1, :5].tolist()]), tokenizer.batch_decode(task.train_SL)
    torch.testing.assert_close(found, bm25_scores(*texts), rtol=1e-5, atol=1e-5)


def test_cosine_finds_the_sequence_itself(task, tmp_path):
    found = opened(HiddenCosine(task, tmp_path)).scores(Queries.of_sequences(task.train_SL[:5]))
    assert found.argmax(1).tolist() == list(range(5))
    assert found.max() == pytest.approx(1, abs=1e-2)


def test_random_differs_by_query(task, queries, tmp_path):
    found = opened(Random(task, tmp_path)).scores(queries)
    assert found.shape == (4, 21) and torch.equal(opened(Random(task, tmp_path)).scores(queries), found)
    assert len({tuple(row) for row in found.argsort(1).tolist()}) == 4  # four orders of the sequences


def test_unknown_methods_and_settings_are_named(task, tmp_path, tokenizer):
    with pytest.raises(UserError, match="did you mean prototypes"):
        make(task, tmp_path, {"kind": "prototype"}, tokenizer)
    with pytest.raises(UserError, match="dampin"):
        make(task, tmp_path, {"kind": "head", "dampin": 1}, tokenizer)


def test_exact_is_the_whole_gauss_newton_matrix(task, queries, tmp_path):
    method = opened(ExactPrototypes(task, tmp_path, dictionary="model", damping=0.1))
    _, delta, curvature = states(task.model, task.train_SL)
    stored, size = method.stored, len(method.dictionary.unit_KD)
    dense = torch.zeros(len(method.z_ND), size).scatter_(1, stored.prototypes_Nk, stored.activations_Nk)
    matrix = torch.einsum("ni,nj,nde->idje", dense, dense, curvature.flatten(0, 1)) / len(dense)
    matrix = matrix.reshape(size * 16, size * 16) + method.ridge * torch.eye(size * 16)
    records, which = method.records(queries)
    asked = torch.stack([method._gradient(records, torch.from_numpy(which) == query) for query in range(4)])
    gradients = torch.einsum("ni,nd->nid", dense, delta.flatten(0, 1)).view(len(task.train_SL), -1, size * 16).sum(1)
    expected = torch.linalg.solve(matrix, asked.flatten(1).T).T @ gradients.T / len(dense)
    found = method.scores(queries)
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02 * expected.abs().max().item())
    assert 1 < method.steps[0] < 100
    image = method.product(asked).flatten(1)
    torch.testing.assert_close(image, asked.flatten(1) @ matrix, rtol=1e-3, atol=1e-3 * image.abs().max().item())


@torch.no_grad()
def expected_by_target(task, queries, method):
    """The formula of `index/logit_influence.py`, over all pairs of tokens."""
    sides = []
    for ids in (queries.ids_QL, task.train_SL):
        z = task.model.hidden_states(ids[:, :-1]).flatten(0, 1)
        predicted, targets = task.model.lm_head(z).softmax(-1), ids[:, 1:].flatten()
        dense = torch.ones(len(z), 1)  # target match: one prototype, active everywhere
        if isinstance(method, Prototypes):
            dense = torch.zeros(len(z), method.index.num_prototypes).scatter_(1, *method.dictionary.assign(z))
        sides.append((dense, targets, 1 - predicted[torch.arange(len(z)), targets]))
    (asked, query_targets, query_target_errors), (stored, targets, target_errors) = sides
    terms = stored.square() * target_errors[:, None]
    labels, counts = (
        torch.zeros(VOCABULARY, stored.shape[1]).index_add_(0, targets, t) for t in (terms, 1.0 * (stored > 0))
    )
    separable = (
        torch.zeros(VOCABULARY).index_add_(0, targets, target_errors)[:, None] * stored.square().sum(0) / len(targets)
    )
    curvature = (counts * labels + PRIOR * separable) / (counts + PRIOR)
    curvature = curvature + method.damping * labels[labels > 0].mean()
    kernel = torch.stack([(row / curvature[v]) @ stored.T for row, v in zip(asked, query_targets, strict=True)])
    pairs = kernel * (query_targets[:, None] == targets) * query_target_errors[:, None] * target_errors
    pairs = (pairs * queries.weights_QT.reshape(-1, 1)).view(len(queries.ids_QL), -1, len(targets)).sum(1)
    return pairs.view(len(pairs), len(task.train_SL), -1).sum(-1)


def test_target_kernel_is_the_heads_influence_on_the_targets_own_logit(task, queries, tmp_path):
    method = opened(TargetKernel(task, tmp_path, damping=0.3))
    (z_q, _, _), (z_s, _, _) = (states(task.model, ids) for ids in (queries.ids_QL, task.train_SL))
    target_errors_of = [1 - torch.exp(-losses(task.model, ids)) for ids in (queries.ids_QL, task.train_SL)]
    second = torch.einsum("std,ste->de", z_s, z_s) / z_s[..., 0].numel()
    counts = torch.zeros(VOCABULARY).index_add_(0, task.train_SL[:, 1:].flatten(), target_errors_of[1].flatten())
    curvature = counts + 0.3 * counts[counts > 0].mean()
    for share in (0.01, 1.0):
        method.hidden_damping = share
        inverse = torch.linalg.inv(second + share * second.diagonal().mean() * torch.eye(16))
        same = queries.ids_QL[:, None, 1:, None] == task.train_SL[None, :, None, 1:]
        pairs = torch.einsum("qtd,de,sue->qstu", z_q, inverse, z_s) * same
        asked = queries.weights_QT * target_errors_of[0] / curvature[queries.ids_QL[:, 1:]]
        expected = torch.einsum("qstu,qt,su->qs", pairs, asked, target_errors_of[1])
        found = method.scores(queries)
        assert (found - expected).norm() / expected.norm() < 0.02  # int8
    assert method.state["hidden"].shape == (21 * 8, 16)
    narrow = opened(TargetKernel(task, tmp_path / "narrow", bytes_per_token=14))
    assert narrow.state["hidden"].shape == (21 * 8, 4)
    assert narrow.share_read(queries) == method.share_read(queries)


@torch.no_grad()
def losses(model, ids):
    logits = model(ids[:, :-1], use_cache=False).logits
    return cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")


@pytest.mark.parametrize("kind", ["prototypes", "target_match"])
def test_logit_space_is_the_formula(task, queries, tmp_path, tokenizer, kind):
    settings = {"tokens_per_prototype": 20, "active": 2, "fit_steps": 5} if kind == "prototypes" else {}
    method = opened(make(task, tmp_path, {"kind": kind} | settings, tokenizer))
    expected = expected_by_target(task, queries, method)
    close(method.scores(queries), expected)
    for row, best in zip(expected, method.top(queries, 5), strict=True):
        best = best[best >= 0]
        torch.testing.assert_close(row[best], row[row > 0].sort(descending=True).values[: len(best)], rtol=1e-2, atol=0)
    same = (queries.ids_QL[1, 4] == task.train_SL[:, 1:]).sum() / task.train_SL[:, 1:].numel()
    share = method.share_read(queries.part(1, 2))
    # A token stands on the lists of both its active prototypes.
    assert share <= 2 * same + 1e-6 if kind == "prototypes" else share == pytest.approx(same.item())
    assert method.share_read(queries.part(0, 1)) > share
    method.damping = 0.3
    method.damping = 2.0
    close(method.scores(queries), expected_by_target(task, queries, method))
