"""docs/index-format.md says what is in the files of an index: names, types and numbers of dimensions."""

import json
import re

import pytest
from support.runs import ROOT

from prism_lightning.common.files import map_file

PAGE = (ROOT / "docs" / "index-format.md").read_text(encoding="utf-8")
TYPES = {"fp64": "float64", "fp32": "float32", "fp16": "float16"}
SPACES = {"logits": [], "hidden": ["--index.space", "hidden", "--index.hidden_rank", "4"]}


def rows(heading):
    """The cells of every row of the first table under a heading."""
    table = re.search(r"\n\| .*?\n\n", PAGE[PAGE.index(f"\n## {heading}\n") :], flags=re.S)[0]
    return [[cell.strip() for cell in line.strip("| ").split("|")] for line in table.strip().splitlines()[2:]]


def stated(heading):
    """Types and number of dimensions by tensor, and what the page says about it."""
    tensors = {}
    for names, types, shapes, content in rows(heading):
        kinds = {TYPES.get(kind, kind) for kind in re.findall(r"[iuf]\w+\d+", types)}
        dimensions = [shape.count(",") + 1 for shape in re.findall(r"\[(.*?)\]", shapes)]
        for number, name in enumerate(re.findall(r"`(\w+)`", names)):
            tensors[name] = kinds, dimensions[min(number, len(dimensions) - 1)], content
    return tensors


@pytest.fixture(scope="module", params=SPACES)
def built(request, finished_run, tmp_path_factory):
    from support.processes import run

    folder = tmp_path_factory.mktemp(request.param) / "index"
    result = run("index", *finished_run[1], *SPACES[request.param], "--index.dir", str(folder))
    assert result.returncode == 0, result.stderr
    return request.param, folder


def agree(tensors, table):
    assert tensors.keys() <= table.keys()
    for name, tensor in tensors.items():
        kinds, dimensions, _ = table[name]
        assert tensor.dtype.name in kinds and tensor.ndim == dimensions, name


def test_every_tensor_of_a_shard_is_in_the_table_and_the_other_way_round(built):
    space, folder = built
    table = stated(f"Shards in the space of {'logits' if space == 'logits' else 'hidden states'}")
    tensors = map_file(folder / "shards" / "00000.safetensors")
    agree(tensors, table)
    assert table.keys() == tensors.keys()


def test_every_tensor_of_the_dictionary_is_in_the_table(built):
    space, folder = built
    table = stated("dictionary.safetensors")
    tensors = map_file(folder / "dictionary.safetensors")
    agree(tensors, table)
    assert tensors.keys() == {name for name, entry in table.items() if space == "hidden" or "hidden" not in entry[2]}


def test_every_tensor_of_the_curvature_is_named(built):
    space, folder = built
    section = PAGE[PAGE.index("## Shards in the space of " + ("logits" if space == "logits" else "hidden")) :]
    sentence = re.search(r"`curvature.safetensors` holds.*?\n\n", section, flags=re.S)[0]
    for name, tensor in map_file(folder / "curvature.safetensors").items():
        assert f"`{name}` [" in sentence and tensor.dtype.name == ("float64" if space == "logits" else "float32")


def test_every_file_and_every_key_is_named(built):
    _, folder = built
    files = {"NNNNN.json" if path.stem.isdigit() else path.name for path in folder.rglob("*.json")}
    facts = {name: keys for name, keys in re.findall(r"^\| `(?:shards/)?(\w+\.json)` \| (.*?) \|$", PAGE, flags=re.M)}
    assert files == {"settings.json", "manifest.json", *facts}
    for path in folder.rglob("*.json"):
        content = json.loads(path.read_text())
        if path.name in ("settings.json", "manifest.json"):
            named = " ".join(row[0] for row in rows("manifest.json"))
        else:
            named = "`bytes` `crc32` " + facts["NNNNN.json" if path.stem.isdigit() else path.name]
        assert [key for key in content if f"`{key}`" not in named] == [], path.name
