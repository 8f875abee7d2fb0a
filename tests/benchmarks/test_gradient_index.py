"""The gradient index against gradients by autograd and a Fisher matrix computed here from scratch."""

import pytest
import scipy.stats
import torch
from support.tiny_llama import tiny_llama

from benchmarks.attribution.methods.gradient_index import GradientIndex, MomentSketch
from benchmarks.attribution.task import Queries, Task, query_loss
from prism_lightning.common.errors import UserError

S, T, V = 13, 8, 48  # 13 sequences: the last of the batches of 4 is short
WHOLE = 10**6  # bytes that hold every coordinate of every layer


@pytest.fixture(scope="module")
def task():
    model = tiny_llama()
    return Task(model, torch.randint(V, (S, T + 1)))


@pytest.fixture
def queries():
    generator = torch.Generator().manual_seed(1)
    return Queries(torch.randint(V, (5, T + 1), generator=generator), torch.rand(5, T, generator=generator))


def fitted(task, folder, bytes_per_sequence=WHOLE, **settings):
    settings = {"precision": "fp16", "batch": 4} | settings
    method = GradientIndex(task, folder, bytes_per_sequence, **settings)
    method.fit()
    method.open()
    return method


def gradients(task, layers, queries):
    """[B, O, I] of every layer's weight by autograd, one sequence at a time."""
    weights = [layer.weight for layer in layers]
    parts = [queries.part(number, number + 1) for number in range(len(queries.ids_QL))]
    rows = [torch.autograd.grad(query_loss(task.model, part).sum(), weights) for part in parts]
    return [torch.stack(layer).double() for layer in zip(*rows, strict=True)]


def dense_scores(task, method, queries, damping, unit_norm=False):
    """g_q^T (F + damping mean I)^-1 g_s layer by layer, with the method's projections, all in float64."""
    total, squares_S = 0, 0
    stored = gradients(task, method.layers, Queries.of_sequences(task.train_SL))
    asked = gradients(task, method.layers, queries)
    for g_SOI, g_QOI, (input_Ii, output_Oo) in zip(stored, asked, method.bases, strict=True):
        g_Sf, g_Qf = ((output_Oo.double().T @ g @ input_Ii.double()).flatten(1) for g in (g_SOI, g_QOI))
        fisher_ff = g_Sf.T @ g_Sf / S
        inverse_ff = torch.linalg.inv(
            fisher_ff + damping * fisher_ff.trace() / len(fisher_ff) * torch.eye(len(fisher_ff))
        )
        total = total + g_Qf @ inverse_ff @ g_Sf.T
        squares_S = squares_S + (g_Sf @ inverse_ff * g_Sf).sum(1)
    return (total / squares_S.sqrt() if unit_norm else total).float()


def close(found, expected, tolerance=2e-3):
    assert found.shape == expected.shape
    assert (found - expected).abs().max() < tolerance * expected.abs().max()


@pytest.mark.parametrize(("projection", "modules"), [("random", "layers"), ("pca", "layers+head"), ("pca", "head")])
def test_full_rank_without_curvature_is_the_dot_product(task, queries, tmp_path, projection, modules):
    method = fitted(task, tmp_path, projection=projection, modules=modules, damping=1e6, precision="fp32")
    assert len(method.layers) == {"layers": 14, "layers+head": 15, "head": 1}[modules]
    stored = gradients(task, method.layers, Queries.of_sequences(task.train_SL))
    asked = gradients(task, method.layers, queries)
    expected = 0
    for g_SOI, g_QOI in zip(stored, asked, strict=True):  # a layer's damping is a share of its own mean eigenvalue
        mean = g_SOI.square().mean()
        expected = expected + (g_QOI.flatten(1) @ g_SOI.flatten(1).T) / (1e6 * mean)
    scores = method.scores(queries)
    close(scores, expected.float(), 1e-4)
    assert torch.equal(scores.argsort(1)[:, [0, -1]], expected.argsort(1)[:, [0, -1]])


@pytest.mark.parametrize(
    ("projection", "size", "unit_norm"), [("pca", 400, False), ("random", 1000, True), ("pca", WHOLE, False)]
)
def test_fisher(task, queries, tmp_path, projection, size, unit_norm):
    method = fitted(task, tmp_path, size, projection=projection, unit_norm=unit_norm, damping=0.05)
    close(method.scores(queries), dense_scores(task, method, queries, 0.05, unit_norm))
    method.damping = 0.7
    close(method.scores(queries), dense_scores(task, method, queries, 0.7, unit_norm))


def test_bytes(task, queries, tmp_path):
    for precision in ("fp16", "int8"):
        for size in (300, 1000, 4096):
            method = fitted(task, tmp_path / f"{precision}{size}", size, precision=precision)
            grown = method.state_bytes() - method.fixed_bytes()
            assert 0.4 * S * size < grown <= S * size
            index = tmp_path / f"{precision}{size}" / "index.safetensors"
            assert grown < index.stat().st_size < grown + 300  # the rest is its header
    with pytest.raises(UserError, match="bytes_per_sequence is 16"):
        GradientIndex(task, tmp_path, 16)


@pytest.mark.parametrize("unit_norm", [False, True])
def test_int8_is_close_to_fp16(task, queries, tmp_path, unit_norm):
    both = [
        fitted(task, tmp_path / name, size, precision=name, unit_norm=unit_norm).scores(queries)
        for name, size in (("fp16", 2000), ("int8", 1002))
    ]
    for half_S, narrow_S in zip(*both, strict=True):
        assert scipy.stats.spearmanr(half_S, narrow_S).statistic > 0.99


def test_second_instance_and_one_by_one(task, queries, tmp_path):
    scores = fitted(task, tmp_path, 1000, precision="int8", unit_norm=True).scores(queries)
    second = GradientIndex(task, tmp_path, 1000, unit_norm=True, batch=2)
    second.open()
    close(second.scores(queries), scores, 1e-5)
    close(torch.cat([second.scores(queries.part(q, q + 1)) for q in range(5)]), scores, 1e-5)
    assert torch.equal(second.top(queries, 4), scores.topk(4).indices)


def test_one_target(task, queries, tmp_path):
    method = fitted(task, tmp_path, 400)
    tokens = Queries.of_tokens(queries.ids_QL, torch.tensor([0, 3, 6, 2, 5]))
    close(method.scores(tokens), dense_scores(task, method, tokens, method.damping))


def test_model_stays(task, queries, tmp_path):
    before = {name: tensor.clone() for name, tensor in task.model.state_dict().items()}
    scores = fitted(task, tmp_path, 400).scores(queries)
    assert all(parameter.grad is None for parameter in task.model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in task.model.state_dict().items())
    assert not any(module._forward_hooks for module in task.model.modules())
    task.model.requires_grad_(False)
    try:
        with torch.no_grad():  # as a caller might
            close(fitted(task, tmp_path, 400).scores(queries), scores, 1e-5)
    finally:
        task.model.requires_grad_(True)


def test_sketch_finds_leading_eigenvectors():
    generator = torch.Generator().manual_seed(0)
    rows_NI = torch.randn(3000, 200, generator=generator) * torch.arange(1, 201) ** -0.7
    moment_II = rows_NI.T @ rows_NI
    for size, count in ((200, 50), (200, 10), (12, 12)):
        sketch = MomentSketch(size, count, generator)
        for part_NI in rows_NI[:, :size].split(500):
            sketch.add(part_NI)
        basis_Ic = sketch.top()
        torch.testing.assert_close(basis_Ic.T @ basis_Ic, torch.eye(count), rtol=0, atol=1e-5)
        held = (basis_Ic.T @ moment_II[:size, :size] @ basis_Ic).trace()
        best = torch.linalg.eigvalsh(moment_II[:size, :size])[-count:].sum()
        assert held > (0.99999 if 4 * count >= size else 0.98) * best
