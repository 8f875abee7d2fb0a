"""EK-FAC influence by the library against gradients by autograd and a curvature computed here from scratch."""

import copy
import logging
import sys

import pytest
import torch
import torch.nn.functional as F
from support.tiny_llama import tiny_llama

from benchmarks.attribution.methods.ekfac import EkFac, LanguageTask
from benchmarks.attribution.task import Queries, Task, query_loss
from prism_lightning.common.errors import UserError

pytest.importorskip("kronfluence")

S, T, V = 11, 8, 48  # 11 sequences: the last of the batches of 4 is short
DRAW = LanguageTask.draw


def make_task(num_prototypes=0):
    model = tiny_llama(num_prototypes)
    return Task(model, torch.randint(V, (S, T + 1)))


@pytest.fixture
def task():
    return make_task()


@pytest.fixture
def queries():
    generator = torch.Generator().manual_seed(1)
    return Queries(torch.randint(V, (5, T + 1), generator=generator), torch.rand(5, T, generator=generator))


def fitted(task, folder, **settings):
    method = EkFac(task, folder, train_batch=4, query_batch=2, **settings)
    method.fit()
    method.open()
    return method


def gradients(model, layers, losses):
    """[losses, rows, columns] of every layer's weight."""
    weights = [model.get_submodule(layer).weight for layer in layers]
    each = [torch.autograd.grad(loss, weights, retain_graph=True) for loss in losses]
    return [torch.stack(parts) for parts in zip(*each, strict=True)]


def losses_on(model, ids_SL, labels_ST):
    logits_STV = model(ids_SL[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits_STV.transpose(1, 2), labels_ST, reduction="none").sum(1)


def error(found, expected):
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("modules", ["layers", "layers+head"])
@pytest.mark.parametrize("num_prototypes", [0, 8])
def test_identity_scores_are_dot_products_of_gradients(tmp_path, queries, modules, num_prototypes):
    task = make_task(num_prototypes)
    queries = Queries(torch.cat([queries.ids_QL, task.train_SL[:1]]), torch.cat([queries.weights_QT, torch.ones(1, T)]))
    found_QS = fitted(task, tmp_path, strategy="identity", modules=modules).scores(queries)
    layers = [name for name, part in task.model.named_modules() if isinstance(part, torch.nn.Linear)]
    layers = [name for name in layers if modules == "layers+head" or name != "lm_head"]
    assert len(layers) == 14 + (modules == "layers+head")
    asked = gradients(task.model, layers, query_loss(task.model, queries))
    trained = gradients(task.model, layers, losses_on(task.model, task.train_SL, task.train_SL[:, 1:]))
    expected_QS = sum(torch.einsum("qio,sio->qs", *pair) for pair in zip(asked, trained, strict=True))
    assert found_QS.dtype == torch.float32 and found_QS.shape == (6, S)
    torch.testing.assert_close(found_QS, expected_QS, rtol=1e-4, atol=1e-4)
    assert found_QS[5].argmax() == 0  # trained on, the sequence itself lowers its loss most


@pytest.mark.parametrize("damping", [0.1, 1e-2])
@pytest.mark.parametrize("strategy", ["ekfac", "kfac", "diagonal"])
def test_scores_are_those_of_an_explicit_curvature(task, tmp_path, queries, monkeypatch, strategy, damping):
    drawn = []
    monkeypatch.setattr(LanguageTask, "draw", lambda *arguments: drawn.append(DRAW(*arguments)) or drawn[-1])
    method = fitted(task, tmp_path, strategy=strategy, damping=damping)
    labels = [part_ST.view(-1, T) for part_ST in torch.cat(drawn).split(S * T)]  # of every pass over the sequences
    assert len(labels) == {"ekfac": 2, "kfac": 1, "diagonal": 1}[strategy]
    expected_QS = explicit_scores(task, method.language.layers, queries, labels, strategy, damping)
    assert error(method.scores(queries), expected_QS) < 1e-3


def explicit_scores(task, layers, queries, labels, strategy, damping):
    model = copy.deepcopy(task.model).double()
    asked = gradients(model, layers, query_loss(model, queries))
    trained = gradients(model, layers, losses_on(model, task.train_SL, task.train_SL[:, 1:]))
    drawn = gradients(model, layers, losses_on(model, task.train_SL, labels[-1]))
    total_QS = torch.zeros(len(queries.ids_QL), S, dtype=torch.float64)
    both = covariances(model, layers, task, labels[0])
    for (inner, outer), *parts in zip(both, asked, trained, drawn, strict=True):
        (inner_I, basis_II), (outer_O, basis_OO) = torch.linalg.eigh(inner), torch.linalg.eigh(outer)
        if strategy != "diagonal":
            parts = [basis_OO.T @ part @ basis_II for part in parts]
        values = outer_O[:, None] * inner_I if strategy == "kfac" else parts[2].square().mean(0)
        damped = values + damping * values.mean()
        total_QS += torch.einsum("qoi,soi->qs", parts[0] / damped, parts[1])
    return total_QS


def covariances(model, layers, task, labels_ST):
    """Means over tokens of a a^T and of g g^T, for every layer with input a and gradient g of its output."""
    inputs, outputs, handles = {}, {}, []

    def keep(layer):
        def hook(_, arguments, output):
            inputs[layer], outputs[layer] = arguments[0].flatten(0, 1), output

        return hook

    for layer in layers:
        handles.append(model.get_submodule(layer).register_forward_hook(keep(layer)))
    loss = losses_on(model, task.train_SL, labels_ST).sum()
    for handle in handles:
        handle.remove()
    found = torch.autograd.grad(loss, [outputs[layer] for layer in layers])
    for layer, gradient in zip(layers, found, strict=True):
        a_NI, g_NO = inputs[layer].detach(), gradient.flatten(0, 1)
        yield a_NI.T @ a_NI / len(a_NI), g_NO.T @ g_NO / len(g_NO)


def test_labels_are_drawn_from_the_models_distribution():
    language = LanguageTask([])
    language.generator = torch.Generator().manual_seed(0)
    logits_V = torch.tensor([0.0, 1.0, -30.0, 2.0])
    drawn_N = language.draw(logits_V.expand(20_000, -1))
    torch.testing.assert_close(drawn_N.bincount(minlength=4) / 20_000, logits_V.softmax(-1), rtol=0, atol=0.01)


def test_rank_of_a_whole_layer_changes_nothing_and_a_low_one_little(task, tmp_path, queries):
    method = fitted(task, tmp_path)
    full_QS = method.scores(queries)
    for rank, tolerance in [(16, 1e-6), (8, 0.1)]:
        method.rank = rank
        assert error(method.scores(queries), full_QS) < tolerance
    assert error(method.scores(queries), full_QS) > 1e-6
    method.rank = 7  # of two in a batch, several batches in a pass
    assert error(method.scores(queries), one_by_one(method, queries)) < 1e-5


@pytest.mark.parametrize("queries_per_pass, passes", [(1, 3), (4, 2), (512, 1)])
def test_batched_queries_score_as_one_by_one(task, tmp_path, queries, monkeypatch, queries_per_pass, passes):
    method = fitted(task, tmp_path, queries_per_pass=queries_per_pass)
    expected_QS, batches, loss = one_by_one(method, queries), [], LanguageTask.compute_train_loss
    monkeypatch.setattr(LanguageTask, "compute_train_loss", lambda *a, **k: batches.append(0) or loss(*a, **k))
    assert error(method.scores(queries), expected_QS) < 1e-5
    assert len(batches) == passes * 3  # 11 sequences, 4 at a time


def one_by_one(method, queries):
    return torch.cat([method.scores(queries.part(n, n + 1)) for n in range(len(queries.ids_QL))])


def test_damping_may_change_between_calls_and_a_large_one_leaves_dot_products(task, tmp_path, queries):
    method = fitted(task, tmp_path / "ekfac", damping=1e-3, modules="head")
    first_QS = method.scores(queries)
    method.damping = 1e8
    dots_QS = fitted(task, tmp_path / "identity", strategy="identity", modules="head").scores(queries)
    first_QS, dots_QS, large_QS = (s / s.norm() for s in (first_QS, dots_QS, method.scores(queries)))
    assert error(large_QS, dots_QS) < 1e-3
    assert error(first_QS, dots_QS) > 0.1
    method.damping = 1e-3
    again_QS = method.scores(queries)
    torch.testing.assert_close(again_QS / again_QS.norm(), first_QS, rtol=0, atol=0)


def test_state_is_the_factors_alone_and_opens_anew(task, tmp_path, queries, capfd):
    level = logging.getLogger().level
    method = fitted(task, tmp_path)
    found_QS = method.scores(queries)
    names = sorted(path.name for path in tmp_path.rglob("*.safetensors"))
    kept = ["activation_eigenvalues", "activation_eigenvectors", "gradient_eigenvalues", "gradient_eigenvectors"]
    assert names == [f"{name}.safetensors" for name in [*kept, "lambda_matrix", "num_lambda_processed"]]
    assert sum(path.stat().st_size for path in tmp_path.rglob("*.json")) < 2_000  # the library's settings
    assert [path.name for path in tmp_path.iterdir()] == ["factors_ekfac"]
    assert type(task.model.lm_head).__name__ == "LanguageModelHead"
    assert all(parameter.requires_grad for parameter in task.model.parameters())

    other = EkFac(task, tmp_path, train_batch=4)
    other.open()
    torch.testing.assert_close(other.scores(queries), found_QS)
    assert capfd.readouterr() == ("", "")
    assert logging.getLogger().level == level


def test_seed_decides_on_the_factors(task, tmp_path, queries):
    first, again, other = (fitted(task, tmp_path / str(n), seed=seed) for n, seed in enumerate([0, 0, 1]))
    found_QS = first.scores(queries)
    torch.testing.assert_close(again.scores(queries), found_QS, rtol=0, atol=0)
    assert error(other.scores(queries), found_QS) > 1e-2
    first.fit()  # draws the same labels again
    first.open()
    torch.testing.assert_close(first.scores(queries), found_QS, rtol=0, atol=0)


def test_what_is_missing_is_named(task, tmp_path, make_model, monkeypatch):
    with pytest.raises(UserError, match="take llama"):
        EkFac(Task(make_model(), task.train_SL), tmp_path)
    monkeypatch.setitem(sys.modules, "kronfluence", None)
    with pytest.raises(UserError, match="benchmarks/peers.txt"):
        EkFac(task, tmp_path)
