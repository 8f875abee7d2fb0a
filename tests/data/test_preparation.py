"""The packed store has the exact text, is cached, is written whole or not at all, and is split by document."""

import json
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

from prism_lightning.common.errors import UserError
from prism_lightning.data import preparation as module
from prism_lightning.lightning_modules.text_data import TextData


@pytest.fixture
def data(corpus, cache):
    data = TextData(
        path=f"{corpus}/*.txt", vocab_size=400, block_size=32, validation_fraction=0.2, cache_dir=str(cache)
    )
    data.setup()
    return data


def test_documents_come_back_byte_for_byte(data, corpus):
    seen = {}
    for store in (data.train, data.validation):
        for number, name in enumerate(store.documents["name"].to_pylist()):
            tokens = store.document_tokens(number)
            assert tokens[-1] == store.tokenizer.eos_token_id
            seen[name] = store.tokenizer.decode(tokens[:-1].tolist())
    assert seen == {str(p): p.read_text() for p in corpus.glob("*.txt")}


def test_blocks_tile_the_tokens_and_targets_follow(data):
    store = data.train
    rows = store.__getitems__([0, 1, len(store) - 1])
    assert torch.equal(rows[0]["targets"][:-1], rows[0]["input_ids"][1:])
    assert rows[0]["targets"][-1] == rows[1]["input_ids"][0]
    assert [int(r["block_ids"]) for r in rows] == [0, 1, len(store) - 1]
    assert torch.equal(store[5]["input_ids"], torch.tensor(store.tokens[160:192].astype(int)))


def test_every_token_knows_its_document_offset_and_neighbourhood(data):
    store = data.train
    for position in (0, 1, 999, store.counts["tokens"] - 1):
        where = store.locate(position)
        assert store.document_tokens(where.document)[where.offset] == store.tokens[position]
        left, token, right = store.text_around(position, 5, 5)
        text = store.tokenizer.decode(store.document_tokens(where.document).tolist())
        assert left + token + right in text
    with pytest.raises(IndexError):
        store.locate(store.counts["tokens"])


def test_splits_share_no_document_and_do_not_depend_on_the_others(data, corpus, cache, tmp_path):
    train, held_out = (set(store.documents["name"].to_pylist()) for store in (data.train, data.validation))
    assert not train & held_out and held_out
    fewer = [str(p) for p in sorted(corpus.glob("*.txt"))[::2]]
    part = TextData(path=fewer, vocab_size=400, block_size=32, validation_fraction=0.2, cache_dir=str(tmp_path))
    part.setup()
    assert set(part.validation.documents["name"].to_pylist()) == held_out & set(fewer)


def test_bytes_per_token_counts_the_text(data, corpus):
    documents = data.train.documents["name"].to_pylist()
    total = sum((corpus / os.path.basename(n)).stat().st_size for n in documents)
    assert data.train.bytes_per_token == pytest.approx(total / len(data.train.tokens))


def test_preparation_is_cached_by_its_inputs(corpus, tmp_path, monkeypatch):
    settings = {"path": f"{corpus}/*.txt", "vocab_size": 300, "validation_fraction": 0.2, "cache_dir": str(tmp_path)}
    first = TextData(**settings).prepare()
    monkeypatch.setattr(module, "_write", lambda *a: pytest.fail("prepared again"))
    assert TextData(**settings).prepare() == first
    monkeypatch.undo()
    assert TextData(**settings | {"vocab_size": 301}).prepare() != first


def test_all_seeds_hold_out_the_same_documents(corpus, tmp_path):
    settings = {"path": f"{corpus}/*.txt", "vocab_size": 300, "validation_fraction": 0.2, "cache_dir": str(tmp_path)}
    assert TextData(**settings, seed=0).prepare() == TextData(**settings, seed=1).prepare()


def test_a_killed_preparation_leaves_nothing_half_done(corpus, tmp_path):
    script = (
        "import time; from prism_lightning.data import preparation as prepare; old = prepare._append\n"
        "prepare._append = lambda *a: (old(*a), print('appended', flush=True), time.sleep(60))\n"
        "from prism_lightning.lightning_modules.text_data import TextData\n"
        f"TextData(path={f'{corpus}/*.txt'!r}, vocab_size=300, validation_fraction=0.2,"
        f" cache_dir={str(tmp_path)!r}).prepare()"
    )
    child = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline().strip() == "appended"
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert [p.suffix for p in tmp_path.iterdir() if p.is_dir()] == [".partial"]
    data = TextData(path=f"{corpus}/*.txt", vocab_size=300, validation_fraction=0.2, cache_dir=str(tmp_path))
    data.setup()
    assert [p.suffix for p in tmp_path.iterdir() if p.is_dir()] == [""]
    assert len(data.train) > 0


def test_a_full_disk_is_one_line_and_leaves_nothing(corpus, tmp_path, monkeypatch):
    def full(*a):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "_append", full)
    with pytest.raises(UserError, match="No space left"):
        TextData(path=f"{corpus}/*.txt", vocab_size=300, validation_fraction=0.2, cache_dir=str(tmp_path)).prepare()
    assert not [p for p in tmp_path.iterdir() if p.is_dir()]


def test_two_processes_prepare_once(corpus, tmp_path):
    script = (
        "from prism_lightning.lightning_modules.text_data import TextData\n"
        f"print(TextData(path={f'{corpus}/*.txt'!r}, vocab_size=300, validation_fraction=0.2,"
        f" cache_dir={str(tmp_path)!r}).prepare())"
    )
    children = [subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = {child.communicate()[0] for child in children}
    assert len(outputs) == 1 and all(child.returncode == 0 for child in children)


def test_foreign_tokenizer_with_too_few_tokens_is_refused(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "encode_batch", lambda tokenizer, texts: [[999] for _ in texts])
    with pytest.raises(UserError, match="300 tokens but the data hold id 999"):
        TextData(path=f"{corpus}/*.txt", vocab_size=300, validation_fraction=0.2, cache_dir=str(tmp_path)).prepare()


def test_empty_and_tiny_corpora_are_refused(tmp_path):
    (tmp_path / "a.txt").write_text("   \n")
    with pytest.raises(UserError, match="train split is empty"):
        TextData(path=f"{tmp_path}/a.txt", vocab_size=300, validation_fraction=0.2, cache_dir=str(tmp_path)).prepare()
    (tmp_path / "a.txt").write_text("short")
    (tmp_path / "b.txt").write_text("short too")
    tiny = TextData(
        path=f"{tmp_path}/a.txt",
        validation_path=f"{tmp_path}/b.txt",
        vocab_size=300,
        validation_fraction=0.2,
        cache_dir=str(tmp_path),
    )
    with pytest.raises(UserError, match="too few for one block"):
        tiny.setup()


def test_a_corpus_that_moved_is_still_the_same(corpus, cache, tmp_path):
    copy = tmp_path / "elsewhere"
    shutil.copytree(corpus, copy)
    settings = {"vocab_size": 400, "block_size": 32, "validation_fraction": 0.2, "cache_dir": str(cache)}
    assert (
        TextData(path=f"{copy}/*.txt", **settings).prepare() == TextData(path=f"{corpus}/*.txt", **settings).prepare()
    )


def test_a_token_limit_stops_the_preparation(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "BATCH_DOCUMENTS", 2)
    data = TextData(
        path=f"{corpus}/*.txt",
        vocab_size=300,
        max_tokens=60_000,
        block_size=32,
        validation_fraction=0.3,
        cache_dir=str(tmp_path),
    )
    data.setup()
    assert 60_000 <= data.train.counts["tokens"] < 100_000 and data.validation.counts["documents"]


def test_real_stories_are_split_as_given(real_stories, tmp_path):
    data = TextData(
        path=str(real_stories / "train.jsonl"),
        validation_path=str(real_stories / "validation.jsonl"),
        cache_dir=str(tmp_path),
    )
    data.setup()
    assert data.train.counts["documents"] == 3998 and data.validation.counts["documents"] == 906
    first = json.loads((real_stories / "train.jsonl").open().readline())["text"]
    assert data.train.tokenizer.decode(data.train.document_tokens(0)[:-1].tolist()) == first


def test_loader_state_resumes_behind_the_blocks_handed_out(data):
    blocks = [batch["block_ids"].tolist() for batch in data.train_dataloader()]
    loader = data.train_dataloader()
    iterator = iter(loader)
    seen = [next(iterator)["block_ids"].tolist() for _ in range(3)]
    assert seen == blocks[:3]
    resumed = data.train_dataloader()
    resumed.load_state_dict(loader.state_dict())
    assert [batch["block_ids"].tolist() for batch in resumed] == blocks[3:]


def test_resuming_on_other_data_is_refused(data):
    state = data.state_dict()
    data.load_state_dict(state)
    with pytest.raises(UserError, match="trained on data other"):
        data.load_state_dict({"fingerprint": "other"})


def test_a_sample_of_documents_holds_as_many_tokens_as_asked_for(data):
    store = data.train
    sizes = np.diff(np.append(store.starts, store.counts["tokens"]))
    numbers = store.sample(5000)
    assert numbers == sorted(set(numbers)) and 5000 <= sizes[numbers].sum() < 5000 + sizes.max()
    assert numbers != store.sample(5000, seed=1)
    assert store.sample(10**9) == list(range(len(sizes)))
    assert store.texts(numbers[:2]) == [store.texts()[number] for number in numbers[:2]]
