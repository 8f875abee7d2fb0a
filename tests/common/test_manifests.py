"""Typed checks of JSON files accept the right content and describe every other content in one line."""

import json

import pytest

from prism_lightning.common.errors import UserError
from prism_lightning.common.files import map_file, read_json, write_file
from prism_lightning.common.json_text import as_json
from prism_lightning.common.manifests import (
    flag,
    listed,
    mapping,
    mapping_of,
    number,
    one_of,
    optional,
    pair,
    problem_in,
    read_manifest,
    text,
    whole,
)

FIELDS = {
    "count": whole(1, 1000),
    "share": number(0, 1),
    "name": text(),
    "exact": flag(),
    "kind": one_of("a", 2),
    "ends": optional(pair()),
    "parts": listed(mapping({"size": whole()})),
    "factors": mapping_of(number()),
}
RIGHT = {
    "count": 3,
    "share": 0.5,
    "name": "x",
    "exact": True,
    "kind": 2,
    "parts": [{"size": 1}],
    "factors": {"3": 0},
    "more": [None],
}


def test_right_content_has_no_problem():
    assert problem_in(RIGHT, FIELDS) is None
    assert problem_in(RIGHT | {"ends": None}, FIELDS) is None and problem_in(RIGHT | {"ends": [0, 1.5]}, FIELDS) is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"count": 10**12}, "count is 1000000000000, expected a whole number from 1 to 1,000"),
        ({"count": 0}, "count is 0"),
        ({"count": True}, "count is True"),
        ({"count": 3.0}, "count is 3.0"),
        ({"count": "3"}, "count is '3'"),
        ({"count": None}, "count is null"),
        ({"share": float("nan")}, "share is nan, expected a finite number from 0 to 1"),
        ({"share": float("inf")}, "share is inf"),
        ({"share": -0.1}, "share is -0.1"),
        ({"share": 10**400}, "share is 1000000"),
        ({"name": "y" * 5000}, "expected a text"),
        ({"name": ["x"]}, "name is ['x'], expected a text"),
        ({"exact": 1}, "exact is 1, expected true or false"),
        ({"kind": True}, "kind is True, expected 'a' or 2"),
        ({"kind": [2]}, "kind is [2]"),
        ({"ends": [0]}, "ends is [0], expected two finite numbers or null"),
        ({"parts": {}}, "parts is {}, expected a list"),
        ({"parts": [{"size": 1}, {}]}, "parts[1].size is missing"),
        ({"parts": [3]}, "parts[0] is 3, expected a JSON object"),
        ({"factors": {"3": "x\x1b[2J"}}, "factors.3 is 'x\\x1b[2J'"),
    ],
)
def test_the_first_problem_is_told_in_one_short_line(change, words):
    problem = problem_in(RIGHT | change, FIELDS)
    assert problem is not None and words.removesuffix(" or null") in problem
    assert "\n" not in problem and "\x1b" not in problem and len(problem) < 300


def test_a_missing_entry_is_named():
    del (content := dict(RIGHT))["name"]
    assert problem_in(content, FIELDS) == "name is missing"
    assert problem_in([RIGHT], FIELDS) is not None and problem_in(None, FIELDS) is not None


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[1]", b"3", b"null", b"\xff\xfe{", b"[" * 100_000, b'{"count": ' + b"9" * 5000 + b"}", b"\0" * 64],
)
def test_a_damaged_file_is_named_and_a_missing_one_is_none(tmp_path, content):
    path = tmp_path / "manifest.json"
    assert read_manifest(path, FIELDS, "make it anew") is None
    path.write_bytes(content)
    assert read_json(path) is None
    with pytest.raises(UserError, match="manifest.json is damaged .*: make it anew"):
        read_manifest(path, FIELDS, "make it anew")


def test_json_has_no_number_that_is_not_finite():
    content = {"a": float("nan"), "b": [1.5, -float("inf"), (float("inf"), "NaN")], "c": {"d": 2}}
    printed = as_json(content)

    def refuse(name):
        raise AssertionError(name)

    loaded = json.loads(printed, parse_constant=refuse)
    assert loaded == {"a": None, "b": [1.5, None, [None, "NaN"]], "c": {"d": 2}}


HEADER = b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 4,
        (10**12).to_bytes(8, "little") + HEADER,
        (2**63).to_bytes(8, "little") + b"x",
        len(HEADER).to_bytes(8, "little") + HEADER,  # its tensor is cut off
        len(HEADER).to_bytes(8, "little") + b"x" * len(HEADER) + b"\0" * 8,
        (2).to_bytes(8, "little") + b"[]" + b"\0" * 8,
        (2).to_bytes(8, "little") + b"{}",
        len(HEADER).to_bytes(8, "little") + HEADER.replace(b"[2]", b"[3]") + b"\0" * 8,
        len(HEADER).to_bytes(8, "little") + HEADER.replace(b"F32", b"X32") + b"\0" * 8,
        len(HEADER).to_bytes(8, "little") + HEADER.replace(b"[0,8]", b"[9,8]") + b"\0" * 8,
        len(HEADER).to_bytes(8, "little") + HEADER.replace(b"[0,8]", b'"0,8"') + b"\0" * 8,
    ],
)
def test_a_damaged_safetensors_file_is_named(tmp_path, content):
    path = tmp_path / "t.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError, match="t.safetensors cannot be read"):
        map_file(path)


def test_tensors_are_mapped_as_they_were_written(tmp_path):
    import numpy as np

    tensors = {"a": np.arange(6, dtype="f4").reshape(2, 3), "b": np.array([1], dtype="u2"), "none": np.empty(0, "i8")}
    write_file(tmp_path / "t.safetensors", tensors)
    loaded = map_file(tmp_path / "t.safetensors")
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype and np.array_equal(loaded[name], tensor)
    write_file(tmp_path / "empty.safetensors", {"none": np.empty(0, "i8")})
    assert map_file(tmp_path / "empty.safetensors")["none"].shape == (0,)
