"""Recorded answers against the harness, slopes against finite differences, and controllers end to end."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from support.figures import kept_figures

from prism_lightning.evaluation.evaluator import run_task
from prism_lightning.evaluation.harness import PrismHarnessModel
from prism_lightning.evaluation.suites import SuiteTask
from prism_lightning.evaluation.tasks import build_tasks
from prism_lightning.interventions.controllers.answers import AnswerRecorder, Answers, joined, record
from prism_lightning.interventions.controllers.fitting import calibrate, correct_with, permuted, slopes, target_of
from prism_lightning.interventions.controllers.items import split_items
from prism_lightning.interventions.intervention import temporary_scaling
from prism_lightning.models.steering import Scaling
from prism_lightning.run.training_data import data_of

SETTINGS = SuiteTask(metric="acc", chance=0.25, kind="continuation", context=12, continuation=4)
SUITE = "tasks: {continuation: {kind: continuation, metric: acc, chance: 0.25, context: 12, continuation: 4}}"


@pytest.fixture(scope="module")
def texts(run):
    return data_of(run).train.texts(range(280))


@pytest.fixture(scope="module")
def answers(loaded, texts):
    model, tokenizer = loaded
    task = build_tasks({"continuation": SETTINGS}, None, lambda: texts)["continuation"]
    recorded = record(
        AnswerRecorder(model=model, tokenizer=tokenizer), "continuation", task, list(task.eval_docs), "acc"
    )
    return task, recorded


@pytest.mark.parametrize("factors", [{}, {i: 0.0 for i in range(0, 64, 3)}])
def test_items_are_scored_as_the_harness_scores_them(loaded, answers, tmp_path, factors):
    model, tokenizer = loaded
    task, recorded = answers
    with temporary_scaling(model, Scaling(factors)):
        bridge = PrismHarnessModel(model=model, tokenizer=tokenizer)
        result = run_task(bridge, "continuation", SETTINGS, task, tmp_path, {})
    assert recorded.items == result.documents > 40
    assert correct_with(model, recorded, factors).mean() == pytest.approx(result.value)
    samples = [json.loads(line) for line in (tmp_path / "continuation.samples.jsonl").read_text().splitlines()]
    harness = [float(answer[0][0]) for sample in samples for answer in sample["resps"]]
    with temporary_scaling(model, Scaling(factors)):
        assert recorded.log_likelihoods(model) == pytest.approx(harness, abs=1e-4)


def test_slopes_are_the_derivatives_of_the_scores(loaded, answers):
    model, _ = loaded
    _, recorded = answers
    slopes_AK = slopes(model, recorded).toarray()
    used = np.argsort(-np.abs(slopes_AK).sum(0))[:6]
    for prototype in used.tolist():
        values = []
        for factor in (1.02, 0.98):
            with temporary_scaling(model, Scaling({prototype: factor})):
                values.append(recorded.log_likelihoods(model))
        expected = (values[0] - values[1]) / 0.04
        assert slopes_AK[:, prototype] == pytest.approx(expected, abs=5e-3 * np.abs(expected).max() + 1e-3)
        assert np.abs(expected).max() > 0.05


def test_some_items_are_scored_as_among_all(loaded, answers):
    model, _ = loaded
    _, recorded = answers
    some = [3, 10, 11]
    whole = correct_with(model, recorded, {1: 0.0})
    assert correct_with(model, recorded.of(some), {1: 0.0}).tolist() == whole[some].tolist()
    both = joined([recorded.of([0, 1]), recorded.of(some)])
    assert correct_with(model, both, {1: 0.0}).tolist() == whole[[0, 1, *some]].tolist()


def test_permuted_labels_leave_the_model_as_right_as_it_is(loaded, answers):
    model, recorded = loaded[0], answers[1]
    scores_A, generator = recorded.log_likelihoods(model), np.random.default_rng(0)
    target_A = target_of(recorded)
    dealt_A = permuted(target_A, scores_A, recorded.item_A, generator)
    assert np.bincount(recorded.item_A, dealt_A).tolist() == [1.0] * recorded.items
    assert dealt_A.tolist() != target_A.tolist()
    best = recorded.correct(scores_A)
    assert replace(recorded, right_A=dealt_A > 0).correct(scores_A).sum() == best.sum()


def test_labels_are_permuted_among_items_of_as_many_answers():
    item_A, target_A = np.array([0, 0, 1, 1, 1, 2, 2]), np.array([1.0, 0, 0, 0.5, 0.5, 0, 1.0])
    scores_A, generator = np.array([0.0, 1, 3, 2, 1, 5, 4]), np.random.default_rng(0)
    for _ in range(5):
        dealt_A = permuted(target_A, scores_A, item_A, generator)
        assert dealt_A[2:5].tolist() == [0, 0.5, 0.5]  # the only one of three answers keeps its own
        assert dealt_A[:2].tolist() == [1, 0] and dealt_A[5:].tolist() == [0, 1]  # the worse one is right in both


def test_the_two_sides_share_no_item(loaded, texts, capsys):
    model, tokenizer = loaded
    suite, parts = {"continuation": SETTINGS}, (lambda: texts[:160], lambda: texts[160:])
    sides = split_items(model, tokenizer, suite, None, *parts, 100, 0, lambda *_: None)
    assert sides[0].items == 100
    questions, choices = ([set(side.questions) for side in sides], [set(side.texts) for side in sides])
    assert not questions[0] & questions[1] and len(choices[0] & choices[1]) <= 2  # the same words may recur
    assert min(side.items for side in sides) >= 40
    assert "note:" not in capsys.readouterr().err
    sides = split_items(model, tokenizer, suite, None, *parts, 5000, 0, lambda *_: None)
    note = f"note: continuation: {sides[0].items} of 5,000 items to fit to: of 160 training documents {sides[0].items}"
    assert capsys.readouterr().err.startswith(note + " have the 16 words")


def likeliest(model, states, hidden):
    """Items that ask for the next token among the model's four likeliest; right is a hidden model's choice."""
    with torch.no_grad():
        top_I4 = model.lm_head(states).topk(4).indices
        with temporary_scaling(model, Scaling(hidden)):
            best_I = model.logits(states).gather(1, top_I4).argmax(1)
    items, answers = len(states), 4 * len(states)
    right_I4 = torch.arange(4) == best_I[:, None]
    return Answers(
        z_nD=states.repeat_interleave(4, 0),
        targets_n=top_I4.flatten(),
        answer_n=np.arange(answers),
        item_A=np.repeat(np.arange(items), 4),
        right_A=right_I4.flatten().numpy(),
        length_A=np.ones(answers),
        names=[f"planted {number}" for number in range(items)],
        questions=[""] * items,
        texts=[""] * answers,
    )


def test_controllers_find_what_was_planted(loaded, answers):
    """Right is what a model with other factors finds best: controllers learn it, permuted labels teach nothing."""
    model, _ = loaded
    _, recorded = answers
    states = recorded.z_nD[:1200]
    with torch.no_grad():
        indices, counts = model.prototypes(states)[0].indices_Nk.unique(return_counts=True)
    used = indices[counts.argsort(descending=True)][:8].tolist()
    hidden = dict.fromkeys(used[::2], 0.0) | dict.fromkeys(used[1::2], 2.0)
    result = calibrate(model, *(likeliest(model, part, hidden) for part in states.split(600)), seed=0, permutations=3)
    plain, controllers, *_ = result.gains["planted"]
    assert plain.accuracy < 0.98 and controllers.gain > 0.3 * (1 - plain.accuracy), (plain, controllers)
    theta = result.controllers.theta
    assert sum(theta.get(i, 0) * (factor - 1) for i, factor in hidden.items()) > 0.2, (theta, hidden)
    assert max(result.permuted) < controllers.gain
    assert len(result.fixed) - len(result.broken) == round(controllers.gain * controllers.items)
    assert {gain.name for gain in result.gains["planted"]} >= {"temperature and bias", "logistic regression on z"}
    assert all(-1 <= value <= 1 for value in theta.values())


def test_the_verb_writes_an_intervention_a_report_and_a_plot(run, cli, tmp_path, texts, monkeypatch):
    figures = kept_figures(monkeypatch)
    data = tmp_path / "data" / "piqa"
    data.mkdir(parents=True)
    rows = [
        {"goal": text[:80], "sol1": text[80:140], "sol2": texts[number - 1][80:140], "label": number % 2}
        for number, text in enumerate(texts[:160])
    ]
    for split, part in (("train", rows[:100]), ("validation", rows[100:])):
        (data / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    suite = tmp_path / "suite.yaml"
    suite.write_text("tasks: {piqa: {metric: acc_norm, chance: 0.5}}")
    command = ("calibrate", "--ckpt_path", run, "--suite", suite, "--data_dir", tmp_path / "data")
    output = cli(*command, "--name", "controllers", "--permutations", "2", "--traced", "3", check=0).stdout
    assert "permuted" in output and "wrote" in output
    folder = run / "interventions"
    details = json.loads((folder / "controllers.details.json").read_text())
    assert len(details["fitted_to"]) == 100 and len(details["judged_on"]) == 60 and len(details["permuted"]) == 2
    factors = json.loads((folder / "controllers.json").read_text())["factors"]
    assert factors == {i: pytest.approx(1 + t) for i, t in details["controllers"]["theta"].items()}
    report = (folder / "controllers.md").read_text()
    assert (
        "100 items, judged on 60 others" in report
        and "](controllers.png)" in report
        and (folder / "controllers.png").is_file()
    )
    (axes,) = figures["in memory"].axes
    plotted = [container.lines[0].get_xydata()[0, 0] for container in axes.containers]
    assert plotted == pytest.approx([100 * gain["gain"] for gain in details["gains"]["piqa"][1:]])
    assert [label.get_text() for label in axes.get_yticklabels()] == ["piqa", "permuted labels"]
    assert axes.lines[-1].get_xdata().tolist() == pytest.approx([100 * gain for gain in details["permuted"]])
    again = ("evaluate", "--ckpt_path", run, "--suite", suite, "--data_dir", tmp_path / "data", "--intervention")
    assert "fitted to items of piqa" in cli(*again, "controllers", check=0).stderr
    if factors:
        assert f"### Prototype {details['cards'][0]['prototype']}" in report


def test_what_cannot_be_calibrated_is_refused(run, cli, tmp_path):
    def refused(suite, *more):
        path = tmp_path / "suite.yaml"
        path.write_text(suite)
        result = cli("calibrate", "--ckpt_path", run, "--suite", path, "--name", "x", *more)
        assert result.returncode == 2 and "Traceback" not in result.stderr
        return result.stderr

    data = tmp_path / "data" / "piqa"
    data.mkdir(parents=True)
    row = json.dumps({"goal": "a", "sol1": "b", "sol2": "c", "label": 0}) + "\n"
    for split in ("train", "validation"):
        (data / f"{split}.jsonl").write_text(row * 20)
    few = refused("tasks: {piqa: {metric: acc, chance: 0.5}}", "--data_dir", tmp_path / "data")
    assert "20 items to fit controllers to and 20 to judge them on: 40 of each" in few
    assert "multiple choice" in refused("tasks: {validation: {kind: validation, metric: bits_per_byte}}")
    assert "letters" in refused(SUITE, "--name", "../x")
    assert not (run / "interventions" / "x.json").exists()


def test_z_alone_is_kept_of_an_answer(answers):
    _, recorded = answers
    assert recorded.z_nD.shape == (len(recorded.targets_n), 32) and recorded.z_nD.dtype == torch.float32
