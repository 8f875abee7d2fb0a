"""What a measurement is, and that an interrupted cost stage goes on with what it had measured."""

import pytest

from benchmarks.attribution.config import CostSettings
from benchmarks.attribution.cost import TURN_ANSWERS, Cost, time_answer
from prism_lightning.common.files import read_json


@pytest.fixture
def cost(tmp_path, monkeypatch):
    """A stage that was interrupted after one build and two answers of "a"; what it measures is counted."""
    stage = object.__new__(Cost)
    stage.plan, stage.methods = CostSettings(counts=[1], repeats=3, patience=100.0), {"a": {}, "b": {}}
    stage.states, stage.partial = {name: tmp_path / name for name in "ab"}, tmp_path / "partial.json"
    stage.states["a"].mkdir()
    stage.measurements = {"builds": {"a": [{"seconds": 1.0}]}, "answers": {"a": {"token 1": [0.1, 0.1]}}}
    stage.built, stage.asked = [], []
    task = type("Task", (), {"train_SL": [0]})()
    monkeypatch.setattr(Cost, "build", lambda self, task, name: self.built.append(name) or {"seconds": 1.0})
    monkeypatch.setattr(Cost, "queries", lambda self, kind, count: kind)
    monkeypatch.setattr(
        "benchmarks.attribution.cost.time_answer", lambda method, queries: stage.asked.append((method, queries)) or 0.1
    )
    return stage, task


def test_builds_go_on(cost):
    stage, task = cost
    found = stage.builds(task)
    assert {name: len(times) for name, times in found.items()} == {"a": 3, "b": 3}
    assert sorted(stage.built) == ["a", "a", "b", "b", "b"]
    assert read_json(stage.partial)["builds"] == found


def test_a_build_without_its_state_is_made_again(cost):
    stage, task = cost
    stage.states["a"].rmdir()
    stage.builds(task)
    assert stage.built[0] == "a" and stage.built.count("a") == 3


def test_builds_are_repeated_within_the_patience(cost):
    stage, task = cost
    stage.measurements["builds"]["a"] = [{"seconds": 60.0}]  # of 100; a third round is no reason for a second build
    assert len(stage.builds(task)["a"]) == 1


def test_answers_go_on(cost):
    stage, _ = cost
    found = stage.answers({"a": "a", "b": "b"})
    assert all(len(times) == 3 for method in found.values() for times in method.values())
    assert stage.asked.count(("a", "token")) == 1  # two were there, and sequences had warmed it up
    assert stage.asked.count(("a", "sequence")) == 4 == stage.asked.count(("b", "token"))


def test_what_takes_long_is_warmed_up_once(cost, monkeypatch):
    stage, _ = cost
    monkeypatch.setattr(
        "benchmarks.attribution.cost.time_answer", lambda method, queries: stage.asked.append((method, queries)) or 20.0
    )
    found = stage.answers({"b": "b"})
    assert {key: len(times) for key, times in found["b"].items()} == {"token 1": 3, "sequence 1": 3}
    assert stage.asked.count(("b", "token")) == 4 and stage.asked.count(("b", "sequence")) == 3


@pytest.mark.parametrize(
    ("seconds", "asked", "median"),
    [([0.18, 0.001, *[0.002] * 9], TURN_ANSWERS, 0.002), ([0.4, 0.3], 2, 0.35), ([80.0], 1, 80.0)],
)
def test_an_answer_is_the_median_of_its_turn(monkeypatch, seconds, asked, median):
    clock, left = [0.0], list(seconds)
    monkeypatch.setattr("benchmarks.attribution.cost.time.perf_counter", lambda: clock[0])

    class Slow:
        def top(self, queries, count):
            clock[0] += left.pop(0)

    assert time_answer(Slow(), None) == pytest.approx(median)
    assert len(seconds) - len(left) == asked
