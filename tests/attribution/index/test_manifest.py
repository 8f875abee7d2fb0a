"""Damaged records of an index: one line each, at once, whether or not files are verified."""

import json
import time

import pytest

from prism_lightning.attribution.build.builder import Builder
from prism_lightning.attribution.index.opening import open_index
from prism_lightning.attribution.settings import IndexSettings
from prism_lightning.common.errors import UserError

CHANGES = [
    {"shards": 10**12},
    {"shards": 10**6, "shard_tokens": 1, "tokens": 10**6},
    {"shards": 10**5, "shard_tokens": 1, "tokens": 10**5},
    {"shards": "3"},
    {"shards": 3.0},
    {"shards": 2},
    {"shards": -1},
    {"shards": float("nan")},
    {"tokens": 10**400},
    {"tokens": 1919},
    {"shard_tokens": 0},
    {"prototypes": [24]},
    {"prototypes": 25},
    {"active": 2},
    {"vocabulary": True},
    {"vocabulary": 301},
    {"store": 3},
    {"store": "x" * 100_000},
    {"model": None},
    {"block_size": {}},
    {"settings": []},
    {"settings": {}},
    {"settings": {"space": "other"}},
    {"settings": {"space": ["logits"]}},
    {"format": [2]},
    {"format": "x" * 100_000},
]


@pytest.mark.parametrize("space", ["logits", "hidden"])
@pytest.mark.parametrize("verify", [True, False])
def test_a_wrong_manifest_is_told_in_one_line_at_once(built, space, verify):
    index = built(space=space)
    path = index.folder / "manifest.json"
    right = json.loads(path.read_text())
    for change in CHANGES:
        if space == "hidden" and "vocabulary" in change and change["vocabulary"] == 301:
            continue  # vectors of hidden states do not depend on it
        path.write_text(json.dumps(right | change))
        began = time.monotonic()
        with pytest.raises(UserError) as caught:
            open_index(index.folder, verify)
        assert time.monotonic() - began < 20, change  # with 100,000 missing shards .3 s, 2 where a machine is busy
        lines = caught.value.problems
        assert len(lines) <= 5 and all(str(index.folder) in line and len(line) < 700 for line in lines), (change, lines)
    for name in right:
        path.write_text(json.dumps({key: value for key, value in right.items() if key != name}))
        with pytest.raises(UserError, match=f"{name} is missing" if name != "format" else "format is missing"):
            open_index(index.folder, verify)
    path.write_text(json.dumps([right]))
    with pytest.raises(UserError, match="it is no JSON object"):
        open_index(index.folder, verify)
    path.write_text(json.dumps(right))
    assert open_index(index.folder, verify).manifest == right


@pytest.mark.parametrize("name", ["dictionary", "curvature", "shards/00001"])
@pytest.mark.parametrize("content", ["[]", "{}", '{"bytes": "x", "crc32": []}', '{"bytes": 1e999}', "[" * 100_000])
def test_a_wrong_checksum_file_is_damage_that_a_build_mends(built, name, content):
    index = built()
    path = index.folder / f"{name}.json"
    right = path.read_text()
    path.write_text(content)
    with pytest.raises(UserError) as caught:
        open_index(index.folder)
    assert name in str(caught.value) or "mixes files" in str(caught.value)
    assert json.loads((built().folder / f"{name}.json").read_text()) == json.loads(right)


@pytest.mark.parametrize("content", ["[]", "{}", '{"settings": 3}', "[" * 100_000])
def test_wrong_settings_are_named(built, model, store, content):
    index = built()
    (index.folder / "settings.json").write_text(content)
    with pytest.raises(UserError, match=r"settings.json is damaged: remove the folder"):
        Builder(model, store, IndexSettings(), index.folder, lambda *_: None)


def test_a_truncated_file_is_named_without_verification(built):
    index = built(space="logits")
    for name in ("dictionary", "curvature", "shards/00001"):
        path = index.folder / f"{name}.safetensors"
        content = path.read_bytes()
        for harmed in (content[:-4], content[:20], b"", b"\xff" * 16 + content[16:]):
            path.write_bytes(harmed)
            with pytest.raises(UserError, match=f"{name}.safetensors cannot be read"):
                open_index(index.folder, verify=False)
        path.write_bytes(content)
