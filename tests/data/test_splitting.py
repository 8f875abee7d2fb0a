"""Whole documents are held out by their identity, or the end of the text if there are too few."""

import json

import pytest

from prism_lightning.common.errors import UserError
from prism_lightning.data.sources import Document, Source
from prism_lightning.data.splitting import end_held_out, in_validation, tagged
from prism_lightning.lightning_modules.text_data import TextData

FRACTION = 0.2


def source(*texts, keys=None):
    keys = keys or [f"train {number}" for number in keys_of(False, len(texts))]
    documents = [Document(text, f"/data/{key}", key) for text, key in zip(texts, keys, strict=True)]
    return Source({}, lambda: iter(documents))


def keys_of(held_out, count):
    """Numbers of documents that the hash puts into one split."""
    numbers = (n for n in range(10_000) if in_validation(Document("", "", f"train {n}"), FRACTION) == held_out)
    return [next(numbers) for _ in range(count)]


def parts(text_source, fraction=FRACTION):
    end = end_held_out(text_source, fraction)
    texts_by_split = {"train": [], "validation": []}
    for split, document in tagged(text_source, None, fraction, end):
        texts_by_split[split].append(document.text)
    return texts_by_split


def test_documents_are_held_out_whole_where_the_hash_holds_out_some():
    keys = [f"train {n}" for n in range(50)]
    text_source = source(*(f"text {key}" for key in keys), keys=keys)
    assert end_held_out(text_source, FRACTION) is None
    texts_by_split = parts(text_source)
    assert texts_by_split["validation"] == [f"text train {n}" for n in keys_of(True, 50) if n < 50]
    assert sorted(texts_by_split["train"] + texts_by_split["validation"]) == sorted(f"text {key}" for key in keys)


def test_the_hash_is_what_it_was():
    """Prepared folders and checkpoints depend on it."""
    assert [n for n in range(40) if in_validation(Document("", "", "a.jsonl", n), 0.1)] == [2, 3, 27]


@pytest.mark.parametrize(
    ("text", "train"),
    [
        ("line\n" * 20, "line\n" * 16),
        ("word " * 20, "word " * 16),
        ("a" * 100, "a" * 80),
        ("x" * 74 + "\n" + "y" * 25, "x" * 74 + "\n"),  # a break in the last 10 of the 80 characters before the cut
        ("x" * 60 + "\n" + "y" * 39, "x" * 60 + "\n" + "y" * 19),  # none there: the break would hold out twice as much
        ("x" * 60 + "\n" + "y" * 15 + " " + "z" * 23, "x" * 60 + "\n" + "y" * 15 + " "),
        ("ä😀" * 50, "ä😀" * 40),
    ],
)
def test_one_document_is_cut_at_a_line_or_a_word(text, train):
    assert parts(source(text)) == {"train": [train], "validation": [text[len(train) :]]}


@pytest.mark.parametrize("held_out", [False, True])
def test_few_documents_of_one_split_are_cut_at_the_end_of_the_text(held_out):
    keys = [f"train {number}" for number in keys_of(held_out, 3)]
    texts_by_split = parts(source("one " * 10, "two " * 10, "six " * 10, keys=keys))
    assert texts_by_split == {"train": ["one " * 10, "two " * 10, "six " * 4], "validation": ["six " * 6]}
    texts_by_split = parts(source("one " * 10, "two " * 10, "six " * 5, keys=keys))  # the cut is between two documents
    assert texts_by_split == {"train": ["one " * 10, "two " * 10], "validation": ["six " * 5]}


def test_the_parts_know_their_document():
    text_source = source("one two three four")
    (document,) = text_source.documents()
    for _, part in tagged(text_source, None, FRACTION, end_held_out(text_source, FRACTION)):
        assert (part.name, part.key, part.row) == (document.name, document.key, document.row)


def test_reading_stops_at_the_first_document_that_is_held_out():
    seen = []

    def records():
        for number in [*keys_of(False, 2), *keys_of(True, 2)]:
            seen.append(number)
            yield Document("text", "", f"train {number}")

    assert end_held_out(Source({}, records), FRACTION) is None and len(seen) == 3


def test_a_validation_source_comes_first_and_whole():
    pairs = [(split, document.text) for split, document in tagged(source("a", "b"), source("c"), FRACTION, None)]
    assert pairs == [
        ("validation", "c"),
        ("train", "a"),
        ("train", "b"),
    ]


@pytest.fixture
def prepared(tmp_path):
    def prepare(**settings):
        data = TextData(**{"vocab_size": 300, "block_size": 16, "cache_dir": str(tmp_path / "cache")} | settings)
        data.setup()
        return data

    return prepare


def test_one_document_is_prepared_and_said_in_one_line(prepared, tmp_path, capsys):
    text = "".join(f"line {n} of the only document\n" for n in range(300))
    (tmp_path / "one.txt").write_text(text)
    data = prepared(path=str(tmp_path / "one.txt"), validation_fraction=0.1)
    notes = capsys.readouterr().out.splitlines()
    assert notes == ["too few documents to hold out whole ones: the last 10 % of the text is the validation split"]
    (train,), (held_out,) = data.train.texts(), data.validation.texts()
    assert train + held_out == text and train.endswith("\n") and 0.1 <= len(held_out) / len(text) < 0.11
    assert data.prepare() == prepared(path=str(tmp_path / "one.txt"), validation_fraction=0.1).prepare()


def test_a_token_limit_spares_the_end_of_the_text(prepared, tmp_path, monkeypatch):
    from prism_lightning.data import preparation as prepare

    monkeypatch.setattr(prepare, "BATCH_CHARACTERS", 1000)
    keys = [f"{n}.txt" for n in range(60) if not in_validation(Document("", "", f"{n}.txt"), 0.02)][:30]
    for key in keys:
        (tmp_path / key).write_text("some words of a document " * 40)
    data = prepared(path=[str(tmp_path / key) for key in keys], validation_fraction=0.02, max_tokens=2000)
    assert 2000 <= data.train.counts["tokens"] < 4000
    assert data.validation.texts() == ["some words of a document " * 24]


def test_too_short_a_text_says_how_to_give_validation_text(prepared, tmp_path):
    (tmp_path / "one.txt").write_text("a few words " * 10)
    with pytest.raises(UserError, match="validation split has .*give --data.validation_path"):
        prepared(path=str(tmp_path / "one.txt"))
    (tmp_path / "other.txt").write_text("some other words " * 10)
    prepared(path=str(tmp_path / "one.txt"), validation_path=str(tmp_path / "other.txt"))
    (tmp_path / "one.txt").write_text("a")
    with pytest.raises(UserError, match="validation split is empty: give --data.validation_path"):
        prepared(path=str(tmp_path / "one.txt"))


def test_skipped_nulls_are_said_and_kept(prepared, tmp_path, capsys):
    rows = [{"text": f"row {n} has some words"} if n % 10 else {"text": None} for n in range(200)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "b.jsonl").write_text('{"text": null}\n' + json.dumps({"text": "words to validate on " * 20}))
    data = prepared(path=str(tmp_path / "a.jsonl"), validation_path=str(tmp_path / "b.jsonl"))
    assert capsys.readouterr().out == "21 rows without text (null) were skipped\n"
    assert data.train.manifest["skipped_nulls"] == 21 and data.train.counts["documents"] == 180


def test_files_of_a_folder_that_are_passed_over_are_said(prepared, tmp_path, capsys):
    for n in range(100):
        (tmp_path / f"{n}.txt").write_text(f"document {n} has some words " * 5)
    (tmp_path / "picture\n.png").write_bytes(b"\0")
    prepared(path=str(tmp_path))
    assert capsys.readouterr().out == f"1 files without text were skipped: {tmp_path}/picture\\n.png\n"
