"""The notebooks of examples/ run from their first cell to their last, and are stored without outputs."""

import re
import shutil
import sys

import nbformat
import pytest
from nbclient import NotebookClient
from support.runs import ROOT

EXAMPLES = ROOT / "examples"
NAMES = ["train_and_attribute.ipynb", "suppress.ipynb", "own_model.ipynb"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A copy of examples/ beside the recipes, where runs may be written; the notebooks share a model."""
    root = tmp_path_factory.mktemp("notebooks")
    shutil.copytree(EXAMPLES, root / "examples", ignore=shutil.ignore_patterns("__pycache__"))
    (root / "recipes").symlink_to(ROOT / "recipes")
    return root / "examples"


@pytest.fixture
def executed(folder, monkeypatch):
    """Run a notebook on one thread, with this Python; returns what its cells print."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))

    def execute(name):
        notebook = nbformat.read(folder / name, as_version=4)
        client = NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(folder)}})
        client.create_kernel_manager()
        client.km.kernel_spec.argv[0] = sys.executable
        client.execute()
        outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
        return outputs, "".join(output.text for output in outputs if output.output_type == "stream")

    return execute


def test_every_notebook_is_tested_and_stored_without_outputs():
    assert sorted(path.name for path in EXAMPLES.glob("*.ipynb")) == sorted(NAMES)
    for name in NAMES:
        notebook = nbformat.read(EXAMPLES / name, as_version=4)
        nbformat.validate(notebook)
        cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
        assert all(cell.outputs == [] and cell.execution_count is None for cell in cells)


def test_a_model_is_trained_explained_and_attributed(executed, folder):
    outputs, text = executed(NAMES[0])
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert (folder.parent / "runs" / "tiny" / "index" / "manifest.json").is_file()
    assert len(re.findall(r"^[+-]\d+\.\d\d  .*functions\.jsonl row \d+", text, flags=re.M)) == 3
    assert "def " in text and "log-odds" in text


def test_a_behaviour_is_suppressed(executed):
    _, text = executed(NAMES[1])
    unchanged, suppressed = (int(count) for count in re.findall(r"^\w+: (\d+) of 40", text, flags=re.M))
    assert suppressed < unchanged / 2
    assert "return" in re.search(r"changed logits: \[(.*?)\]", text)[1]


def test_a_model_of_hugging_face_is_explained_and_attributed(executed, folder):
    outputs, text = executed(NAMES[2])
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert (folder.parent / "runs" / "mine" / "index" / "manifest.json").is_file()
    assert "documents of functions.jsonl, which this run did not train the model on" in text
    assert len(re.findall(r"^[+-]\d+\.\d\d  .*functions\.jsonl row \d+", text, flags=re.M)) == 3
