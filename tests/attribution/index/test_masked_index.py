"""An index over masked data is the brute force over the tokens with targets; its rows still locate documents."""

import json

import numpy as np
import pytest
import torch
from support.corpus_model import BACKBONE
from support.curvature import dictionary_of
from support.fine_tuning import completion_data

from prism_lightning.attribution.build.builder import Builder
from prism_lightning.attribution.curvature.dictionary import Dictionary
from prism_lightning.attribution.curvature.hessian import HessianSums
from prism_lightning.attribution.curvature.records import LogitRecords, Records, head_chunks, loss_gradients, residuals
from prism_lightning.attribution.index.logit_influence import PRIOR
from prism_lightning.attribution.index.opening import open_index
from prism_lightning.attribution.results import Describer
from prism_lightning.attribution.settings import IndexSettings
from prism_lightning.common.errors import UserError
from prism_lightning.common.targets import IGNORED_TARGET
from prism_lightning.inspection.labels import Labeller
from prism_lightning.run.fingerprints import open_store

SETTINGS = {"dictionary": "model", "fit_tokens": 400, "batch_tokens": 64, "shard_tokens": 800}


@pytest.fixture
def store(tmp_path):
    return completion_data(tmp_path).train


@torch.no_grad()
def kept_states(model, store):
    """Hidden states, targets and rows of the tokens with targets, block by block."""
    parts = []
    for block in range(len(store)):
        item = store[block]
        kept = item["targets"] != IGNORED_TARGET
        z_TD = model.hidden_states(item["input_ids"][None], position_ids=item["position_ids"][None])[0]
        parts.append((z_TD[kept], item["targets"][kept], block * store.block_size + kept.nonzero()[:, 0]))
    return tuple(map(torch.cat, zip(*parts, strict=True)))


def logit_scores(index, model, store, query):
    """The formula of `logit_influence.py` with dense matrices over the tokens with targets."""
    z_ND, targets_N, _ = kept_states(model, store)
    pi_NV = model.lm_head(z_ND).softmax(-1).detach()
    vocabulary = pi_NV.shape[1]
    indices_Nk, activations_Nk = dictionary_of(index).assign(z_ND)
    a_NK = torch.zeros(len(targets_N), index.num_prototypes).scatter_(1, indices_Nk, activations_Nk)
    errors_N = 1 - pi_NV.gather(1, targets_N[:, None])[:, 0]
    labels_VK = torch.zeros(vocabulary, index.num_prototypes)
    counts_VK = labels_VK.index_add(0, targets_N, (a_NK > 0).float())
    labels_VK = labels_VK.index_add(0, targets_N, a_NK.square() * errors_N[:, None])
    prior_VK = torch.zeros(vocabulary).index_add(0, targets_N, errors_N)[:, None] * a_NK.square().sum(0)
    curvature_VK = (counts_VK * labels_VK + PRIOR * prior_VK / len(targets_N)) / (counts_VK + PRIOR)
    curvature_VK += 0.05 * labels_VK[labels_VK > 0].mean()
    same_N = (targets_N == targets_N[query]) * errors_N[query]
    scores_N = same_N * errors_N * (a_NK * a_NK[query] / curvature_VK[targets_N]).sum(1)
    one = slice(query, query + 1)
    _, tokens, values = residuals(model.lm_head.weight.detach(), z_ND[one], targets_N[one])
    return scores_N.numpy(), LogitRecords(indices_Nk[one], activations_Nk[one], tokens, values)


def hidden_scores(index, model, store, query):
    """g^T H^-1 g of section 4 over the tokens with targets, in float64."""
    model = model.double()
    prototypes_KD = dictionary_of(index).prototypes_KD.double()
    dictionary = Dictionary(prototypes_KD, index.manifest["active"])
    z_ND, targets_N, _ = kept_states(model, store)
    head_VD = model.lm_head.weight.detach()
    records = Records(*dictionary.assign(z_ND), loss_gradients(head_VD, z_ND, targets_N)[1])
    sums = HessianSums(head_VD, len(prototypes_KD))
    for chunk in head_chunks(head_VD, z_ND):
        sums.add(chunk, records.prototypes_Nk[chunk.rows], records.activations_Nk[chunk.rows])
    count = len(targets_N)
    activation_K, curvature_DD = sums.activation_K / count, sums.gauss_newton_DD() / count
    curvature_DD = curvature_DD + 1e-3 * curvature_DD.diagonal().mean() * torch.eye(len(curvature_DD))
    a_NK = torch.zeros(count, len(prototypes_KD), dtype=torch.float64)
    a_NK.scatter_(1, records.prototypes_Nk, records.activations_Nk)
    shared_N = (a_NK * a_NK[query] / (activation_K + 1e-3 * activation_K.mean())).sum(1)
    scores_N = shared_N * (records.delta_ND @ torch.linalg.inv(curvature_DD) @ records.delta_ND[query]) / count
    model.float()
    one = slice(query, query + 1)
    return scores_N.numpy(), Records(*(tensor[one] for tensor in records))


@pytest.mark.parametrize("space", ["logits", "hidden"])
def test_scores_are_the_brute_force_over_tokens_with_targets(built, model, store, space):
    index = built(over=store, space=space, **SETTINGS)
    _, targets_N, rows_N = kept_states(model, store)
    assert index.num_shards > 1 and index.tokens == len(store) * store.block_size
    assert index.targets == len(targets_N) == int(store.targets_in(range(len(store))).sum()) < index.tokens
    brute_force, tolerance = (logit_scores, 2e-3) if space == "logits" else (hidden_scores, 1e-4)
    for query in (0, 77, len(targets_N) - 1):
        expected_N, records = brute_force(index, model, store, query)
        hits = index.score(index.query(*records.arrays(slice(None))))
        got = np.zeros(index.tokens)
        got[hits.tokens] = hits.influence
        assert np.abs(got[rows_N] - expected_N).max() < tolerance * np.abs(expected_N).max()
        assert not np.delete(got, rows_N).any()


@pytest.mark.parametrize("space", ["logits", "hidden"])
def test_lists_have_tokens_with_targets_alone_and_rows_locate_them(built, model, store, space):
    index = built(over=store, space=space, **SETTINGS)
    *_, rows_N = kept_states(model, store)
    listed = np.concatenate([index.postings(prototype)[0] for prototype in range(index.num_prototypes)])
    assert set(listed.tolist()) <= set(rows_N.tolist())
    assert index.usage_K().sum() == len(listed)
    reopened = open_store(index.manifest, index.folder)
    assert reopened.isolated
    assert all(reopened.are_targets(listed + 1))
    described = Describer(reopened, index)
    row = int(listed[5])
    number = int(store.documents_of(row + 1))
    assert described.source(row + 1).endswith(f"row {store.documents['row'][number].as_py()}")


@pytest.mark.parametrize("space", ["logits", "hidden"])
@pytest.mark.parametrize("settings", [{"shard_tokens": 100_000}, {"batch_tokens": 32}, {"shard_tokens": 64}])
def test_shards_and_batches_without_targets_change_nothing(built, make_model, tmp_path, space, settings):
    """Long prompts fill whole batches and shards."""
    rows = [{"ask": {"text": "many words " * 60}, "answer": f"{n} words"} for n in range(25)]
    long = completion_data(tmp_path, rows).train
    assert (long.targets_in(range(len(long))) == 0).sum() > 5
    model = make_model(BACKBONE, num_prototypes=24, active_prototypes=3).eval()
    one = built("one", using=model, over=long, space=space, **SETTINGS)
    other = built("other", using=model, over=long, space=space, **SETTINGS | settings)
    records = (logit_scores if space == "logits" else hidden_scores)(one, model, long, 30)[1]
    first, second = (index.score(index.query(*records.arrays(slice(None)))) for index in (one, other))
    assert len(first.tokens) and np.array_equal(first.tokens, second.tokens)
    assert np.abs(first.influence - second.influence).max() < 1e-4 * np.abs(first.influence).max()


def test_ranks_build_the_same_bytes(built, store):
    one = built("one", over=store, **SETTINGS)
    assert built("two", over=store, rank=1, world_size=2, **SETTINGS) is None
    two = built("two", over=store, rank=0, world_size=2, **SETTINGS)
    for path in one.folder.rglob("*.safetensors"):
        assert path.read_bytes() == (two.folder / path.relative_to(one.folder)).read_bytes()


def test_the_number_of_targets_is_checked_and_recorded(built, store):
    index = built(over=store, space="logits", **SETTINGS)
    manifest = json.loads((index.folder / "manifest.json").read_text())
    assert manifest["targets"] == index.targets and manifest["isolated"] is True
    for wrong in ({**manifest, "targets": index.targets - 1}, {k: v for k, v in manifest.items() if k != "targets"}):
        (index.folder / "manifest.json").write_text(json.dumps(wrong))
        with pytest.raises(UserError, match=f"targets is .* the index's files have {index.targets}"):
            open_index(index.folder)


def test_another_isolation_is_another_index(built, model, store, tmp_path):
    built(over=store, **SETTINGS)
    crossing = completion_data(tmp_path, isolate_documents=False).train
    with pytest.raises(UserError, match="an index with another .*isolated"):
        Builder(model, crossing, IndexSettings(space="hidden", precision="fp32"), tmp_path / "index", print)


def test_the_default_number_of_prototypes_follows_the_targets(model, store, tmp_path):
    builder = Builder(model, store, IndexSettings(space="hidden"), tmp_path / "index", print)
    largest = 2 ** int(np.log2(builder.targets / 32))
    assert builder._size() == largest < 2 ** int(np.log2(builder.tokens / 32))


def test_labels_compare_with_the_tokens_of_targets(store):
    labeller = Labeller(store)
    targets = store.are_targets(np.arange(1, len(store.tokens)))
    size = store.manifest["tokenizer_size"]
    assert labeller.target_counts_V.tolist() == np.bincount(store.tokens[1:][targets], minlength=size).tolist()
    assert labeller.read_counts_V.tolist() == np.bincount(store.tokens[:-1][targets], minlength=size).tolist()
