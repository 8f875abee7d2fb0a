"""Damaged prepared data are never used: one line names the damage, and the data are prepared anew."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import zlib

import numpy as np
import pytest

from prism_lightning.common.errors import UserError
from prism_lightning.common.files import remove
from prism_lightning.data import integrity, store
from prism_lightning.data import preparation as module
from prism_lightning.data.tokenizer import train_tokenizer
from prism_lightning.lightning_modules.text_data import TextData
from prism_lightning.run.fingerprints import open_store


@pytest.fixture(scope="module")
def text(tmp_path_factory, corpus):
    """Four of the corpus's files: prepared in a fraction of a second."""
    folder = tmp_path_factory.mktemp("text")
    for path in sorted(corpus.glob("*.txt"))[:4]:
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def data_of(text, cache, **settings):
    paths = sorted(str(path) for path in text.glob("*.txt"))
    return TextData(
        path=paths[1:], validation_path=paths[:1], vocab_size=300, block_size=32, cache_dir=str(cache), **settings
    )


@pytest.fixture
def prepared(text, tmp_path):
    return data_of(text, tmp_path / "cache").prepare()


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-3])


DAMAGES = {"flipped": flip, "truncated": truncate, "empty": lambda path: path.write_bytes(b""), "gone": os.unlink}
FILES = [*integrity.FILES, "tokenizer/tokenizer_config.json", "manifest.json"]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_named_and_the_data_are_prepared_anew(text, prepared, capfd, name, damage):
    before = contents(prepared)
    DAMAGES[damage](prepared / name)
    assert contents(prepared) != before
    again = data_of(text, prepared.parent)
    again.setup()
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1 and str(prepared) in lines[0] and name in lines[0] and "anew" in lines[0]
    assert again.prepare() == prepared and contents(prepared) == before
    assert [path.suffix for path in prepared.parent.iterdir() if path.is_dir()] == [""]


def edited(manifest, *keys, value):
    """A manifest with one value replaced, or removed, whose own checksum is right: as by a careful hand."""
    manifest = json.loads(json.dumps(manifest))
    place = manifest
    for key in keys[:-1]:
        place = place[key]
    if value is None:
        del place[keys[-1]]
    else:
        place[keys[-1]] = value
    rest = {name: content for name, content in manifest.items() if name != "crc32"}
    return manifest | {"crc32": zlib.crc32(json.dumps(rest, sort_keys=True).encode())}


@pytest.mark.parametrize(
    ("keys", "value", "words"),
    [
        (("train", "tokens"), 10**12, "train.tokens"),
        (("train", "tokens"), "12", "train.tokens"),
        (("train", "tokens"), 1e3, "train.tokens"),
        (("train", "documents"), -1, "train.documents"),
        (("train", "documents"), 10**9, "train.documents"),
        (("validation", "max_id"), 300, "validation.max_id"),
        (("validation", "bytes"), None, "validation.bytes"),
        (("validation",), [], "validation is []"),
        (("dtype",), "float64", "dtype is 'float64', expected 'uint16' or 'uint32'"),
        (("dtype",), "uint32", "train.tokens"),
        (("tokenizer_size",), True, "tokenizer_size is True"),
        (("files", "train/tokens.bin"), None, "train/tokens.bin"),
        (("files", "train/tokens.bin", "bytes"), "1", "train/tokens.bin"),
        (("files", "tokenizer/../../x"), {"bytes": 0, "crc32": 0}, "tokenizer/../../x"),
        (("files", ""), {"bytes": 0, "crc32": 0}, "files lists ''"),
        (("fingerprint",), 3, "fingerprint is 3, expected a text"),
        (("inputs",), "", "inputs is ''"),
        (("format",), 1, "format is 1, expected 2"),
    ],
)
def test_a_manifest_edited_by_hand_is_not_believed(text, prepared, capfd, keys, value, words):
    path = prepared / "manifest.json"
    written = path.read_bytes()
    path.write_text(json.dumps(edited(json.loads(written), *keys, value=value)))
    with pytest.raises(UserError) as error:
        store.TokenStore(prepared, "train", 32)
    assert words in str(error.value) and "\n" not in str(error.value) and "anew" in str(error.value)
    data_of(text, prepared.parent).setup()
    assert words in capfd.readouterr().err and path.read_bytes() == written


@pytest.mark.parametrize("content", ["", "[]", "null", "{", '"x"', "[" * 100_000, "9" * 5000, "\x00\xff"])
def test_a_manifest_that_is_something_else_is_one_line(text, prepared, capfd, content):
    (prepared / "manifest.json").write_text(content, encoding="latin1")
    with pytest.raises(integrity.DamagedDataError, match="manifest.json"):
        store.TokenStore(prepared, "train", 32)
    data_of(text, prepared.parent).setup()
    assert capfd.readouterr().err.count("\n") == 1


def test_a_file_or_a_dangling_link_in_the_folder_s_place_is_replaced(text, prepared, capfd):
    before = contents(prepared)
    remove(prepared)
    for put in (lambda: prepared.write_text("x"), lambda: prepared.symlink_to(prepared.parent / "nowhere")):
        put()
        data_of(text, prepared.parent).setup()
        assert "manifest.json is missing" in capfd.readouterr().err
        assert not prepared.is_symlink() and contents(prepared) == before
        remove(prepared)


def test_checksums_are_compared_once_unless_a_file_was_written_since(text, prepared, monkeypatch):
    compared = []
    original = integrity.mismatch
    monkeypatch.setattr(
        integrity,
        "mismatch",
        lambda path, facts, checksum=True: (
            (compared.append(path.name) if checksum else None) or original(path, facts, checksum)
        ),
    )
    data_of(text, prepared.parent).setup()
    assert "tokens.bin" in compared and "tokenizer.json" in compared
    compared.clear()
    data_of(text, prepared.parent).setup()
    assert not compared
    os.utime(prepared / "train" / "tokens.bin", (1, 1))
    data_of(text, prepared.parent).setup()
    assert "tokens.bin" in compared


def test_the_corpus_of_an_index_is_checked_and_the_fix_works(text, prepared):
    manifest = json.loads((prepared / "manifest.json").read_text())
    index = {"store": str(prepared), "block_size": 32, "data": manifest["fingerprint"], "tokens": 32}
    assert open_store(index, prepared.parent / "index").counts == manifest["train"]
    flip(prepared / "train" / "tokens.bin")
    with pytest.raises(
        UserError, match=r"index.*damaged: train/tokens.bin does not match its checksum.*again"
    ) as error:
        open_store(index, prepared.parent / "index")
    assert "\n" not in str(error.value)
    assert open_store(index, prepared.parent / "index", verify=False).counts == manifest["train"]
    truncate(prepared / "train" / "documents.arrow")
    with pytest.raises(UserError, match="documents.arrow has"):  # sizes always
        open_store(index, prepared.parent / "index", verify=False)
    data_of(text, prepared.parent).setup()  # what `index` does first
    assert open_store(index, prepared.parent / "index").counts == manifest["train"]


HOOKS = {
    "training the tokenizer": "prepare.train_tokenizer = lambda texts, size: (list(texts), stop())",
    "tokenising": "old = prepare._append; prepare._append = lambda *a: (old(*a), stop())",
    "before the rename": "prepare.os.rename = lambda *a: stop()",
}


@pytest.mark.parametrize("moment", HOOKS)
def test_a_preparation_killed_at_any_moment_changes_nothing(text, prepared, tmp_path, moment):
    cache = tmp_path / "killed"
    paths = sorted(str(path) for path in text.glob("*.txt"))
    settings = {"path": paths[1:], "validation_path": paths[:1], "vocab_size": 300, "cache_dir": str(cache)}
    script = (
        "import time; from prism_lightning.data import preparation as prepare\n"
        "def stop():\n    print('here', flush=True); time.sleep(60)\n"
        f"{HOOKS[moment]}\n"
        "from prism_lightning.lightning_modules.text_data import TextData\n"
        f"TextData(**{settings!r}).prepare()"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout.readline().strip() == "here"
        child.send_signal(signal.SIGKILL)
    folder = data_of(text, cache).prepare()
    assert [path.name for path in cache.iterdir() if path.is_dir()] == [folder.name]
    assert contents(folder) == contents(prepared)


def test_data_that_may_not_be_read_are_one_line(text, prepared, monkeypatch):
    def refused(*a, **k):
        raise PermissionError(13, "Permission denied", str(prepared / "manifest.json"))

    monkeypatch.setattr(integrity, "_manifest", refused)
    with pytest.raises(UserError, match=r"cannot be read \(Permission denied\).*data.cache_dir") as error:
        data_of(text, prepared.parent).prepare()
    assert "\n" not in str(error.value) and str(prepared) in str(error.value)


@pytest.mark.parametrize("where", ["_append", "write_manifest", "os.rename"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), OSError(30, "Read-only file system")])
def test_errors_of_writing_name_the_cache_and_leave_nothing(text, tmp_path, monkeypatch, where, error):
    def fails(*a):
        raise error

    target = module.os if where == "os.rename" else module
    monkeypatch.setattr(target, where.removeprefix("os."), fails)
    with pytest.raises(UserError, match=f"data.cache_dir {tmp_path}.*{error.strerror}.*another data.cache_dir"):
        data_of(text, tmp_path).prepare()
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def test_a_full_disk_while_the_tokenizer_is_saved_names_the_cache(text, tmp_path, monkeypatch):
    from transformers import PreTrainedTokenizerFast

    def full(*a, **k):
        raise Exception("No space left on device (os error 28)")  # as tokenizers says it

    monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", full)
    with pytest.raises(UserError, match=f"data.cache_dir {tmp_path}.*No space left"):
        data_of(text, tmp_path).prepare()


def test_errors_of_reading_do_not_name_the_cache(text, tmp_path, monkeypatch):
    def fails(*a):
        raise OSError(5, "Input/output error", "corpus.txt")
        yield

    monkeypatch.setattr(module, "_tagged", fails)
    with pytest.raises(UserError, match=r"corpus.txt could not be read \(Input/output error\)") as error:
        data_of(text, tmp_path).prepare()
    assert "cache" not in str(error.value)


def test_progress_is_a_line_now_and_then_with_the_time_left(monkeypatch, capfd):
    from prism_lightning.common.progress import PreparationProgress

    monkeypatch.setattr("prism_lightning.common.progress.LINE_SECONDS", 0.05)
    progress = PreparationProgress()
    with progress:
        progress.start_stage("tokenising")
        progress.stage_start -= 30
        progress("5 documents, 70 training tokens", 0.25)
        progress.printer.join(0.3)
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) >= 2
    assert re.fullmatch(r"tokenising: 5 documents, 70 training tokens, 3\d s, 9\d s left", lines[-1])


def test_lines_go_on_while_a_tokenizer_is_trained(monkeypatch, capfd):
    from prism_lightning.common.progress import PreparationProgress

    monkeypatch.setattr("prism_lightning.common.progress.LINE_SECONDS", 0.05)
    text = "".join(random.Random(0).choices("abcdefghij", k=200_000))
    with PreparationProgress() as progress:
        texts = iter([text])
        train_tokenizer((progress.start_stage("training") or part for part in texts), 2000)
    assert capfd.readouterr().err.count("training, ") >= 2


def test_the_share_done_is_that_of_all_characters_or_of_the_token_limit(text, tmp_path, monkeypatch):
    shares = []
    original = module.PreparationProgress.__call__
    monkeypatch.setattr(
        module.PreparationProgress,
        "__call__",
        lambda self, counts, share=0.0: shares.append((self.stage, share)) or original(self, counts, share),
    )
    monkeypatch.setattr(module, "BATCH_DOCUMENTS", 1)
    data_of(text, tmp_path).prepare()
    tokenising = [share for stage, share in shares if stage == "tokenising"]
    sizes = [len(path.read_text()) for path in sorted(text.glob("*.txt"))]
    assert tokenising == pytest.approx(np.cumsum(sizes) / sum(sizes))
