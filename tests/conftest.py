"""Shared fixtures: small models, a small real corpus, and the command line as a user calls it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
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


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(params=sorted(BACKBONES))
def backbone(request):
    return dict(BACKBONES[request.param])


@pytest.fixture
def make_model():
    """Build a small model with weights drawn from a fixed seed."""
    from prism_lightning.models import PrismConfig, PrismForCausalLM

    def make(backbone=None, seed=0, **settings):
        torch.manual_seed(seed)
        return PrismForCausalLM(PrismConfig(backbone_config=dict(backbone or BACKBONES["gpt2"]), **settings))

    return make


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """Forty modules of the standard library as text files: real text, in seconds."""
    import sysconfig

    folder = tmp_path_factory.mktemp("corpus")
    sources = sorted(p for p in Path(sysconfig.get_paths()["stdlib"]).glob("*.py") if 4_000 < p.stat().st_size < 30_000)
    for path in sources[:40]:
        (folder / f"{path.stem}.txt").write_bytes(path.read_bytes())
    return folder


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """One data cache for the whole session."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def real_stories():
    """Real TinyStories, where the environment says they are."""
    folder = os.environ.get("PRISM_TEST_DATA")
    if not folder or not (Path(folder) / "tinystories" / "train.jsonl").is_file():
        pytest.skip("PRISM_TEST_DATA names no folder with tinystories/train.jsonl")
    return Path(folder) / "tinystories"


@pytest.fixture
def cli(capfd, monkeypatch):
    """Run a command line in this process, which has the imports done; returns exit code, stdout and stderr."""
    from prism_lightning.cli import main

    def run(*arguments, check=None):
        monkeypatch.chdir(ROOT)
        capfd.readouterr()
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = stop.code
        out, err = capfd.readouterr()
        if check is not None:
            assert code == check, out + err
        return subprocess.CompletedProcess(arguments, code, out, err)

    return run


@pytest.fixture
def tiny(corpus, cache, tmp_path):
    """Arguments of a fit that takes seconds, in a run directory of its own."""
    return tiny_arguments(tmp_path / "run", corpus, cache)


def tiny_arguments(folder, corpus, cache):
    """The tiny recipe with its run directory, corpus and cache."""
    return [
        *("--config", str(TINY_RECIPE), "--run.dir", str(folder)),
        *("--data.path", f"{corpus}/*.txt", "--data.cache_dir", str(cache)),
    ]


def in_run(arguments, folder, *more):
    """The same arguments with another run directory, and more of them."""
    arguments = list(arguments)
    arguments[arguments.index("--run.dir") + 1] = str(folder)
    return [*arguments, *more]


def fit(arguments, **environment):
    """Run fit in a process of its own; returns what it printed."""
    result = subprocess.run(
        command("fit", *arguments), capture_output=True, text=True, env=child_environment(**environment), cwd=ROOT
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def command(*arguments):
    """The command line of a verb."""
    return [sys.executable, "-m", "prism_lightning", *map(str, arguments)]


def child_environment(**extra):
    """A child's environment: one thread, the tests importable, a wide terminal."""
    path = os.pathsep.join([str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path, "COLUMNS": "120"} | extra
