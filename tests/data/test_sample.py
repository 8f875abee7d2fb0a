"""A sample of the training split has whole documents with their names; it is reused, and replaced if damaged."""

import numpy as np
import pytest

from prism_lightning.data.sample import sampled_store
from prism_lightning.lightning_modules.text_data import TextData


@pytest.fixture(scope="module")
def store(corpus, cache):
    data = TextData(path=f"{corpus}/*.txt", cache_dir=str(cache), vocab_size=300, block_size=32)
    data.setup()
    return data.train


def test_documents_of_the_sample_are_those_of_the_corpus(store, tmp_path):
    sample = sampled_store(store, 40_000, tmp_path / "sample")
    assert 40_000 <= sample.counts["tokens"] < store.counts["tokens"] and len(sample) > 0
    assert len(sample.documents) == sample.counts["documents"] == len(store.sample(40_000))
    for number, original in enumerate(store.sample(40_000)):
        assert sample.documents["name"][number] == store.documents["name"][original]
        assert np.array_equal(sample.document_tokens(number), store.document_tokens(original))
    assert sample.manifest["fingerprint"] != store.manifest["fingerprint"]


def test_it_is_made_once_and_anew_where_it_is_damaged(store, tmp_path):
    folder = tmp_path / "sample"
    sampled_store(store, 40_000, folder)
    tokens = folder / "train" / "tokens.bin"
    made, content = tokens.stat().st_mtime_ns, tokens.read_bytes()
    sampled_store(store, 40_000, folder)
    assert tokens.stat().st_mtime_ns == made
    tokens.write_bytes(content[:-2])
    sampled_store(store, 40_000, folder)
    assert tokens.read_bytes() == content
    assert sampled_store(store, 50_000, folder).counts["tokens"] >= 50_000
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sample", "sample.lock"]


def test_a_corpus_that_is_hardly_larger_is_taken_whole(store, tmp_path):
    assert sampled_store(store, store.counts["tokens"] - 100, tmp_path / "sample") is store
    assert not (tmp_path / "sample").exists()
