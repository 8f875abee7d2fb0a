"""The benchmark of dictionaries on a small retrofit."""

import json
import sys
from functools import partial

import pytest

from benchmarks.choices import retrofits
from prism_lightning.retrofit.settings import RetrofitSettings


def test_every_cell_is_measured_and_kept(retrofitted, tmp_path, monkeypatch):
    run, work = retrofitted[0], tmp_path / "work"
    monkeypatch.setattr(retrofits, "PURSUIT", [("pursuit", 64, 4)])
    monkeypatch.setattr(retrofits, "COSINE", [("cosine", 64, 4)])
    monkeypatch.setattr(retrofits, "SIZES", [("pursuit", 96, 4)])
    monkeypatch.setattr(retrofits, "MORE_TOKENS", [("pursuit", 64, 4)])
    monkeypatch.setattr(retrofits, "RetrofitSettings", partial(RetrofitSettings, fit_steps=3))
    sizes = ["--tokens", "2048", "4096", "--validation_tokens", "2048"]
    command = ["retrofits", "--ckpt_path", str(run), "--work", str(work), *sizes, "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", command)
    retrofits.main()
    rows = json.loads((tmp_path / "out" / "retrofits.json").read_text())["results"]
    assert [(row["encoder"], row["prototypes"], row["fit_tokens"]) for row in rows] == [
        ("pursuit", 64, 2048),
        ("cosine", 64, 2048),
        ("pursuit", 96, 2048),
        ("pursuit", 64, 4096),
    ]
    assert rows[0]["unexplained_variance"] != rows[3]["unexplained_variance"]
    results = json.loads((run / "results.jsonl").read_text().splitlines()[-1])
    assert rows[3]["unexplained_variance"] == pytest.approx(results["unexplained_variance"], abs=0.2)
    monkeypatch.setattr(retrofits, "fit_prototypes", None)  # a second call reads what is finished
    retrofits.main()
    assert json.loads((tmp_path / "out" / "retrofits.json").read_text())["results"] == rows
