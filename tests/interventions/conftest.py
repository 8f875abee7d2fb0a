"""A finished tiny run on many short documents, for all tests of interventions."""

import pytest
from support.corpus_files import write_pieces
from support.processes import fit
from support.runs import tiny_arguments


@pytest.fixture(scope="session")
def pieces(corpus, tmp_path_factory):
    """The standard library's modules in pieces, words separated by single blanks: hundreds of documents."""
    return write_pieces(corpus, tmp_path_factory.mktemp("pieces") / "pieces.jsonl")


@pytest.fixture(scope="session")
def run(pieces, corpus, cache, tmp_path_factory):
    folder = tmp_path_factory.mktemp("intervened") / "run"
    arguments = tiny_arguments(folder, corpus, cache)
    arguments[arguments.index("--data.path") + 1] = str(pieces)
    fit(
        [
            *arguments,
            "--trainer.max_steps",
            "400",
            "--trainer.val_check_interval",
            "400",
            "--model.learning_rate",
            "5e-3",
        ]
    )
    return folder


@pytest.fixture(scope="session")
def index_arguments(run, pieces, corpus, cache):
    """What `index` is given for this run."""
    arguments = tiny_arguments(run, corpus, cache)
    arguments[arguments.index("--data.path") + 1] = str(pieces)
    return arguments


@pytest.fixture(scope="module")
def loaded(run):
    """Its model and tokenizer."""
    from prism_lightning.run.model_folder import load_exported

    return load_exported(run)
