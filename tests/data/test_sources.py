"""Every kind of source gives the same documents, packed or not, by path, folder or glob."""

import json
import os

import pytest
import zstandard
from support.corpus_files import PACKERS, ROWS, TEXTS, WRITERS, documents, write

from prism_lightning.common.errors import UserError
from prism_lightning.data.sources import has_rows, hub_dataset, local_files, registry, standard_library
from prism_lightning.data.sources.source import RecordError

ROWS_WITH_NULLS = [ROWS[0], {"n": 2, "text": None}, ROWS[1], {"n": 3, "text": " "}, {"n": 4, "text": None}, ROWS[2]]


@pytest.mark.parametrize("packed", PACKERS)
@pytest.mark.parametrize("suffix", WRITERS)
def test_rows_become_documents_that_know_their_row(tmp_path, suffix, packed):
    path = write(tmp_path, suffix, packed)
    results = documents(path)
    assert [d.text for d in results] == TEXTS
    assert [(d.name, d.key, d.row) for d in results] == [(str(path), path.name, n) for n in range(3)]
    assert has_rows(str(path))


@pytest.mark.parametrize("packed", PACKERS)
@pytest.mark.parametrize("name", ["a.txt", "b.md", "c.py", "README", "notes.v2", "D.TXT"])
def test_any_other_text_file_is_one_document(tmp_path, name, packed):
    text = "one\r\n  [1] zwei ü\n\n"
    path = tmp_path / f"{name}{packed}"
    path.write_bytes(PACKERS[packed](text.encode()))
    assert [(d.text, d.row) for d in documents(path)] == [(text, 0)]
    assert not has_rows(str(path))


@pytest.mark.parametrize("packed", PACKERS)
@pytest.mark.parametrize("suffix", WRITERS)
def test_nulls_are_skipped_and_counted_alike(tmp_path, suffix, packed):
    source = local_files(str(write(tmp_path, suffix, packed, ROWS_WITH_NULLS)), "text")
    for _ in range(2):  # counted anew in every pass
        assert [(d.text, d.row) for d in source.documents()] == list(zip(TEXTS, (0, 2, 5), strict=True))
        assert source.skipped_nulls == 2


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_a_row_without_the_key_counts_as_null(tmp_path, suffix):
    source = local_files(str(write(tmp_path, suffix, rows=[ROWS[0], {"n": 2}, ROWS[1]])), "text")
    assert [d.row for d in source.documents()] == [0, 2] and source.skipped_nulls == 1


def test_short_records_of_a_csv_file_count_as_nulls(tmp_path):
    (tmp_path / "a.csv").write_text("n,text\n1,one\n2\n3,three\n")
    source = local_files(str(tmp_path / "a.csv"), "text")
    assert [(d.text, d.row) for d in source.documents()] == [("one", 0), ("three", 2)] and source.skipped_nulls == 1


def test_lines_of_a_json_lines_file_count_blank_ones(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n\n  \n{"text": "two"}\n')
    assert [(d.text, d.row) for d in documents(tmp_path / "a.jsonl")] == [("one", 0), ("two", 3)]


def test_one_json_object_with_the_column_is_one_row(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"text": "one", "parts": [{"text": "x"}]}))
    assert [d.text for d in documents(tmp_path / "a.json")] == ["one"]


def test_old_line_ends_and_quotes_of_csv_are_read(tmp_path):
    (tmp_path / "a.csv").write_bytes(b'n,text\r1,one\r2,"two ""words"", a\nline"\r')
    assert [d.text for d in documents(tmp_path / "a.csv")] == ["one", 'two "words", a\nline']


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 64])
def test_json_values_are_read_across_chunks(monkeypatch, tmp_path, chunk):
    from prism_lightning.data.sources import encoding, json_document

    for module in (encoding, json_document):
        monkeypatch.setattr(module, "READ_BYTES", chunk)
    text = 'é "quoted" \\ \u2028 😀 1e-3 true ' * 3
    rows = [{"text": text, "x": [1.5e-10, True, None, {"a": []}]}, {"x": -12, "text": "b"}]
    for content in (
        json.dumps(rows),
        json.dumps(rows, indent=4, ensure_ascii=False),
        "\n ".join(map(json.dumps, rows)),
    ):
        (tmp_path / "a.json").write_text(content)
        assert [d.text for d in documents(tmp_path / "a.json")] == [text, "b"]


def test_a_long_json_array_is_not_held(tmp_path):
    import tracemalloc

    row = json.dumps({"text": "some words " * 1000})
    (tmp_path / "a.json").write_text(f"[{','.join([row] * 2000)}]")
    source = local_files(str(tmp_path / "a.json"), "text")
    tracemalloc.start()
    assert sum(len(document.text) for document in source.documents()) == 22_000_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8_000_000  # of 22 MB; buffers of 1 MiB, twice over while one is replaced


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
def test_a_long_line_is_held_twice_at_most(tmp_path, name):
    import tracemalloc

    text = "some words " * 1_000_000
    (tmp_path / name).write_text(json.dumps({"text": text}) if name == "a.jsonl" else text)
    source = local_files(str(tmp_path / name), "text")
    tracemalloc.start()
    assert [len(document.text) for document in source.documents()] == [11_000_000]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2.3 * 11_000_000


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".lines.json", ".csv", ".tsv"])
@pytest.mark.parametrize("packed", PACKERS)
def test_a_byte_order_mark_is_left_out(tmp_path, suffix, packed):
    """The column asked for is the first, whose name the mark would be part of."""
    content = write(tmp_path, suffix, rows=[{"n": text, "text": "x"} for text in TEXTS]).read_bytes()
    marked = tmp_path / f"marked{suffix}{packed}"
    marked.write_bytes(PACKERS[packed](b"\xef\xbb\xbf" + content))
    assert [d.text for d in documents(marked, "n")] == TEXTS


def test_a_byte_order_mark_of_a_text_is_left_out_and_known_by_the_identity(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone")
    source = local_files(str(tmp_path / "a.txt"), "text")
    assert [d.text for d in source.documents()] == ["one"]
    assert source.identity["without_mark"] == ["a.txt"]  # older versions kept it, and their caches are still there


def test_zstandard_frames_follow_each_other(tmp_path):
    compress = zstandard.ZstdCompressor().compress
    skippable = b"\x50\x2a\x4d\x18\x03\x00\x00\x00abc"  # pzstd writes such frames
    (tmp_path / "a.txt.zst").write_bytes(compress(b"one ") + skippable + compress(b"two " * 100_000) + compress(b""))
    assert documents(tmp_path / "a.txt.zst")[0].text == "one " + "two " * 100_000


def test_long_windows_of_zstandard_are_read(tmp_path):
    parameters = zstandard.ZstdCompressionParameters(window_log=30, enable_ldm=True)
    with zstandard.open(tmp_path / "a.txt.zst", "wb", zstandard.ZstdCompressor(compression_params=parameters)) as file:
        file.write(b"one " * 1000)
    assert documents(tmp_path / "a.txt.zst")[0].text == "one " * 1000


def test_globs_give_each_text_file_once_in_order(tmp_path):
    for name in ("b.txt", "a.txt"):
        (tmp_path / name).write_text(name)
    results = list(local_files([f"{tmp_path}/*.txt", f"{tmp_path}/a.txt"], "text").documents())
    assert [d.text for d in results] == ["a.txt", "b.txt"]


def test_a_folder_stands_for_the_text_files_beneath_it(tmp_path):
    for name in ("b/z.txt", "b/a.md", "a.txt", ".hidden.txt", ".git/config", "b/.x/y.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    write(tmp_path, ".jsonl", ".gz")
    (tmp_path / "picture.png").write_text("no picture")
    (tmp_path / "data").write_bytes(b"\0\1\2\3\0\0abc")
    source = local_files(str(tmp_path), "text")
    assert [d.key for d in source.documents()] == ["a.txt", "b/a.md", "b/z.txt", *["corpus.jsonl.gz"] * 3]
    assert source.unread_files == [str(tmp_path / name) for name in ("data", "picture.png")]
    assert source.identity["files"].keys() == {"a.txt", "b/a.md", "b/z.txt", "corpus.jsonl.gz"}


def test_a_name_that_exists_is_no_glob(tmp_path):
    for name in ("x[1].txt", "x1.txt", "data[2]/y.txt", "data2/y.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    expected = {
        "x[1].txt": ["x[1].txt"],
        "x[0-9].txt": ["x1.txt"],
        "data[2]/*.txt": ["data[2]/y.txt"],
        "data[2]": ["data[2]/y.txt"],
        "data[0-9]/*.txt": ["data2/y.txt"],
        "**/y.txt": ["data2/y.txt", "data[2]/y.txt"],
        "d*[[]2]/y*": ["data[2]/y.txt"],
    }
    assert {pattern: [d.text for d in documents(f"{tmp_path}/{pattern}")] for pattern in expected} == expected
    (tmp_path / "x1.txt").unlink()
    assert [d.text for d in documents(f"{tmp_path}/*[1].txt")] == ["x[1].txt"]


def test_relative_paths_keep_their_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my").mkdir()
    (tmp_path / "my" / "a.txt").write_text("a")
    for pattern in ("my/a.txt", "my/*.txt", "my", "./my", "m*/a.txt"):
        assert [d.name for d in documents(pattern)] == [os.path.join("my", "a.txt")]


def test_identity_follows_the_content(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one")
    before = local_files(str(path), "text").identity
    assert local_files(str(path), "text").identity == before
    path.write_text("two")
    assert local_files(str(path), "text").identity != before


def test_identity_says_the_kind_of_files_that_older_versions_read_as_text(tmp_path):
    for suffix in (".jsonl", ".csv", ".parquet"):
        assert local_files(str(write(tmp_path, suffix)), "text").identity.keys() == {"files", "text_column"}
    assert local_files(str(write(tmp_path, ".tsv")), "text").identity["kinds"] == {"corpus.tsv": "tsv"}


@pytest.mark.parametrize("packed", PACKERS)
def test_one_entry_of_the_registry_adds_a_kind_of_file(tmp_path, monkeypatch, packed):
    """Packed or not, in a folder, with nulls, errors and identity; .bin files are refused without the entry."""

    def read_records(file, column):
        for row, record in enumerate(file.read().split(b"\0")):
            if record == b"?":
                raise RecordError(f" row {row}", "it is a question mark: write a text")
            yield row, record.decode() or None

    path = tmp_path / f"a.bin{packed}"
    path.write_bytes(PACKERS[packed](b"one\0\0three"))
    with pytest.raises(UserError, match=r"are not read"):
        documents(path)
    monkeypatch.setitem(registry.KINDS, ".bin", registry.FileKind("records", read_records, is_text=False))
    source = local_files(str(tmp_path), "text")
    assert [(d.text, d.row) for d in source.documents()] == [("one", 0), ("three", 2)] and source.skipped_nulls == 1
    assert source.identity["kinds"] == {path.name: "records"} and has_rows(path.name)
    path.write_bytes(PACKERS[packed](b"one\0?"))
    with pytest.raises(UserError, match=rf"{path} row 1: it is a question mark"):
        documents(path)


def test_the_order_of_files_is_part_of_the_identity(tmp_path):
    paths = [tmp_path / "a.txt", tmp_path / "b.txt"]
    for path in paths:
        path.write_text(path.name)
    ascending, descending = (local_files([str(p) for p in order], "text").identity for order in (paths, paths[::-1]))
    assert ascending != descending
    assert ascending == local_files(f"{tmp_path}/*.txt", "text").identity == local_files(str(tmp_path), "text").identity


def test_the_standard_library_is_real_text():
    source = standard_library()
    texts = {d.name: d.text for d in source.documents()}
    assert "def loads(" in texts["json/__init__.py"]
    assert not any("site-packages" in name or name.startswith("test/") for name in texts)
    assert set(texts) <= set(source.identity["files"])


@pytest.fixture
def hub(monkeypatch):
    """Serves rows as a data set of the hub."""
    import datasets

    def serve(rows):
        local = datasets.Dataset.from_list(rows)
        monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: local.to_iterable_dataset())

    return serve


def test_a_hub_dataset_is_streamed_by_column(hub):
    hub([{"body": text} for text in TEXTS])
    source = hub_dataset("some/data", None, "train", None, "body")
    assert [(d.text, d.name, d.row) for d in source.documents()] == [(t, "some/data", n) for n, t in enumerate(TEXTS)]
    with pytest.raises(UserError, match="some/data row 0: no column 'bodi'.*did you mean body"):
        list(hub_dataset("some/data", None, "train", None, "bodi").documents())


def test_a_hub_dataset_skips_nulls_and_reads_nested_text_as_files_do(hub):
    hub(ROWS_WITH_NULLS)
    source = hub_dataset("some/data", None, "train", None, "text")
    assert [d.row for d in source.documents()] == [0, 2, 5] and source.skipped_nulls == 2
    hub([{"text": {"content": "one"}, "chat": [{"role": "user", "content": "hi"}]}])
    assert [d.text for d in hub_dataset("a/b", None, "train", None, "text.content").documents()] == ["one"]
    assert [d.text for d in hub_dataset("a/b", None, "train", None, "chat").documents()] == ["user: hi"]
    with pytest.raises(UserError, match="a/b row 0: column 'text' is not text but an object with content"):
        list(hub_dataset("a/b", None, "train", None, "text").documents())


def test_an_unreachable_hub_says_how_to_give_the_data_by_path(monkeypatch):
    import datasets

    def fail(*a, **k):
        raise ConnectionError("no network\nat all")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(UserError, match="--data.path") as error:
        list(hub_dataset("some/data", None, "train", None, "text").documents())
    assert "\n" not in str(error.value)
