"""TRAK by the library against its formula, from gradients by autograd and an explicit projection matrix."""

import sys

import numpy as np
import pytest
import torch

pytest.importorskip("trak")

from support.tiny_llama import tiny_llama

from benchmarks.attribution.methods.trak import HadamardProjection, Trak, hadamard
from benchmarks.attribution.task import Queries, Task
from prism_lightning.common.errors import UserError

S, T, V = 13, 8, 48


@pytest.fixture(scope="module")
def task():
    return Task(tiny_llama(), torch.randint(V, (S, T + 1), generator=torch.Generator().manual_seed(2)))


@pytest.fixture
def queries():
    generator = torch.Generator().manual_seed(1)
    return Queries(torch.randint(V, (5, T + 1), generator=generator), torch.rand(5, T, generator=generator))


def fitted(task, folder, **settings):
    method = Trak(task, folder, **settings)
    method.fit()
    method.open()
    return method


def probabilities(model, ids_L):
    return model(ids_L[None, :-1], use_cache=False).logits[0].softmax(-1)[torch.arange(T), ids_L[1:]]


def margin_gradients(model, queries, of_loss=False, head_only=False):
    """[B, P] by autograd, from log p / (1 - p) as written."""
    decoder = [*([] if head_only else model.backbone.parameters()), model.lm_head.weight]
    decoder = list({id(parameter): parameter for parameter in decoder}.values())  # once where tied
    rows = []
    for ids_L, weights_T in zip(*queries, strict=True):
        p_T = probabilities(model.double(), ids_L)
        outputs_T = p_T.log() if of_loss else (p_T / (1 - p_T)).log()
        gradients = torch.autograd.grad((outputs_T * weights_T).sum(), decoder)
        rows.append(torch.cat([gradient.flatten() for gradient in gradients]))
    model.float()
    return torch.stack(rows)


def explicit(projection, parameters):
    """[P, k]: rows of Sylvester's Hadamard matrix, whose entry i, j is the parity of the bits of i and j."""
    rows, columns = projection.kept_k.numpy()[:, None], np.arange(parameters)
    parity = np.bitwise_count(rows & columns) % 2
    return torch.from_numpy(1.0 - 2 * parity).T * projection.signs_P[:, None]


def trak_scores(models, projections, train_SL, queries, damping, of_loss=False, head_only=False):
    """[Q, S] by the formula, one matrix at a time."""
    total, weight_S = 0, 0
    for model, projection in zip(models, projections, strict=True):
        rows_SP = margin_gradients(model, Queries.of_sequences(train_SL), head_only=head_only)
        matrix_Pk = explicit(projection, rows_SP.shape[1]) / rows_SP.shape[1] ** 0.5
        x_Sk, asked_Qk = rows_SP @ matrix_Pk, margin_gradients(model, queries, of_loss, head_only) @ matrix_Pk
        moment_kk = x_Sk.T @ x_Sk
        ridge_kk = moment_kk + damping * moment_kk.diagonal().mean() * torch.eye(len(moment_kk))
        inverse_kk = torch.linalg.inv(ridge_kk)
        total = total + asked_Qk @ (inverse_kk / inverse_kk.abs().mean()) @ x_Sk.T  # traker's unit
        weight_S = weight_S + torch.stack([1 - probabilities(model, ids_L) for ids_L in train_SL]).mean(1)
    return (total * weight_S / len(models) ** 2).detach().float()


def close(found, expected, tolerance=2e-3):
    assert (found - expected).abs().max() < tolerance * expected.abs().max()


@pytest.mark.parametrize("dimension", [8, 64])  # below and above S
@pytest.mark.parametrize("checkpoints", [1, 2])
def test_formula(task, queries, tmp_path, dimension, checkpoints):
    models = [task.model, tiny_llama(seed=1)][:checkpoints]
    method = fitted(task, tmp_path, dimension=dimension, checkpoints=models, precision="fp32", damping=0.5)
    expected = trak_scores(models, method.projections, task.train_SL, queries, 0.5)
    close(method.scores(queries), expected)


def test_losses_asked_of_the_head_alone(task, queries, tmp_path):
    method = fitted(task, tmp_path, dimension=64, modules="head", asked="loss", precision="fp32")
    expected = trak_scores([task.model], method.projections, task.train_SL, queries, 1.0, True, True)
    close(method.scores(queries), expected)


def test_tied_head(task, queries, tmp_path):
    tied = Task(tiny_llama(seed=0, tie_word_embeddings=True), task.train_SL)
    method = fitted(tied, tmp_path, dimension=32)
    close(method.scores(queries), trak_scores([tied.model], method.projections, task.train_SL, queries, 1.0))


def test_damping_is_changed_in_place(task, queries, tmp_path):
    method = fitted(task, tmp_path / "a", dimension=64, damping=1.0)
    before = method.scores(queries)
    method.damping = 0.1
    close(method.scores(queries), fitted(task, tmp_path / "b", dimension=64, damping=0.1).scores(queries))
    method.damping = 1.0
    close(method.scores(queries), before)
    method.damping = 1e-4
    assert method.scores(queries).isfinite().all()


def test_second_instance(task, queries, tmp_path):
    scores = fitted(task, tmp_path, dimension=32).scores(queries)
    (tmp_path / "gradients.safetensors").unlink()  # kept for other dampings only
    second = Trak(task, tmp_path, dimension=32)
    second.open()
    assert torch.equal(second.scores(queries), scores)
    assert second.top(queries, 3).shape == (5, 3)


def test_half_precision_loses_nothing(task, queries, tmp_path):
    half, single = (fitted(task, tmp_path / name, dimension=32, precision=name) for name in ("fp16", "fp32"))
    close(half.scores(queries), single.scores(queries), 1e-3)
    assert S * 32 * 2 < half.state_bytes() < S * 32 * 2 + 1000


def test_one_target_and_one_by_one(task, queries, tmp_path):
    method = fitted(task, tmp_path, dimension=32)
    tokens = Queries.of_tokens(queries.ids_QL, torch.tensor([0, 3, 7, 2, 5]))
    expected = trak_scores([task.model], method.projections, task.train_SL, tokens, 1.0)
    close(method.scores(tokens), expected)
    close(torch.cat([method.scores(tokens.part(q, q + 1)) for q in range(5)]), expected)


def test_sequence_helps_itself_and_model_stays(task, tmp_path):
    before = {name: tensor.clone() for name, tensor in task.model.state_dict().items()}
    with torch.no_grad():  # as a caller might
        scores = fitted(task, tmp_path, dimension=32).scores(Queries.of_sequences(task.train_SL))
    assert (scores.diagonal() > 0).all()
    assert (scores.argmax(1) == torch.arange(S)).float().mean() > 0.9
    assert all(parameter.grad is None for parameter in task.model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in task.model.state_dict().items())


@pytest.mark.parametrize("size", [2, 64, 2048])
def test_projection_keeps_inner_products(size):
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, size, generator=generator)
    torch.testing.assert_close(hadamard(hadamard(a)) / size, a, rtol=1e-4, atol=1e-5)
    whole = HadamardProjection(size, size, 0)
    torch.testing.assert_close(whole.project(a) @ whole.project(b) / size, a @ b, rtol=1e-3, atol=1e-3)
    if size == 2048:
        several = [HadamardProjection(size, 256, seed) for seed in range(200)]
        estimates = torch.stack([one.project(a) @ one.project(a + b) / 256 for one in several])
        error = estimates.std() / len(estimates) ** 0.5
        assert abs(estimates.mean() - a @ (a + b)) < 4 * error
        assert estimates.std() < 1.2 * ((a @ a * ((a + b) @ (a + b)) + (a @ (a + b)) ** 2) / 256).sqrt()  # of signs


def test_refusals(task, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="dimension is 100000"):
        Trak(task, tmp_path, dimension=100_000)
    monkeypatch.setitem(sys.modules, "trak", None)
    with pytest.raises(UserError, match="benchmarks/peers.txt"):
        Trak(task, tmp_path, dimension=32)
