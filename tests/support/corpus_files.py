"""Small corpora of every kind of file, packed or not."""

import csv
import gzip
import json

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import zstandard

from prism_lightning.data.sources import local_files

TEXTS = ["first text\nof two lines", "zweiter Text: äöü", "第三, with \u2028 inside"]
ROWS = [{"n": 1, "text": text} for text in TEXTS]


def delimited(path, rows, delimiter):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["n", "text"], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)


def arrow_file(path, rows, new=pa.ipc.new_file):
    table = pa.Table.from_pylist(rows)
    with new(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)


WRITERS = {
    ".jsonl": lambda path, rows: path.write_text("\n".join(map(json.dumps, rows)) + "\n"),
    ".ndjson": lambda path, rows: path.write_text("\n".join(map(json.dumps, rows))),
    ".json": lambda path, rows: path.write_text(json.dumps(rows, indent=1)),
    ".lines.json": lambda path, rows: path.write_text("\n".join(map(json.dumps, rows))),
    ".object.json": lambda path, rows: path.write_text(json.dumps({"version": 1, "tags": ["a"], "data": rows})),
    ".csv": lambda path, rows: delimited(path, rows, ","),
    ".tsv": lambda path, rows: delimited(path, rows, "\t"),
    ".parquet": lambda path, rows: pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=2),
    ".arrow": arrow_file,
    ".stream.arrow": lambda path, rows: arrow_file(path, rows, pa.ipc.new_stream),
    ".feather": lambda path, rows: pyarrow.feather.write_feather(pa.Table.from_pylist(rows), path),
}
PACKERS = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}


def write(folder, suffix, packed="", rows=ROWS):
    path = folder / f"corpus{suffix}"
    WRITERS[suffix](path, rows)
    content = path.read_bytes()
    path.unlink()
    path = folder / f"corpus{suffix}{packed}"
    path.write_bytes(PACKERS[packed](content))
    return path


def write_pieces(corpus, path, size=300, most=6000):
    """The modules' first characters, at most `most`, in pieces, words separated by single blanks: many documents."""
    with path.open("w") as file:
        for source in sorted(corpus.glob("*.txt")):
            text = " ".join(source.read_bytes().decode("utf-8", "replace").split())
            for start in range(0, min(len(text), most) - size, size):
                file.write(json.dumps({"text": text[start : start + size]}) + "\n")
    return path


def documents(path, column="text", **settings):
    return list(local_files(str(path), column, **settings).documents())
