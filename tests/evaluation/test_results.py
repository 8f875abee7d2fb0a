"""Results are kept on disk, and differences of two models are paired by document."""

import json
import math

import numpy as np
import pytest

from prism_lightning.common.errors import UserError
from prism_lightning.evaluation.results import Difference, TaskResult, average, paired, read_result, write_result


def result(**changes):
    settings = {"task": "t", "metric": "acc", "chance": 0.25, "metrics": {"acc": 0.5}, "errors": {"acc": 0.1}}
    counts = {
        "documents": 4,
        "requests": 16,
        "cut": 0,
        "seconds": 1.0,
        "model_seconds": 0.5,
        "identity": {"model": "a"},
    }
    return TaskResult(**(settings | counts | changes))


def samples(values, metric="acc"):
    return [{"doc_id": n, "doc_hash": f"h{n}", metric: value} for n, value in enumerate(values)]


def test_a_result_is_read_back_only_for_its_identity(tmp_path):
    assert read_result(tmp_path, "t") is None
    write_result(tmp_path, result(), samples([1, 0, 1, 0]))
    assert read_result(tmp_path, "t", {"model": "a"}) == result()
    assert read_result(tmp_path, "t", {"model": "b"}) is None
    (tmp_path / "t.json").write_text("{")
    assert read_result(tmp_path, "t") is None
    assert math.isnan(result(errors={}).error) and result().value == 0.5


def test_paired_differences_are_those_of_the_documents(tmp_path):
    generator = np.random.default_rng(0)
    left, right = generator.integers(0, 2, 50), generator.integers(0, 2, 50)
    for name, values in (("left", left), ("right", right)):
        write_result(tmp_path / name, result(), samples(values.tolist()))
    difference = paired(tmp_path / "left", tmp_path / "right", "t", "acc")
    lower = left - right
    assert difference.value == pytest.approx(lower.mean()) and difference.documents == 50
    assert difference.error == pytest.approx(lower.std(ddof=1) / 50**0.5)
    # The standard error is that of many repetitions.
    draws = [generator.choice(lower, 50).mean() for _ in range(4000)]
    assert difference.error == pytest.approx(np.std(draws), rel=0.1)
    low, high = difference.interval
    assert high - low == pytest.approx(2 * 1.96 * difference.error, rel=1e-3)


def test_other_documents_are_not_compared(tmp_path):
    write_result(tmp_path / "a", result(), samples([1, 0]))
    write_result(tmp_path / "b", result(), samples([1, 0, 1]))
    with pytest.raises(UserError, match="on other documents"):
        paired(tmp_path / "a", tmp_path / "b", "t", "acc")


def test_the_average_counts_tasks_alike():
    difference = average([Difference("a", 0.1, 0.03, 10), Difference("b", -0.3, 0.04, 1000)])
    assert (difference.value, difference.error) == pytest.approx((-0.1, 0.025)) and difference.documents == 1010


@pytest.mark.parametrize(
    "change",
    [
        {"documents": "4"},
        {"documents": float("nan")},
        {"metrics": [0.5]},
        {"metrics": {"acc": "0.5"}},
        {"metrics": {}},
        {"metric": ["acc"]},
        {"identity": None},
        {"chance": "0.25"},
        {"surplus": 1},
    ],
)
def test_a_damaged_result_is_made_anew(tmp_path, change):
    write_result(tmp_path, result(), samples([1, 0]))
    path = tmp_path / "t.json"
    right = json.loads(path.read_text())
    path.write_text(json.dumps(right | change))
    assert read_result(tmp_path, "t") is None
    for content in ("[]", "3", "[" * 100_000, json.dumps({k: v for k, v in right.items() if k != "cut"})):
        path.write_text(content)
        assert read_result(tmp_path, "t") is None


def test_a_metric_that_is_not_finite_is_null_in_the_file_and_nan_in_memory(tmp_path):
    write_result(tmp_path, result(metrics={"acc": math.inf}, errors={"acc": math.nan}), samples([1, math.nan]))

    def refuse(name):
        raise AssertionError(name)

    assert json.loads((tmp_path / "t.json").read_text(), parse_constant=refuse)["metrics"] == {"acc": None}
    for line in (tmp_path / "t.samples.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=refuse)
    loaded = read_result(tmp_path, "t")
    assert loaded is not None and math.isnan(loaded.value) and math.isnan(loaded.error)


@pytest.mark.parametrize("content", [None, "{", "[]", '{"doc_id": 0}', "3", '{"doc_id": 0, "doc_hash": 0, "acc": []}'])
def test_damaged_samples_are_named(tmp_path, content):
    for name in ("a", "b"):
        write_result(tmp_path / name, result(), samples([1, 0]))
    path = tmp_path / "b" / "t.samples.jsonl"
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(UserError, match=r"b/t.samples.jsonl is missing or damaged: remove .*b/t.json"):
        paired(tmp_path / "a", tmp_path / "b", "t", "acc")


def test_results_are_plain_json(tmp_path):
    write_result(tmp_path, result(), samples([1]))
    assert json.loads((tmp_path / "t.json").read_text())["metrics"] == {"acc": 0.5}
    assert not list(tmp_path.glob("*.partial"))
