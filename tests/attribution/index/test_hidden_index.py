"""Scores of an index are g^T H^-1 g; what is narrow ranks alike; sums are exact."""

import json

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from support.corpus_model import FirstBlocks, hidden_and_targets
from support.curvature import dictionary_of, question, statistics

from prism_lightning.attribution.index.base import Hits
from prism_lightning.attribution.index.opening import open_index
from prism_lightning.common.errors import UserError

DAMPING = 1e-3  # the settings' default


def dense_gradients(records, size):
    """g of every token for every prototype, [N, K, D]."""
    gradients_NkD = records.gradients_NkD()
    dense = torch.zeros(len(gradients_NkD), size, gradients_NkD.shape[-1], dtype=torch.float64)
    return dense.scatter_(1, records.prototypes_Nk[..., None].expand_as(gradients_NkD), gradients_NkD)


def separable_inverse(sums):
    """(A_ii + d mean A)^-1 and (S + d mean S)^-1."""
    activation_K = sums.activation_K / sums.tokens
    curvature_DD = sums.gauss_newton_DD() / sums.tokens
    curvature_DD = curvature_DD + DAMPING * curvature_DD.diagonal().mean() * torch.eye(len(curvature_DD))
    return 1 / (activation_K + DAMPING * activation_K.mean()), torch.linalg.inv(curvature_DD)


def all_scores(index, records, query):
    """Scores of one of the tokens by the index, for every training token."""
    hits = index.score(question(index, records, slice(query, query + 1)))
    out = np.zeros(index.tokens)
    out[hits.tokens] = hits.influence
    return out


@pytest.mark.parametrize("active", [1, 3])
def test_uncompressed_scores_are_the_brute_force(built, model, store, active):
    index = built(dictionary="fitted", prototypes=24, active=active, fit_steps=5)
    records, sums = statistics(model, store, dictionary_of(index))
    inverse_K, inverse_DD = separable_inverse(sums)
    stored_NKD = dense_gradients(records, 24)
    for query in (0, 333, 1919):
        expected_N = torch.einsum("kd,k,de,nke->n", stored_NKD[query], inverse_K, inverse_DD, stored_NKD) / index.tokens
        got_N = torch.from_numpy(all_scores(index, records, query))
        assert (got_N - expected_N).abs().max() < 1e-4 * expected_N.abs().max()


def sample_of(model, store):
    """The hidden states that the builder samples."""
    chosen = np.linspace(0, len(store) - 1, 32).astype(int).tolist()
    items = store.__getitems__(chosen)
    ids = torch.stack([item["input_ids"] for item in items])
    with torch.no_grad():
        return model.hidden_states(ids.clone()).flatten(0, 1)


@pytest.mark.parametrize(("precision", "minimum"), [("fp32", 0.9999), ("fp16", 0.999), ("int8", 0.98)])
def test_compression_keeps_the_ranking_of_tokens_that_matter(built, model, data, precision, minimum):
    """Over the top 1 % by brute force, of 19,200 tokens, for ten queries."""
    store = FirstBlocks(data.train, 600)
    index = built(over=store, precision=precision, dictionary="fitted", prototypes=64, active=2, fit_steps=20)
    records, sums = statistics(model, store, dictionary_of(index))
    inverse_K, inverse_DD = separable_inverse(sums)
    stored_NKD = dense_gradients(records, 64)
    for query in range(100, 19200, 1910):
        weighed_KD = inverse_K[:, None] * (stored_NKD[query] @ inverse_DD)
        expected_N = (stored_NKD * weighed_KD).sum((1, 2)).numpy()
        top = np.argsort(-np.abs(expected_N))[: len(expected_N) // 100]
        got_N = all_scores(index, records, query)
        assert spearmanr(expected_N[top], got_N[top]).statistic >= minimum


def test_a_summed_query_is_the_sum_of_its_tokens(built, model, store):
    index = built()
    records, _ = statistics(model, store, dictionary_of(index))
    together = np.zeros(index.tokens)
    hits = index.score(question(index, records, slice(40, 52)))
    together[hits.tokens] = hits.influence
    alone = sum(all_scores(index, records, query) for query in range(40, 52))
    assert np.abs(together - alone).max() < 1e-5 * np.abs(alone).max()


def test_a_query_about_nothing_has_no_hits(built, model, store):
    index = built(dictionary="model")
    records, _ = statistics(model, store, dictionary_of(index))
    hits = index.score(question(index, records, slice(0, 0)))
    assert len(hits.tokens) == 0 and len(hits.strongest(3).tokens) == 0


def test_the_second_stage_is_the_heads_kfac_on_what_the_first_proposes(built, model, store):
    index = built(hidden_rank=16)
    records, sums = statistics(model, store, dictionary_of(index))
    z_ND, _ = hidden_and_targets(model, store)
    delta_ND = records.delta_ND
    sample_ND = sample_of(model, store)
    # Layer normalisation leaves hidden states one direction short.
    inverse_DD = torch.linalg.pinv(sample_ND.T @ sample_ND / len(sample_ND), rtol=1e-6)
    _, curvature_DD = separable_inverse(sums)
    expected_N = (z_ND @ inverse_DD @ z_ND[77]) * (delta_ND @ curvature_DD @ delta_ND[77]) / index.tokens
    first = index.score(question(index, records, slice(77, 78)))
    second = index.rescored(first, z_ND[77].float().numpy(), delta_ND[77].float().numpy())
    assert np.array_equal(first.tokens, second.tokens)
    error = np.abs(second.influence - expected_N.numpy()[second.tokens]).max()
    assert error < 0.02 * expected_N.abs().max()  # hidden states are kept in int8


def test_contributions_add_up_to_the_influence(built, model, store):
    index = built()
    records, _ = statistics(model.float(), store, dictionary_of(index))
    query = question(index, records, slice(300, 303))
    hits = index.score(query).strongest(20)
    contributions = index.contributions_by_prototype(query, hits.tokens)
    for influence, of_token in zip(hits.influence, contributions, strict=True):
        assert sum(value for _, value in of_token) == pytest.approx(influence, rel=1e-4)
    model.float()


@pytest.mark.parametrize("change", [{"activation_path": True}, {"objective": "training"}, {"curvature": "eigenvalues"}])
def test_an_index_with_a_retired_setting_is_refused_in_one_line(built, change):
    index = built()
    path = index.folder / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps(manifest | {"settings": manifest["settings"] | change}))
    with pytest.raises(UserError, match=f"index.{next(iter(change))} .* retired setting: remove it and run") as caught:
        open_index(index.folder)
    assert len(caught.value.problems) == 1
    settings = {name: value for name, value in manifest["settings"].items() if name not in change}
    path.write_text(json.dumps(manifest | {"settings": settings}))
    assert open_index(index.folder).tokens == index.tokens


def test_postings_and_usage_list_every_active_token(built, model, store):
    index = built()
    records, _ = statistics(model, store, dictionary_of(index))
    usage_K = index.usage_K()
    active_Nk = records.activations_Nk > 0
    assert usage_K.sum() == active_Nk.sum()
    for prototype in range(24):
        tokens, activations = index.postings(prototype)
        token, slot = ((records.prototypes_Nk == prototype) & active_Nk).nonzero(as_tuple=True)
        assert np.array_equal(tokens, token.numpy()) and len(tokens) == usage_K[prototype]
        assert np.allclose(activations, records.activations_Nk[token, slot], atol=1e-6)


def test_strongest_hits():
    hits = Hits(np.arange(6), np.array([0.0, 3, -2, 5, -4, 1], dtype=np.float32))
    assert hits.strongest(2).tokens.tolist() == [3, 1]
    assert hits.strongest(2, opposing=True).tokens.tolist() == [4, 2]
    assert len(hits.strongest(100).tokens) == 6
    assert len(Hits(np.arange(2), np.array([1.0, 2.0])).strongest(5, opposing=True).tokens) == 0
    assert len(Hits(np.empty(0, np.int64), np.empty(0, np.float32)).strongest(5).tokens) == 0
    total = Hits.total([hits, hits])
    assert total.tokens.tolist() == list(range(6)) and total.influence.tolist() == [0, 6, -4, 10, -8, 2]


def test_a_query_process_needs_no_torch(built):
    import subprocess
    import sys

    folder = built().folder
    script = (
        "import sys\nfrom pathlib import Path\nimport numpy as np\n"
        "from prism_lightning.attribution.index.opening import open_index\n"
        "index = open_index(Path(sys.argv[1]))\n"
        "query = index.query(np.array([[1, 2, 3]]), np.ones((1, 3)), np.ones((1, 16), dtype='f4'))\n"
        "print(len(index.score(query).strongest(10).tokens))\nassert 'torch' not in sys.modules"
    )
    result = subprocess.run([sys.executable, "-c", script, folder], capture_output=True, text=True)
    assert result.returncode == 0 and int(result.stdout) == 10, result.stderr


def test_an_index_opens_only_when_it_is_whole(tmp_path):
    with pytest.raises(UserError, match="no finished index"):
        open_index(tmp_path)
    (tmp_path / "manifest.json").write_text('{"format": 1, "settings": {}}')
    with pytest.raises(UserError, match="another version"):
        open_index(tmp_path)
