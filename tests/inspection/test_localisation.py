"""The curvature report on cases whose answer is known, and as a verb."""

import json

import numpy as np
import pytest
import scipy.sparse
import torch
from support.figures import kept_figures
from support.runs import copied_run

from prism_lightning.inspection.localisation import block_share, measure_localisation


def measured(activations):
    matrix = scipy.sparse.csr_array(np.asarray(activations, dtype=float))
    count = matrix.shape[0]
    return measure_localisation("case", matrix, 1, np.arange(count), np.ones((count, count)), torch.eye(3), {})


def test_one_prototype_per_token_is_wholly_local():
    row = measured([[1, 0, 0], [0, 0.5, 0], [0, 0, 2], [1, 0, 0]])
    assert row.gauss_newton_share == row.activation_share == 1
    assert row.coactive_blocks == 1
    # List lengths 2, 1, 1 of 4 tokens: (2 * 2 + 1 + 1) / 16 of the tokens are read on average.
    assert row.read_share == pytest.approx(6 / 16)


def test_prototypes_always_active_together_are_half_diagonal():
    row = measured([[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]])
    assert row.gauss_newton_share == pytest.approx(0.5) and row.activation_share == pytest.approx(0.5)
    assert row.coactive_blocks == pytest.approx(2)


def test_a_token_is_not_compared_with_itself_unless_asked():
    matrix = scipy.sparse.csr_array(np.array([[1.0, 1, 0], [0, 1, 0]]))
    products = np.array([[2.0, 3], [3, 5]])
    assert block_share(matrix, products) == pytest.approx(1)  # they share one prototype
    # (2 * 2, and 2 * 4 in all) + 2 * 3 + 5
    assert block_share(matrix, products, independent=False) == pytest.approx((4 + 6 + 5) / (8 + 6 + 5))


def test_the_verb_prints_writes_and_plots(cli, finished_run, tmp_path, monkeypatch):
    figures = kept_figures(monkeypatch)
    run, _ = copied_run(finished_run, tmp_path / "run")
    asked = ["--fitted", "100,2", "--tokens", "4096", "--sample", "300", "--out", tmp_path / "report"]
    out = cli("curvature", "--ckpt_path", run, *asked, check=0).stdout
    names = [
        "dense head",
        "own, K 64 k 4",
        "random, as own, K 64 k 4",
        "fitted, K 100 k 2",
        "random, as fitted, K 100 k 2",
    ]
    for name in names:
        assert name in out
    rows = json.loads((tmp_path / "report/curvature.json").read_text())["rows"]
    assert [row["name"] for row in rows] == names
    assert all(0 < row["gauss_newton_share"] <= 1 and row["coactive_blocks"] >= 1 for row in rows)
    for row in rows:
        assert row["unexplained_variance"] == row["faithfulness"].get("unexplained_variance")
        assert len(row["faithfulness"]) == (5 if row["name"].startswith(("own", "fitted")) else 0)
    own, results = rows[1]["faithfulness"], json.loads((run / "results.jsonl").read_text().splitlines()[-1])
    for name in set(own) - {"prediction_recovered"}:  # which divides by a difference near 0 in this model
        assert own[name] == pytest.approx(results[name], abs=0.05), name  # on training, not validation text
    (axes,) = figures["curvature.png"].axes
    assert [label.get_text() for label in axes.get_yticklabels()] == names
    drawn = [bar.get_width() for bar in axes.patches if bar.get_height() and bar.get_width()]
    assert drawn == [row[share] for row in rows for share in ("gauss_newton_share", "activation_share")]
    for wrong, words in ((["--fitted", "4096"], "give K,k"), (["--fitted", "9,10"], "give K,k with k <= K")):
        result = cli("curvature", "--ckpt_path", run, "--tokens", "4096", "--sample", "300", *wrong)
        assert result.returncode == 2 and words in result.stderr and "Traceback" not in result.stderr
    (run / "recipe.yaml").unlink()
    assert "has no recipe.yaml" in cli("curvature", "--ckpt_path", run).stderr
