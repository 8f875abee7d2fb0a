"""Every kind of source, and what a user is told when one cannot be read."""

import csv
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from prism_lightning.data.sources import hub_dataset, local_files, standard_library
from prism_lightning.errors import UserError

TEXTS = ["first text\nof two lines", "zweiter Text: äöü", "第三"]


def write(folder, kind):
    path = folder / f"corpus.{kind}"
    if kind == "jsonl":
        path.write_text("\n".join(json.dumps({"text": text, "n": 1}) for text in TEXTS) + "\n")
    elif kind == "csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, ["n", "text"])
            writer.writeheader()
            writer.writerows({"n": 1, "text": text} for text in TEXTS)
    else:
        pq.write_table(pa.table({"n": [1] * 3, "text": TEXTS}), path)
    return path


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_rows_become_documents_that_know_their_row(tmp_path, kind):
    path = write(tmp_path, kind)
    documents = list(local_files(str(path), "text").documents())
    assert [d.text for d in documents] == TEXTS
    assert [(d.name, d.row) for d in documents] == [(str(path), n) for n in range(3)]


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_a_missing_column_is_named_with_the_nearest(tmp_path, kind):
    with pytest.raises(UserError, match=r"no column 'txt'.*did you mean text\?"):
        list(local_files(str(write(tmp_path, kind)), "txt").documents())


def test_globs_give_each_text_file_once_in_order(tmp_path):
    for name in ("b.txt", "a.txt"):
        (tmp_path / name).write_text(name)
    documents = list(local_files([f"{tmp_path}/*.txt", f"{tmp_path}/a.txt"], "text").documents())
    assert [d.text for d in documents] == ["a.txt", "b.txt"]


def test_identity_follows_the_content(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one")
    before = local_files(str(path), "text").identity
    assert local_files(str(path), "text").identity == before
    path.write_text("two")
    assert local_files(str(path), "text").identity != before


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", b"caf\xe9", ["a.txt", "byte 3", "UTF-8"]),
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', ["a.jsonl:2", "JSON"]),
        ("a.jsonl", b'{"text": "x"}\n{"text": "caf\xe9"}\n', ["a.jsonl:2", "UTF-8"]),
        ("a.jsonl", b'{"text": "\\ud83d"}\n', ["a.jsonl:1", "surrogate"]),
        ("a.jsonl", b'{"\\u001b]0;x\\u0007\\n": 1}\n', ["a.jsonl:1", "known are \\x1b]0;x\\x07\\n"]),
        ("a.jsonl", b'{"text": 3}\n', ["a.jsonl:1", "not text"]),
        ("a.csv", b"text\ncaf\xe9\n", ["a.csv", "UTF-8"]),
        ("a.parquet", b"not parquet", ["a.parquet", "Parquet"]),
    ],
)
def test_damaged_files_are_named_with_the_place(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        list(local_files(str(tmp_path / name), "text").documents())
    assert all(word in str(error.value) for word in words), error.value
    assert "\n" not in str(error.value)


def test_a_parquet_column_of_numbers_is_named(tmp_path):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"text": [1, 2]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="a.parquet: column 'text' is not text"):
        list(local_files(str(tmp_path / "a.parquet"), "text").documents())


def test_the_order_of_files_is_part_of_the_identity(tmp_path):
    paths = [tmp_path / "a.txt", tmp_path / "b.txt"]
    for path in paths:
        path.write_text(path.name)
    ascending, descending = (local_files([str(p) for p in order], "text").identity for order in (paths, paths[::-1]))
    assert ascending != descending
    assert ascending == local_files(f"{tmp_path}/*.txt", "text").identity


def test_missing_files_and_folders_are_named(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        local_files(f"{tmp_path}/*.txt", "text")
    with pytest.raises(UserError, match="data.validation_path .*a folder; try"):
        local_files(str(tmp_path), "text", "data.validation_path")


def test_the_standard_library_is_real_text():
    source = standard_library()
    documents = {d.name: d.text for d in source.documents()}
    assert "def loads(" in documents["json/__init__.py"]
    assert not any("site-packages" in name or name.startswith("test/") for name in documents)
    assert set(documents) <= set(source.identity["files"])


def test_a_hub_dataset_is_streamed_by_column(tmp_path, monkeypatch):
    import datasets

    local = datasets.Dataset.from_dict({"body": TEXTS})
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: local.to_iterable_dataset())
    source = hub_dataset("some/data", None, "train", None, "body")
    assert [(d.text, d.name, d.row) for d in source.documents()] == [(t, "some/data", n) for n, t in enumerate(TEXTS)]
    with pytest.raises(UserError, match="did you mean body"):
        list(hub_dataset("some/data", None, "train", None, "bodi").documents())


def test_an_unreachable_hub_says_how_to_give_the_data_by_path(monkeypatch):
    import datasets

    def fail(*a, **k):
        raise ConnectionError("no network\nat all")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(UserError, match="--data.path") as error:
        list(hub_dataset("some/data", None, "train", None, "text").documents())
    assert "\n" not in str(error.value)
