"""Arguments of a fit that takes seconds, and the small backbones of the tests' models."""

import shutil
from pathlib import Path

ROOT = Path(__file__).parents[2]
TINY_RECIPE = ROOT / "tests" / "tiny.yaml"
BACKBONES = {
    "gpt2": {
        "model_type": "gpt2",
        "n_layer": 2,
        "n_embd": 32,
        "n_head": 2,
        "n_positions": 64,
        "vocab_size": 300,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    },
    "llama": {
        "model_type": "llama",
        "num_hidden_layers": 2,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
        "vocab_size": 300,
        "tie_word_embeddings": False,
    },
}


def tiny_arguments(folder, corpus, cache):
    """The tiny recipe with its run directory, corpus and cache."""
    return [
        *("--config", str(TINY_RECIPE), "--run.dir", str(folder)),
        *("--data.path", f"{corpus}/*.txt", "--data.cache_dir", str(cache)),
    ]


def copied_run(finished, folder):
    """A copy of a finished run that a test may change: its folder and the arguments of its `fit`."""
    shutil.copytree(finished[0], folder)
    return folder, in_run(finished[1], folder)


def in_run(arguments, folder, *more):
    """The same arguments with another run directory, and more of them."""
    arguments = list(arguments)
    arguments[arguments.index("--run.dir") + 1] = str(folder)
    return [*arguments, *more]
