"""Errors of suites name the problem; continuation tasks have one true choice among four."""

from pathlib import Path

import pytest

from prism_lightning.common.errors import UserError
from prism_lightning.evaluation.continuation_questions import continuations
from prism_lightning.evaluation.suites import SuiteTask, load_suite, load_suites
from prism_lightning.evaluation.tasks import build_tasks

EVALS = Path(__file__).parents[2] / "evals"


@pytest.mark.parametrize("path", sorted(EVALS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_suite_is_read(path):
    tasks = load_suite(path)
    assert tasks and all(isinstance(task, SuiteTask) for task in tasks.values())


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("tasks: {a: {metric: acc, chanse: 0.5}}", "chanse"),
        ("tasks: {a: {metric: acc, chance: high}}", "chance"),
        ("tasks: [a, b]", "give `tasks`"),
        ("suite: {}", "give `tasks`"),
        ("tasks: {a: {chance: 0.5}}", "metric"),
        ("tasks: {", "suite.yaml"),
    ],
)
def test_wrong_suites_are_named(tmp_path, content, words):
    (tmp_path / "suite.yaml").write_text(content)
    with pytest.raises(UserError, match=words):
        load_suite(tmp_path / "suite.yaml")


def test_unknown_files_and_tasks_have_a_nearest(tmp_path):
    with pytest.raises(UserError, match="did you mean .*downstream.yaml"):
        load_suite(EVALS / "downstrem.yaml")
    with pytest.raises(UserError, match="did you mean hellaswag"):
        load_suites([EVALS / "downstream.yaml"], ["helaswag", "piqa"])
    assert list(load_suites([EVALS / "continuation.yaml", EVALS / "downstream.yaml"], ["piqa"])) == ["piqa"]
    other = tmp_path / "other.yaml"
    other.write_text("tasks:\n  piqa: {metric: acc}\n")
    with pytest.raises(UserError, match="gives task piqa other settings"):
        load_suites([EVALS / "downstream.yaml", other])


def test_missing_data_and_unknown_harness_tasks_are_said_at_once(tmp_path):
    (tmp_path / "piqa").mkdir()
    (tmp_path / "piqa/validation.jsonl").write_text('{"goal": "g", "sol1": "a", "sol2": "b", "label": 0}\n')
    suite = {name: SuiteTask(metric="acc") for name in ("piqa", "boolq", "hellaswak")}
    with pytest.raises(UserError) as caught:
        build_tasks(suite, tmp_path, list)
    assert ["boolq" in problem or "hellaswag" in problem for problem in caught.value.problems] == [True, True]
    (task,) = build_tasks({"piqa": suite["piqa"]}, tmp_path, list).values()
    assert [doc["goal"] for doc in task.validation_docs()] == ["g"]


def test_a_missing_split_is_named(tmp_path):
    (tmp_path / "arc_easy").mkdir()
    (tmp_path / "arc_easy/train.jsonl").write_text('{"question": "q"}\n')
    with pytest.raises(UserError, match=r"arc_easy lacks a split"):
        build_tasks({"arc_easy": SuiteTask(metric="acc")}, tmp_path, list)


def documents(count):
    return [" ".join(f"d{number}w{word}" for word in range(100)) for number in range(count)]


def test_continuations_are_true_ones_among_others():
    questions = continuations(documents(30), 20, 60, 20, seed=1)
    assert len(questions) == 20
    for question in questions:
        number = question["context"].split("w")[0]
        assert question["context"].split(" ")[-1] == f"{number}w59"
        for place, choice in enumerate(question["choices"]):
            words = choice.split(" ")
            assert len(words) == 20 and words[0].endswith("w60")
            assert (words[0] == f"{number}w60") == (place == question["label"])
    assert {question["label"] for question in questions} == {0, 1, 2, 3}
    assert continuations(documents(30), 20, 60, 20, seed=1) == questions
    assert continuations(documents(30), 20, 60, 20, seed=2) != questions


def test_too_short_documents_are_refused():
    with pytest.raises(UserError, match="3 of 5 held-out documents have 80 words, 4 are needed"):
        continuations([*documents(3), "short", "too short"], 20, 60, 20, seed=0)
