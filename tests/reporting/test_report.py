"""Reports of runs with known numbers: tables, differences, missing results, and text that must be escaped."""

import json
import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest
import yaml
from support.report_runs import make_run
from support.runs import ROOT

from prism_lightning.evaluation.suites import SuiteTask
from prism_lightning.reporting.attribution_tables import format_speed_ups
from prism_lightning.reporting.runs import find_runs, twin_pairs
from prism_lightning.reporting.tables import accuracy_table, loss_table, paired_difference, run_tables
from prism_lightning.sweeps.planning import module_without_weights

SUITES = {"evals/x.yaml": {"guess": SuiteTask("acc", 0.25), "lm": SuiteTask("bits_per_byte")}}


@pytest.fixture
def ladder(tmp_path):
    """Two sizes, dense and PRISM, two seeds; the second size was not evaluated."""
    generator = np.random.default_rng(0)
    for variant, base in (("DenseLM", 3.9), ("PrismLM", 4.0)):
        for seed in (0, 1):
            answers = generator.integers(0, 2, 40).tolist()
            make_run(tmp_path, f"small-{variant}-{seed}", variant, seed, loss=base + 0.1 * seed, answers=answers)
            make_run(tmp_path, f"wide-{variant}-{seed}", variant, seed, width=64, loss=base - 0.5)
    return tmp_path


def test_twins_have_one_size_and_are_paired_by_seed(ladder):
    runs, left_out = find_runs([ladder])
    assert len(runs) == 8 and not left_out
    pairs = twin_pairs(runs)
    assert [len(seeds) for seeds in pairs.values()] == [2, 2]
    for seeds in pairs.values():
        for prism, dense in seeds:
            assert (prism.variant, dense.variant) == ("PRISM", "dense")
            assert prism.seed == dense.seed and prism.parameters == dense.parameters
    assert runs[0].tokens == 10 * 4 * 32


def test_runs_of_earlier_versions_are_read(tmp_path):
    """Their recorded recipes name settings of the index that are retired."""
    run = make_run(tmp_path, "earlier", "PrismLM")
    config = yaml.safe_load((run / "recipe.yaml").read_text())
    config["index"] = {"activation_path": True, "objective": "cross_entropy", "curvature": "separable"}
    (run / "recipe.yaml").write_text(yaml.safe_dump(config))
    runs, left_out = find_runs([tmp_path])
    assert [found.path for found in runs] == [run] and not left_out


def test_ablations_are_not_seeds(ladder):
    """Runs with another K have rows of their own; copies and smaller evaluations are left out."""
    run = make_run(ladder, "more", "PrismLM", 0, loss=3.0)
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    recipe["model"]["init_args"]["num_prototypes"] = 128
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    make_run(ladder, "small-PrismLM-1-copy", "PrismLM", 1, loss=9.0)
    make_run(ladder, "other", "PrismLM", 5, loss=4.0, answers=[1, 1])
    runs, left_out = find_runs([ladder, ladder / "more"])
    assert {run.label for run in runs if run.parameters == runs[0].parameters} == {
        "dense", "PRISM, num_prototypes 64", "PRISM, num_prototypes 128",
    }  # fmt: skip
    assert len([line for line in left_out if "copy repeats" in line]) == 1
    assert any("other: guess was evaluated on 2 documents, elsewhere on 40" in line for line in left_out)
    pairs = twin_pairs(runs)
    assert sorted(len(seeds) for seeds in pairs.values()) == [1, 2, 2]


def rows_with_one_name(runs, columns=4):
    """Return the tables and names of rows that name the same model."""
    repeated = []
    for table in run_tables(runs, SUITES):
        names = [tuple(row[:columns]) for row in table.rows]
        repeated += [(table.title, name) for name in set(names) if names.count(name) > 1]
    return repeated


def test_rows_name_the_data_where_runs_differ_in_it(tmp_path):
    for name, data, path in (("one", "aaaaaaaa1", None), ("two", "bbbbbbbb2", "stories/*.txt")):
        for seed in (0, 1):
            make_run(tmp_path, f"{name}{seed}", "PrismLM", seed, data=data, path=path)
    runs, left_out = find_runs([tmp_path])
    assert not left_out and not rows_with_one_name(runs)
    labels = {run.label for run in runs}
    assert labels == {"PRISM, data standard library", "PRISM, data stories/*.txt"}
    assert [row[4] for row in loss_table(runs, SUITES).rows] == ["2", "2"]  # seeds of each
    # The same files, read another way: the fingerprint tells them apart.
    for run in (tmp_path / "one0", tmp_path / "one1"):
        recipe = yaml.safe_load((run / "recipe.yaml").read_text())
        recipe["data"]["path"] = ["stories/*.txt"]
        (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    labels = {run.label for run in find_runs([tmp_path])[0]}
    assert labels == {"PRISM, data stories/*.txt (aaaaaaaa)", "PRISM, data stories/*.txt (bbbbbbbb)"}


def test_rows_name_the_settings_or_the_run_where_nothing_else_tells_them_apart(tmp_path):
    make_run(tmp_path, "slow", "DenseLM", learning_rate=1e-4)
    make_run(tmp_path, "fast", "DenseLM", learning_rate=1e-3)
    make_run(tmp_path, "wide", "DenseLM", width=64)
    runs, _ = find_runs([tmp_path])
    assert not rows_with_one_name(runs)
    labels = {run.path.name: run.label for run in runs}
    assert labels == {"slow": "dense, learning_rate 0.0001", "fast": "dense, learning_rate 0.001", "wide": "dense"}
    # Four settings differ and a label names three, which do not tell these two apart: their names do.
    alike = {"final_learning_rate_share": 0.5, "gradient_checkpointing": True, "learning_rate": 1e-4}
    make_run(tmp_path / "many", "a", "DenseLM", warmup_steps=3, **alike)
    make_run(tmp_path / "many", "b", "DenseLM", warmup_steps=4, **alike)
    make_run(tmp_path / "many", "c", "DenseLM")
    runs, _ = find_runs([tmp_path / "many"])
    assert {run.label for run in runs} == {"dense, a", "dense, b", "dense, c"} and not rows_with_one_name(runs)


def test_both_counts_of_parameters_are_shown(ladder):
    runs, _ = find_runs([ladder])
    for run in runs:
        recipe = yaml.safe_load((run.path / "recipe.yaml").read_text())
        module = module_without_weights(recipe, "recipe")
        assert run.all_parameters == sum(parameter.numel() for parameter in module.parameters())
        prototypes = 64 * module.model.config.hidden_size if run.variant == "PRISM" else 0
        assert run.all_parameters - run.parameters == prototypes
    for table in run_tables(runs, SUITES):
        assert table.columns[:4] == ["parameters", "with prototypes", "tokens", "model"]
        assert all(len(row) == len(table.columns) for row in table.rows)
    for row in loss_table(runs, SUITES).rows:
        assert (row[0] == row[1]) == (row[3] == "dense")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("results.jsonl", "[]"),
        ("results.jsonl", '{"step": "10", "loss": 4.0}'),
        ("results.jsonl", '{"step": 10, "loss": NaN}'),
        ("results.jsonl", '{"step": 10, "loss": 4.0, "perplexity": []}'),
        ("results.jsonl", "[" * 100_000),
        ("results.jsonl", ""),
        ("environment.json", "[]"),
        ("environment.json", '{"data_fingerprint": 3}'),
        ("recipe.yaml", "[]"),
        ("recipe.yaml", "{data: 3}"),
        ("recipe.yaml", "{seed_everything: 0, data: {batch_size: x, block_size: 32}, model: {init_args: {}}}"),
        ("recipe.yaml", "{data: {batch_size: 4, block_size: 32}, model: {init_args: {}}}"),
    ],
)
def test_a_damaged_run_is_left_out_and_named(tmp_path, name, content):
    make_run(tmp_path, "whole", "DenseLM")
    make_run(tmp_path, "harmed", "DenseLM", seed=1).joinpath(name).write_text(content)
    runs, (line,) = find_runs([tmp_path])
    assert [run.path.name for run in runs] == ["whole"]
    assert f"harmed/{name} is damaged (" in line and len(line) < 400 + len(str(tmp_path)) and "\n" not in line


def test_cells_are_means_over_seeds(ladder):
    runs, _ = find_runs([ladder])
    table = loss_table(runs, SUITES)
    row = next(row for row in table.rows if row[3] == "PRISM")
    assert row[5] == "4.0500 ± 0.0707"  # of 4.0 and 4.1
    gaps = [4.0 / 3.9 - 1, 4.1 / 4.0 - 1]
    assert row[8] == f"{100 * np.mean(gaps):+.2f} % ± {100 * np.std(gaps, ddof=1):.2f}"


def test_missing_results_are_empty_cells_with_a_command(ladder):
    runs, _ = find_runs([ladder])
    table = accuracy_table(runs, SUITES)
    wide = [row for row in table.rows if row[0] == runs[-1].size]
    assert len(wide) == 2 and all(row[4] == "" for row in wide)
    paths = " ".join(str(run.path) for run in runs if "wide" in run.path.name)
    evaluate = 'python -m prism_lightning evaluate --ckpt_path "$run" --suite evals/x.yaml'
    assert paths.count("wide") == 4 and table.missing == [f"for run in {paths}; do {evaluate}; done"]
    alone = accuracy_table([run for run in runs if run.path.name in ("small-DenseLM-0", "wide-PrismLM-1")], SUITES)
    assert alone.missing == [evaluate.replace('"$run"', f"{ladder}/wide-PrismLM-1")]


def test_differences_average_an_items_seeds_first(ladder):
    runs, _ = find_runs([ladder])
    pairs = next(iter(twin_pairs(runs).values()))

    def answers(run):
        lines = (run.path / "evaluation/guess.samples.jsonl").read_text().splitlines()
        return np.array([json.loads(line)["acc"] for line in lines])

    by_item = np.mean([answers(prism) - answers(dense) for prism, dense in pairs], axis=0)
    result = paired_difference(pairs, "guess", "acc")
    assert result.value == pytest.approx(by_item.mean())
    assert result.error == pytest.approx(by_item.std(ddof=1) / np.sqrt(40))


def test_the_verb_writes_markdown_and_one_page(cli, ladder, tmp_path):
    make_run(ladder, "half", "PrismLM").joinpath("results.jsonl").unlink()
    suite = tmp_path / "x.yaml"
    suite.write_text("tasks:\n  guess: {metric: acc, chance: 0.25, kind: continuation}\n")
    result = cli("report", "--runs", ladder, "--out", tmp_path / "out", "--suites", suite, check=0)
    assert "half is not finished" in result.stderr
    text = (tmp_path / "out/report.md").read_text()
    for title in (
        "Comparison with the paper",
        "Accuracy, zero-shot",
        "Accuracy difference, PRISM minus dense",
        "Language modeling",
        "Training throughput",
    ):
        assert f"## {title}" in text
    assert "90.0 %" in text and "No law for dense: number of sizes 2, of token counts 1" in text
    page = (tmp_path / "out/report.html").read_text()
    assert "<script" not in page and "c0ffee&lt;b&gt;" in page and "c0ffee<b>" not in page
    assert not re.search(r"(src|href)=.http", page)
    for figure in (tmp_path / "out").glob("*.svg"):
        ET.fromstring(figure.read_text())
        assert figure.read_text() in page


@pytest.mark.parametrize("case", ["missing", "empty", "damaged"])
def test_bad_folders_are_named(cli, tmp_path, case):
    folder = tmp_path / "runs"
    if case == "empty":
        folder.mkdir()
    if case == "damaged":
        make_run(folder, "one", "DenseLM").joinpath("recipe.yaml").write_text("model: [")
    result = cli("report", "--runs", folder, "--out", tmp_path / "out", check=2)
    assert "error: " in result.stderr and "runs" in result.stderr and "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_file_that_is_no_benchmark_is_named(cli, ladder, tmp_path):
    arguments = ["report", "--runs", ladder, "--out", tmp_path / "out", "--benchmarks", tmp_path / "b.json"]
    head = {
        "settings": {"name": "x", "retraining": {"variant_size": 20}},
        "environment": {"commit": "c"},
        "processor": "",
    }
    for content in (
        {},
        [],
        3,
        head | {"results": {"cost": []}},
        head | {"results": {"cost": [{"size": "a"}]}},
        head | {"results": {"quality": {"tables": []}}},
        head | {"results": {"quality": {"tables": {"20": [{"method": "x"}]}}}},
        head | {"results": 3},
    ):
        (tmp_path / "b.json").write_text(json.dumps(content))
        assert "b.json is no result" in cli(*arguments, check=2).stderr
    (tmp_path / "b.json").write_text("[" * 100_000)
    assert "b.json is no result" in cli(*arguments, check=2).stderr
    (tmp_path / "b.json").unlink()
    assert "b.json cannot be read: No such file" in cli(*arguments, check=2).stderr


def test_speed_ups_of_every_benchmark_file_are_reported():
    def content(prototypes, ekfac):
        answers = {"prototypes": {"token 1": prototypes}, "EK-FAC": {"token 1": ekfac, "token 64": [9.0]}}
        rows = [{"method": name, "size": 1280, "answers": times} for name, times in answers.items()]
        smaller = [{"method": row["method"], "size": 20, "answers": {"token 1": [1.0]}} for row in rows]
        return {"results": {"cost": smaller + rows}}

    several = [content([0.01, 0.02, 0.9], [40.0]), {"results": {"quality": {}}}, content([0.01], [30.0])]
    assert format_speed_ups(several) == "2,000 at q = 1 (1,280 sequences) / 3,000 at q = 1 (1,280 sequences)"
    assert format_speed_ups([{"results": {"quality": {}}}]) is None


def test_reported_figures_have_a_source():
    facts = yaml.safe_load((ROOT / "prism_lightning/reporting/paper.yaml").read_text())
    assert facts["source"] and all(set(figure) == {"key", "quantity", "reported"} for figure in facts["reported"])
