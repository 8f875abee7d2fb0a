"""A finished tiny run on many short documents, for all tests of interventions."""

import json

import pytest
from support.processes import fit
from support.runs import tiny_arguments

PIECE = 300  # characters of a document


@pytest.fixture(scope="session")
def pieces(corpus, tmp_path_factory):
    """The standard library's modules in pieces, words separated by single blanks: hundreds of documents."""
    path = tmp_path_factory.mktemp("pieces") / "pieces.jsonl"
    with path.open("w") as file:
        for source in sorted(corpus.glob("*.txt")):
            text = " ".join(source.read_bytes().decode("utf-8", "replace").split())
            for start in range(0, min(len(text), 6000) - PIECE, PIECE):
                file.write(json.dumps({"text": text[start : start + PIECE]}) + "\n")
    return path


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
