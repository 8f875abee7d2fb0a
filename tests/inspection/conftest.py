"""A small prepared corpus."""

import pytest
from support.corpus_model import FirstBlocks, prepared_corpus


@pytest.fixture(scope="session")
def store(corpus, cache):
    """Sixty blocks: 1,920 training tokens."""
    return FirstBlocks(prepared_corpus(corpus, cache).train, 60)
