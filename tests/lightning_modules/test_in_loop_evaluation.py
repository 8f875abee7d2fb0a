"""The callback: what it logs, that training is the same without it, and wrong settings."""

import csv

import pytest
import torch
from safetensors.torch import load_file
from support.processes import fit
from support.runs import in_run


@pytest.fixture
def suite(tmp_path):
    path = tmp_path / "suite.yaml"
    path.write_text(
        "tasks:\n  continuation: {kind: continuation, metric: acc, chance: 0.25, context: 20, continuation: 6}\n"
    )
    return path


SHORT, EARLIER = "InLoopEvaluation", "prism_lightning.evaluation.in_loop.InLoopEvaluation"


def callback(suite, path=SHORT, **settings):
    init_args = ", ".join(f"{key}: {value}" for key, value in {"suite": suite, **settings}.items())
    return ["--trainer.callbacks", f"[{{class_path: {path}, init_args: {{{init_args}}}}}]"]


def test_it_logs_and_leaves_training_alone(tiny, suite, tmp_path, cli):
    fit(tiny)
    evaluated = in_run(tiny, tmp_path / "evaluated", *callback(suite, EARLIER, every_n_steps=5, limit=6))
    assert "eval/continuation/acc" in cli("fit", *evaluated, check=0).stdout
    plain, other = (load_file(run / "model/model.safetensors") for run in (tmp_path / "run", tmp_path / "evaluated"))
    assert all(torch.equal(plain[name], other[name]) for name in plain)
    (metrics,) = (tmp_path / "evaluated").glob("csv/**/metrics.csv")
    rows = [(row["step"], row["eval/continuation/acc"]) for row in csv.DictReader(metrics.open())]
    accuracies = {step: float(value) for step, value in rows if value}
    assert set(accuracies) == {"5", "10", "12"}
    # At the end it is what the verb finds on the same documents (polishing changes no logit).
    arguments = ["--ckpt_path", tmp_path / "evaluated", "--suite", suite, "--limit", "6"]
    assert f"{accuracies['12']:.4f}" in cli("evaluate", *arguments, check=0).stdout


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"every_n_steps": 0}, "must be positive"), ({"suite": "evals/contination.yaml"}, "did you mean")],
)
def test_wrong_settings_end_before_training(tiny, suite, cli, settings, message, tmp_path):
    result = cli("fit", *tiny, *callback(**{"suite": suite} | settings), check=2)
    assert message in result.stderr and not list((tmp_path / "run").glob("checkpoints/*"))
