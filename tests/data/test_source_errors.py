"""Errors of files that cannot be read name the file, the place, the reason and a fix that works."""

import gzip
import json
import os
import re
import shutil
import subprocess

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from support.corpus_files import PACKERS, WRITERS, documents, write

from prism_lightning.common.errors import UserError
from prism_lightning.data.sources import local_files
from prism_lightning.lightning_modules.text_data import TextData

STORY = "Es war einmal: äöü — und so weiter. " * 200


def message(path, column="text"):
    with pytest.raises(UserError) as error:
        documents(path, column)
    assert "\n" not in str(error.value) and str(path) in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", b"caf\xe9", ["a.txt, byte 3:", "not UTF-8", "iconv -f ENCODING"]),
        ("a.txt", b"\xef\xbb\xbfcaf\xe9", ["a.txt, byte 6:", "not UTF-8"]),
        ("a.txt", b"text\0text", ["a.txt, byte 4:", "NUL"]),
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', ["a.jsonl:2:", "JSON"]),
        ("a.jsonl", b'[\n{"text": "x"}\n]', ["a.jsonl:1:", "name a file that is one array .json"]),
        ("a.jsonl", b'{"text": "x"}\n{"text": "caf\xe9"}\n', ["a.jsonl:2:", "not UTF-8"]),
        ("a.jsonl", b'{"text": "\\ud83d"}\n', ["a.jsonl:1:", "surrogate"]),
        ("a.jsonl", b'{"\\u001b]0;x\\u0007\\n": 1}\n', ["a.jsonl:1:", "known are \\x1b]0;x\\x07\\n"]),
        ("a.jsonl", b'{"text": 3}\n', ["a.jsonl:1:", "not text"]),
        ("a.jsonl", b'"text"\n', ["a.jsonl:1:", "a string, not an object"]),
        ("a.jsonl", b"[" * 100_000, ["a.jsonl:1:", "recursion"]),
        ("a.jsonl", b'{"text": "x", "n": ' + b"9" * 5000 + b"}", ["a.jsonl:1:", "digits"]),
        ("a.json", b'[\n{"text": "x"},\n{"text" "y"}\n]', ["a.json:3:", "not JSON"]),
        ("a.json", b'[\n{"text": "x"},\n{"text": "y', ["a.json:3:", "Unterminated"]),
        ("a.json", b'[{"text": "x"},\n{"text": "y"}', ["a.json:2:", "ends within the array"]),
        ("a.json", b'[{"text": "x"}\n{"text": "y"}]', ["a.json:2:", "comma"]),
        ("a.json", b'[{"text": "x"}]\n[]', ["a.json:2:", "after the array"]),
        ("a.json", b'[{"text": "x"}, "y"]', ["a.json row 1:", "a string, not an object"]),
        ("a.json", b'[{"text": "x"}, {"text": 1}]', ["a.json row 1:", "a number"]),
        ("a.json", b'{"a": [{"text": "x"}], "b": [{"text": "y"}]}', ["a.json:", "several lists of objects (a, b)"]),
        ("a.json", b'{"a": "x"}', ["a.json row 0:", "no column 'text'", "known are a"]),
        ("a.json", b'[{"text": "caf\xe9"}]', ["a.json, byte 14:", "not UTF-8"]),
        ("a.json", b"[" * 100_000, ["a.json:1:", "recursion"]),
        ("a.csv", b"text\nx\ncaf\xe9\n", ["a.csv:3:", "not UTF-8"]),
        ("a.csv", b"", ["a.csv:", "no column 'text'"]),
        ("a.parquet", b"not parquet", ["a.parquet could not be read", "arquet"]),
        ("a.arrow", b"not arrow", ["a.arrow could not be read"]),
        ("a.txt", gzip.compress(b"text", mtime=0), ["a.txt:", "a .gz file"]),
        ("a.jsonl", zstandard.ZstdCompressor().compress(b"text"), ["a.jsonl:", "a .zst file"]),
        ("a.txt.gz", b"text", ["a.txt.gz could not be read", "gzip"]),
        ("a.txt.zst", b"text", ["a.txt.zst could not be read"]),
    ],
)
def test_damaged_files_are_named_with_the_place(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    error = message(tmp_path / name)
    assert all(word in error for word in words), error


@pytest.mark.parametrize("chunk", [1, 5, 2**20])
def test_the_byte_of_a_long_json_file_is_exact(tmp_path, monkeypatch, chunk):
    from prism_lightning.data.sources import encoding

    monkeypatch.setattr(encoding, "READ_BYTES", chunk)
    content = b'\xef\xbb\xbf[{"text": "\xc3\xa4\xc3\xa4\xc3x"}]'
    (tmp_path / "a.json").write_bytes(content)
    position = content.index(b"\xc3x")
    assert f"a.json, byte {position}:" in message(tmp_path / "a.json")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"])
@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".json", ".csv", ".tsv"])
def test_wide_encodings_are_named_and_the_advice_works(tmp_path, suffix, encoding):
    path = tmp_path / f"a{suffix}"
    if suffix == ".txt":
        path.write_text(STORY)
    else:
        WRITERS[suffix](path, [{"n": 1, "text": STORY}])
    path.write_bytes(path.read_bytes().decode().encode(encoding))
    error = message(path)
    assert f"the text is {encoding[:6].upper()}, not UTF-8" in error
    assert re.search(r"iconv -f (utf-(16|32)(le|be)?) -t utf-8$", error), error
    if not shutil.which("iconv"):
        pytest.skip("iconv is not installed")
    command = error[error.index("iconv") :].split()
    path.write_bytes(subprocess.run([*command, str(path)], check=True, capture_output=True).stdout)
    assert [d.text for d in documents(path)] == [STORY]


def test_no_advice_guesses_an_encoding(tmp_path):
    for content in ("café".encode("cp1252"), "Привет".encode("koi8-r"), "日本語".encode("shift-jis")):
        (tmp_path / "a.txt").write_bytes(content)
        error = message(tmp_path / "a.txt")
        assert "iconv -f ENCODING -t utf-8" in error and "latin" not in error.lower()


@pytest.mark.parametrize("suffix", [".zip", ".tar.gz", ".pdf", ".xlsx", ".png", ".sqlite", ".npy"])
def test_other_kinds_are_refused_by_name_with_a_conversion(tmp_path, suffix):
    (tmp_path / f"a{suffix}").write_bytes(b"ascii")
    with pytest.raises(UserError, match=re.escape(f"a{suffix}: ") + ".*(unpack|save|write|holds no text).*data.path"):
        local_files(str(tmp_path / f"a{suffix}"), "text")


@pytest.mark.parametrize("packed", [".gz", ".zst"])
@pytest.mark.parametrize("suffix", [*WRITERS, ".txt"])
@pytest.mark.parametrize("lost", [1, 40])
def test_a_truncated_stream_is_found(tmp_path, suffix, packed, lost):
    rows = [{"n": n, "text": f"{n} {os.urandom(20).hex()}"} for n in range(500)]
    if suffix == ".txt":
        path = tmp_path / f"a.txt{packed}"
        path.write_bytes(PACKERS[packed](json.dumps(rows).encode()))
    else:
        path = write(tmp_path, suffix, packed, rows)
    path.write_bytes(path.read_bytes()[:-lost])
    assert "could not be read" in message(path)


@pytest.mark.parametrize("compression", ["snappy", "zstd", "gzip"])
def test_a_damaged_page_is_a_reading_error(tmp_path, compression):
    """The second row group is damaged: its rows are met after others have been read."""
    path = tmp_path / "a.parquet"
    rows = [f"{n} {os.urandom(200).hex()}" for n in range(400)]
    pq.write_table(pa.table({"text": rows}), path, row_group_size=200, compression=compression, use_dictionary=False)
    column = pq.ParquetFile(path).metadata.row_group(1).column(0)
    content = bytearray(path.read_bytes())
    start, size = column.data_page_offset, column.total_compressed_size
    content[start + size // 2 : start + size // 2 + 2000] = b"\xff" * 2000
    content[start + 30 : start + 60] = b"\xff" * 30
    path.write_bytes(content)
    error = message(path)
    assert "could not be read" in error and "damaged" in error
    with pytest.raises(UserError) as prepared:
        TextData(path=str(path), vocab_size=300, cache_dir=str(tmp_path / "cache")).prepare()
    assert str(prepared.value) == error and "free space" not in error


def test_text_of_a_table_that_is_not_utf8_is_named_with_its_row(tmp_path):
    array = pa.array([b"one", b"two", b"caf\xe9"]).view(pa.string())
    pq.write_table(pa.table({"text": array}), tmp_path / "a.parquet")
    with pa.ipc.new_file(tmp_path / "a.arrow", pa.schema({"text": pa.string()})) as writer:
        writer.write_table(pa.table({"text": array}))
    for name in ("a.parquet", "a.arrow"):
        assert f"{name} row 2: b'\\xe9' is not UTF-8" in message(tmp_path / name)


def test_damaged_offsets_of_an_arrow_file_are_found(tmp_path):
    offsets = pa.array([0, 2_000_000_000, 6], pa.int32()).buffers()[1]
    array = pa.Array.from_buffers(pa.string(), 2, [None, offsets, pa.py_buffer(b"onetwo")])
    with pa.ipc.new_file(tmp_path / "a.arrow", pa.schema({"text": pa.string()})) as writer:
        writer.write_batch(pa.record_batch([array], names=["text"]))
    assert "could not be read" in message(tmp_path / "a.arrow")


def test_a_file_that_vanishes_or_is_forbidden_is_a_reading_error(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("text")
    source = local_files(str(path), "text", "data.validation_path")
    path.unlink()
    with pytest.raises(UserError, match=r"a.txt could not be read \(No such file.*data.validation_path"):
        list(source.documents())


def test_no_space_to_unpack_is_no_damage(tmp_path, monkeypatch):
    def full(*a):
        raise OSError(28, "No space left on device")

    path = write(tmp_path, ".parquet", ".gz")
    monkeypatch.setattr(shutil, "copyfileobj", full)
    assert "could not be unpacked in" in message(path) and "TMPDIR" in message(path)


def test_missing_files_and_empty_folders_are_named(tmp_path):
    with pytest.raises(UserError, match=r"data.path .*\*.txt: no such file"):
        local_files(f"{tmp_path}/*.txt", "text")
    with pytest.raises(UserError, match="data.validation_path .*: no text files beneath this folder"):
        local_files(str(tmp_path), "text", "data.validation_path")


def test_a_damaged_file_in_a_folder_is_named(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "b.txt").write_bytes("text".encode("utf-16"))
    with pytest.raises(UserError, match="b.txt: the text is UTF-16"):
        documents(tmp_path)
