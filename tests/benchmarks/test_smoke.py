"""The whole benchmark at sizes that say nothing: every stage runs, goes on after an interruption, and reports."""

import gc
import json
import re
import shutil
import statistics
from functools import partial

import pytest
import torch
from safetensors.torch import load_file
from scipy.stats import spearmanr
from support.figures import kept_figures
from support.runs import ROOT

from benchmarks.attribution import cost, quality
from benchmarks.attribution.__main__ import main
from benchmarks.attribution.config import load_settings
from benchmarks.attribution.retraining import planned
from benchmarks.attribution.scoring import Case, truth

CONFIG = str(ROOT / "benchmarks/attribution/smoke.yaml")
METHODS = set(load_settings(ROOT / "benchmarks/attribution/smoke.yaml", []).methods)
pytest.importorskip("kronfluence")
pytest.importorskip("trak")


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """The folder of a finished run, its settings, and its figures by name."""
    folder = tmp_path_factory.mktemp("smoke")
    settings = [f"out={folder}/run", f"results={folder}/results"]
    torch.set_num_threads(1)
    fresh_peak = cost.fresh_peak

    def fresh_peak_of_a_small_heap():
        """Before each of a hundred builds and queries garbage is collected: 0.4 s, where all imports are walked."""
        gc.freeze()
        return fresh_peak()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cost, "fresh_peak", fresh_peak_of_a_small_heap)
        figures = kept_figures(patch)
        patch.setattr(cost, "fresh_peak", fresh_peak_of_a_small_heap)
        patch.setattr(cost, "TURN_SECONDS", 0.05)
        patch.setattr(quality, "bootstrap", partial(quality.bootstrap, repeats=50))
        assert main(["--config", CONFIG, *settings, "cost.threads=1"]) == 0
        yield folder, settings, {name.rpartition("_")[2]: figure for name, figure in figures.items()}


def report_of(folder, suffix):
    (path,) = (folder / "results").glob(f"*_smoke{suffix}")
    return path


def results_of(folder):
    """The results in the report's JSON file."""
    return json.loads(report_of(folder, ".json").read_text())["results"]


def heights(axes):
    """The data of the lines with markers, as (x, y) lists."""
    return [(list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines if line.get_marker() == "o"]


def test_report_has_every_table_and_plot(ran):
    folder, _, figures = ran
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
    for heading in ("Removal", "Tail-patch", "Chosen on the tuning queries", "q = 4", "Time relative to", "Growth"):
        assert heading in text
    plots = re.findall(r"\((.+?\.png)\)", text)
    assert len(plots) == 3
    assert {name.rpartition("_")[2] for name in plots} == {"locality.png", "pareto.png", "queries.png"} <= set(figures)
    for name in plots:
        assert "<svg" in (folder / "results" / name).with_suffix(".svg").read_text()


def test_plots_show_the_numbers_of_the_tables(ran):
    folder, _, figures = ran
    results = results_of(folder)
    rows = results["quality"]["tables"]["96"]
    for axes in figures["pareto.png"].axes:  # against latency, against bytes
        drawn = [y for _, ys in heights(axes) for y in ys]
        measured = {row["method"] for row in results["cost"]} if "ms" in axes.get_xlabel() else METHODS
        assert sorted(drawn) == sorted(row["sequence"]["value"] for row in rows if row["method"] in measured)
        assert {name.split(",")[0] for name in measured} <= {text.get_text() for text in axes.texts}
    for kind, axes in zip(("token", "sequence"), figures["queries.png"].axes, strict=True):
        times = [
            ([1, 4], [statistics.median(row["answers"][f"{kind} {count}"]) for count in (1, 4)])
            for row in results["cost"]
            if row["size"] == max(row["size"] for row in results["cost"])
        ]
        assert sorted(heights(axes)) == sorted(times)
    titles = [axes.get_title() for axes in figures["locality.png"].axes]
    assert titles == ["80 sequences", "96 sequences"] * 2


def test_json_says_where_it_came_from_and_holds_the_numbers(ran):
    folder, _, _ = ran
    found = json.loads(report_of(folder, ".json").read_text())
    assert {"commit", "packages", "peers"} <= found["environment"].keys()
    assert found["settings"]["corpus"]["tokens"] == 64
    assert {row["method"] for row in found["results"]["quality"]["tables"]["96"]} == METHODS
    for row in found["results"]["cost"]:
        assert all(times and min(times) > 0 for times in row["answers"].values())
        assert row["bytes_per_token"] > 0 or row["method"] == "random"


@pytest.mark.parametrize("asked", ["sequence", "token"])
def test_lds_is_scipys_correlation_of_retrained_losses_with_summed_scores(ran, asked):
    """From the scores and losses on disk, decoder by decoder and query by query."""
    folder, settings, _ = ran
    run = load_settings(ROOT / "benchmarks/attribution/smoke.yaml", settings)
    for size in (80, 96):
        known = truth(run, 0.1, size)
        losses_QM = known[asked].mean(0)
        for row in results_of(folder)["quality"]["tables"][str(size)]:
            paths = [Case(0.1, size, seed, row["method"], row["settings"]).path(run) for seed in range(2)]
            correlations = []
            for scores_QS in (load_file(path)[asked].double() for path in paths):
                for scores_S, losses_M in zip(scores_QS, losses_QM, strict=True):
                    summed_M = [scores_S[included_S].sum().item() for included_S in known["included"]]
                    # Influence lowers the loss. No hit in any half: nothing is ranked.
                    known_rank = len(set(summed_M)) > 1
                    correlations.append(-spearmanr(summed_M, losses_M).statistic if known_rank else 0.0)
            interval = row[asked]
            assert interval["value"] == pytest.approx(sum(correlations) / len(correlations), abs=1e-6), row["method"]
            assert interval["low"] <= interval["value"] <= interval["high"]


def test_every_planned_model_was_trained_once(ran):
    folder, settings, _ = ran
    run = load_settings(ROOT / "benchmarks/attribution/smoke.yaml", settings)
    jobs = planned(run)
    assert len({job.path for job in jobs}) == len(jobs)
    assert all((folder / "run" / "models" / f"{job.path}.safetensors").is_file() for job in jobs)


def test_a_second_run_makes_only_what_is_missing(ran, capsys):
    folder, settings, _ = ran
    kept = folder / "run/models/0.1/96/half-0-001.safetensors"
    lost = folder / "run/models/0.1/96/half-0-000.safetensors"
    before, changed = lost.read_bytes(), kept.stat().st_mtime_ns
    lost.unlink()
    (shutil.rmtree(folder / "results"))
    assert main(["--config", CONFIG, *settings, "cost.threads=1"]) == 0
    assert lost.read_bytes() == before and kept.stat().st_mtime_ns == changed
    assert report_of(folder, ".md").is_file()


def test_mistakes_are_answered_in_one_line(ran, capsys):
    folder, settings, _ = ran
    for arguments, said in {
        ("--config", "nowhere.yaml"): "no such file",
        ("--config", CONFIG, *settings, "corpus.tokens=many"): "tokens",
        ("--config", CONFIG, *settings, "corpus.token=8"): "token",
        ("--config", CONFIG, *settings, "corpus.tokens=32"): "other settings",
        ("--config", CONFIG, *settings, "corpus.sizes=[96,80]"): "ascending",
        ("--config", CONFIG, *settings, "cost.counts=[1,64]"): "up to corpus.queries, 26",
        ("--config", CONFIG, *settings, "cost.methods=[trak]"): "no method 'trak'",
        ("--config", CONFIG, *settings, "quality.contenders=[BM25]"): "'prototypes', with which others are compared",
        ("--config", CONFIG, *settings, "quality.removal_size=90"): "quality.removal_size is 90",
        ("--config", CONFIG, *settings, "retraining.checkpoints=3", "cost.sizes=[80]"): "TRAK has all its checkpoints",
        ("--config", CONFIG, "out=" + str(folder / "other"), "corpus.sizes=[80,96,9000]"): "too few sequences",
        ("--config", CONFIG, "out=" + str(folder / "other"), "corpus.path=nowhere.jsonl"): "no such file",
    }.items():
        assert main(list(arguments)) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and said in error and error.count("\n") == 1 and "Traceback" not in error
