"""docs/extending.md is followed to the letter: a kind of file, a baseline and a verb are added as it says."""

import ast
import os
import re
import shutil
import subprocess
import sys
from types import ModuleType

import numpy as np
import pytest
import torch
from support.runs import ROOT
from support.tiny_llama import tiny_llama

from benchmarks.attribution import registry
from benchmarks.attribution.task import Method, Queries, Task
from prism_lightning.common.files import map_file, write_file

PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")


def code(title):
    """The block that the page gives for a file."""
    block = re.search(rf'```python title="{re.escape(title)}"\n(.*?)    ```', PAGE, flags=re.S)[1]
    return re.sub(r"^    ", "", block, flags=re.M)


def entry(name):
    """The line that the page adds to a table: of a suffix, a baseline or a verb."""
    return re.search(rf'`("{re.escape(name)}": .*?,)`', PAGE)[1]


def insert(path, after, line):
    """Put a line behind the one place of a file that matches."""
    text = path.read_text()
    (place,) = re.finditer(after, text)
    path.write_text(text[: place.end()] + line + "\n" + text[place.end() :])


@pytest.fixture(scope="module")
def copied(tmp_path_factory):
    """A copy of the package to which the page's kind of file and verb were added."""
    folder = tmp_path_factory.mktemp("copy")
    package = folder / "prism_lightning"
    shutil.copytree(ROOT / "prism_lightning", package, ignore=shutil.ignore_patterns("__pycache__"))
    for title in re.findall(r'title="(prism_lightning/.*?)"', PAGE):
        (folder / title).write_text(code(title))
    sources = package / "data" / "sources" / "registry.py"
    insert(sources, r"(?m)^KINDS\b.*= \{.*\n", "    " + entry(".paragraphs"))
    reader = "from prism_lightning.data.sources.paragraphs import read_paragraphs"
    insert(sources, r"(?m)^from prism_lightning\.data\.sources\.parquet import .*\n", reader)
    insert(
        package / "cli" / "main.py", r'(?s)verbs on a trained model \(--ckpt_path runs/X\):",\s*\{\n', entry("greet")
    )
    return folder


def run(copied, *arguments):
    environment = os.environ | {"PYTHONPATH": str(copied)}
    result = subprocess.run(
        [sys.executable, *arguments], cwd=copied, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_a_kind_of_file_gives_a_document_per_record(copied):
    (copied / "two.paragraphs").write_text("one\n\ntwo\nlines\n")
    program = (
        "from prism_lightning.data.sources import local_files\n"
        "source = local_files('two.paragraphs', 'text')\n"
        "print([(d.row, d.text) for d in source.documents()], source.identity['kinds'])"
    )
    expected = "[(0, 'one'), (1, 'two\\nlines\\n')] {'two.paragraphs': 'paragraphs'}\n"
    assert run(copied, "-c", program) == expected


def test_a_verb_is_listed_and_takes_its_arguments(copied):
    assert run(copied, "-m", "prism_lightning", "greet", "--you") == "hello --you\n"
    assert re.search(r"greet +greet the user", run(copied, "-m", "prism_lightning", "--help"))


def test_a_baseline_is_made_by_its_kind(tmp_path, monkeypatch):
    module = ModuleType("benchmarks.attribution.methods.diversity")
    names = {"Method": Method, "np": np, "torch": torch, "write_file": write_file, "map_file": map_file}
    vars(module).update(names)
    exec(code("benchmarks/attribution/methods/diversity.py"), vars(module))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(registry, "KINDS", registry.KINDS | ast.literal_eval("{" + entry("diversity") + "}"))
    train = torch.tensor([[1, 1, 1, 1], [1, 2, 3, 4], [1, 2, 1, 2]])
    method = registry.make(Task(tiny_llama(8), train), tmp_path / "state", {"kind": "diversity"}, None)
    method.fit()
    method.open()
    assert method.top(Queries.of_sequences(train[:2]), 3).tolist() == [[1, 2, 0]] * 2
    assert method.state_bytes() > 0


def test_every_recipe_is_shorter_than_ten_lines_of_code_and_every_file_it_names_exists():
    for block in re.findall(r"```python.*?\n(.*?)```", PAGE, flags=re.S):
        assert len([line for line in block.splitlines() if line.strip()]) < 10
    named = re.findall(r"`((?:prism_lightning|benchmarks|evals|docs|tests)/[\w/]*[\w.]+\.(?:py|md|yaml))`", PAGE)
    new = re.findall(r'title="(.*?)"', PAGE)
    assert len(named) > 5
    assert [name for name in named if name not in new and not (ROOT / name).is_file()] == []
