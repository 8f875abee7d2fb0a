"""A pretrained model in a folder, with a tokenizer of its own, and a retrofit of it, made once."""

import filelock
import pytest
import torch
from support import processes
from support.corpus_files import write_pieces
from support.decoders import write_base

SMALL = {
    "--prototypes": "64",
    "--active": "4",
    "--fit_tokens": "8192",
    "--fit_steps": "20",
    "--batch_tokens": "128",
    "--validation_tokens": "2048",
    "--data.block_size": "32",
    "--data.validation_fraction": "0.2",
}


@pytest.fixture(scope="session")
def pieces(shared, corpus):
    """Two hundred documents of about a hundred words."""
    path = shared / "retrofit_pieces.jsonl"
    with filelock.FileLock(shared / "retrofit_pieces.lock"):
        return path if path.is_file() else write_pieces(corpus, path, size=700, most=3600)


@pytest.fixture(scope="session")
def tokenizer(pieces):
    """A byte-level tokenizer of 300 tokens, trained on the documents."""
    from prism_lightning.data.tokenizer import train_tokenizer

    return train_tokenizer([pieces.read_text()], 300)


@pytest.fixture(scope="session")
def bases(shared, tokenizer):
    """Folder of pretrained models: llama, untied, and gpt2, tied."""
    folder = shared / "bases"
    with filelock.FileLock(shared / "bases.lock"):
        if not folder.is_dir():
            write_base(folder / "llama", "llama", tokenizer, tie_word_embeddings=False)
            write_base(folder / "gpt2", "gpt2", tokenizer)
    return folder


@pytest.fixture(scope="session")
def arguments_of(bases, pieces, cache):
    """Arguments of a small retrofit of a base into a folder; more of them replace its own."""

    def make(out, base="llama", **more):
        settings = {"--model": bases / base, "--out": out, "--data.path": pieces, "--data.cache_dir": cache} | SMALL
        settings |= {"--" + name.replace("__", "."): value for name, value in more.items()}
        return ["retrofit", *(str(word) for pair in settings.items() for word in pair if pair[1] is not None)]

    return make


@pytest.fixture(scope="session")
def retrofitted(shared, arguments_of):
    """A finished retrofit of the llama: its run directory and what it printed. Tests read it, verbs add to it."""
    folder, output = shared / "retrofitted" / "run", shared / "retrofitted.out"
    with filelock.FileLock(shared / "retrofitted.lock"):
        if not output.is_file():
            result = processes.run(*arguments_of(folder))
            assert result.returncode == 0, result.stdout + result.stderr
            output.write_text(result.stdout)
    return folder, output.read_text()


@pytest.fixture
def ids():
    return torch.randint(0, 300, (2, 30), generator=torch.Generator().manual_seed(5))
