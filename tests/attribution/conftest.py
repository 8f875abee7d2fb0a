"""A small prepared corpus, models over it, and indexes of them."""

import pytest
import torch
from support.corpus_model import BACKBONE, FirstBlocks, prepared_corpus
from support.runs import copied_run

from prism_lightning.attribution.build.builder import Builder
from prism_lightning.attribution.index.opening import open_index
from prism_lightning.attribution.settings import IndexSettings
from prism_lightning.cli.main import main


@pytest.fixture(scope="session")
def data(corpus, cache):
    """Forty modules of the standard library as blocks of 32 tokens."""
    return prepared_corpus(corpus, cache)


@pytest.fixture
def store(data):
    """Sixty blocks: 1,920 training tokens."""
    return FirstBlocks(data.train, 60)


@pytest.fixture
def model(make_model):
    """An untrained model with 24 prototypes that lie among its hidden states."""
    model = make_model(BACKBONE, num_prototypes=24, active_prototypes=3).eval()
    torch.manual_seed(1)
    model.prototypes.weight.data.normal_()
    return model


@pytest.fixture
def built(model, store, tmp_path):
    """Build an index with the given settings; by default of the model's own prototypes, uncompressed vectors."""

    def build(folder="index", using=None, over=None, rank=0, world_size=1, **settings):
        defaults = {"dictionary": "model", "fit_tokens": 1024, "batch_tokens": 256, "shard_tokens": 800}
        if settings.get("space") != "logits":
            defaults |= {"space": "hidden", "precision": "fp32"}
        settings = IndexSettings(**(defaults | settings))
        builder = Builder(using or model, over or store, settings, tmp_path / folder, lambda *_: None)
        return open_index(tmp_path / folder) if builder.build(rank, world_size) else None

    return build


@pytest.fixture(scope="module")
def run(finished_run, tmp_path_factory):
    """A finished tiny run with its index, and the arguments it was made with."""
    folder, arguments = copied_run(finished_run, tmp_path_factory.mktemp("attributed") / "run")
    small = ["--index.prototypes", "128", "--index.fit_steps", "10", "--index.shard_tokens", "30000"]
    assert main(["index", *arguments, *small]) == 0
    return folder, [*arguments, *small]
