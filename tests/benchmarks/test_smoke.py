"""The whole benchmark at sizes that say nothing: every stage runs, goes on after an interruption, and reports."""

import json
import re
import shutil

import pytest
import torch
from support.runs import ROOT

from benchmarks.attribution.__main__ import main
from benchmarks.attribution.config import load_settings
from benchmarks.attribution.retraining import planned

CONFIG = str(ROOT / "benchmarks/attribution/smoke.yaml")
pytest.importorskip("kronfluence")
pytest.importorskip("trak")


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """The folder of a finished run, and its settings."""
    folder = tmp_path_factory.mktemp("smoke")
    settings = [f"out={folder}/run", f"results={folder}/results"]
    torch.set_num_threads(1)
    assert main(["--config", CONFIG, *settings, "cost.threads=1"]) == 0
    return folder, settings


def report_of(folder, suffix):
    (path,) = (folder / "results").glob(f"*_smoke{suffix}")
    return path


def test_report_has_every_table_and_plot(ran):
    folder, _ = ran
    text = report_of(folder, ".md").read_text()
    for heading in (
        "96 sequences, PRISM",
        "80 sequences, PRISM",
        "dense twin",
        "untrained",
        "Overlap",
        "Planted facts",
    ):
        assert heading in text
    for heading in ("Removal", "Tail-patch", "Chosen on the tuning queries", "q = 4", "Times as long as", "Growth"):
        assert heading in text
    plots = re.findall(r"\((.+?\.png)\)", text)
    assert len(plots) == 3
    for name in plots:
        assert (folder / "results" / name).stat().st_size > 10_000
        assert (folder / "results" / name).with_suffix(".svg").is_file()


def test_json_says_where_it_came_from_and_holds_the_numbers(ran):
    folder, _ = ran
    found = json.loads(report_of(folder, ".json").read_text())
    assert {"commit", "packages", "peers"} <= found["environment"].keys()
    assert found["settings"]["corpus"]["tokens"] == 64
    methods = load_settings(ROOT / "benchmarks/attribution/smoke.yaml", []).methods
    rows = found["results"]["quality"]["tables"]["96"]
    assert {row["method"] for row in rows} == set(methods)
    for row in rows:
        assert -1 <= row["sequence"]["low"] <= row["sequence"]["value"] <= row["sequence"]["high"] <= 1
    for row in found["results"]["cost"]:
        assert all(times and min(times) > 0 for times in row["answers"].values())
        assert row["bytes_per_token"] > 0 or row["method"] == "random"


def test_every_planned_model_was_trained_once(ran):
    folder, settings = ran
    run = load_settings(ROOT / "benchmarks/attribution/smoke.yaml", settings)
    jobs = planned(run)
    assert len({job.path for job in jobs}) == len(jobs)
    assert all((folder / "run" / "models" / f"{job.path}.safetensors").is_file() for job in jobs)


def test_a_second_run_makes_only_what_is_missing(ran, capsys):
    folder, settings = ran
    kept = folder / "run/models/0.1/96/half-0-001.safetensors"
    lost = folder / "run/models/0.1/96/half-0-000.safetensors"
    before, changed = lost.read_bytes(), kept.stat().st_mtime_ns
    lost.unlink()
    (shutil.rmtree(folder / "results"))
    assert main(["--config", CONFIG, *settings, "cost.threads=1"]) == 0
    assert lost.read_bytes() == before and kept.stat().st_mtime_ns == changed
    assert report_of(folder, ".md").is_file()


def test_mistakes_are_answered_in_one_line(ran, capsys):
    folder, settings = ran
    for arguments, said in {
        ("--config", "nowhere.yaml"): "no such file",
        ("--config", CONFIG, *settings, "corpus.tokens=many"): "tokens",
        ("--config", CONFIG, *settings, "corpus.token=8"): "token",
        ("--config", CONFIG, *settings, "corpus.tokens=32"): "other settings",
        ("--config", CONFIG, *settings, "corpus.sizes=[96,80]"): "ascending",
        ("--config", CONFIG, *settings, "cost.counts=[1,64]"): "up to corpus.queries, 26",
        ("--config", CONFIG, *settings, "cost.methods=[trak]"): "no method 'trak'",
        ("--config", CONFIG, *settings, "quality.contenders=[BM25]"): "'prototypes', which others are compared with",
        ("--config", CONFIG, *settings, "quality.removal_size=90"): "quality.removal_size is 90",
        ("--config", CONFIG, *settings, "retraining.checkpoints=3", "cost.sizes=[80]"): "TRAK has all its checkpoints",
        ("--config", CONFIG, "out=" + str(folder / "other"), "corpus.sizes=[80,96,9000]"): "too few sequences",
        ("--config", CONFIG, "out=" + str(folder / "other"), "corpus.path=nowhere.jsonl"): "no such file",
    }.items():
        assert main(list(arguments)) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and said in error and error.count("\n") == 1 and "Traceback" not in error
