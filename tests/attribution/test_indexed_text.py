"""What an answer says about the text of its index."""

import json
from types import SimpleNamespace

import pytest

from prism_lightning.attribution.attributor import indexed_text, training_note
from prism_lightning.run.directory import RunPaths


def store_of(inputs, fingerprint="a1"):
    return SimpleNamespace(manifest={"inputs": inputs, "fingerprint": fingerprint}, counts={"documents": 1234})


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({"files": {"notes.txt": "d"}}, "1,234 documents of notes.txt"),
        ({"files": {"a.txt": "d", "b.txt": "d", "c.txt": "d"}}, "1,234 documents of a.txt and 2 more"),
        ({"dataset": "user/texts", "split": "train"}, "1,234 documents of user/texts"),
        ({"standard_library": "3.11", "files": {"os.py": "d"}}, "1,234 documents of Python's standard library"),
    ],
)
def test_the_text_is_named(inputs, words):
    assert indexed_text(store_of(inputs)) == words


@pytest.mark.parametrize(
    ("recipe", "fingerprint", "words"),
    [
        ("model:\n  class_path: PrismLM\n", "a1", "which the model was trained on"),
        ("model:\n  class_path: PrismLM\n", "b2", "which this run did not train the model on"),
        ("retrofit:\n  model: base\n", "a1", "which this run did not train the model on"),
    ],
)
def test_an_answer_says_whether_the_model_was_trained_on_the_text(tmp_path, recipe, fingerprint, words):
    (tmp_path / "recipe.yaml").write_text(recipe)
    (tmp_path / "environment.json").write_text(json.dumps({"data_fingerprint": "a1"}))
    assert training_note(RunPaths(tmp_path), store_of({}, fingerprint)) == f", {words}"


def test_nothing_is_said_of_a_folder_without_a_run(tmp_path):
    assert training_note(RunPaths(tmp_path), store_of({})) == ""
