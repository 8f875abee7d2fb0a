"""Shared fixtures: small models, a small real corpus, and the command line as a user calls it."""

import gc
import os
import signal
import subprocess
from pathlib import Path

import filelock
import hypothesis
import pytest
import torch
from support.mlflow_template import VARIABLE as MLFLOW_TEMPLATE
from support.mlflow_template import use_template
from support.processes import fit
from support.runs import BACKBONES, ROOT, tiny_arguments

# Files that take the longest, longest first: started last, one of them would run alone while the other core idles.
LONGEST = [
    "benchmarks/test_smoke.py",
    "sweeps/test_running.py",
    "training/test_strategies.py",
    "training/test_resume.py",
]


def pytest_configure():
    """What a shell or a busy machine would change.

    A suite that was started in the background ignores Ctrl-C; tests of interrupts expect Python's own way.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # A busy machine would break a deadline of 0.2 s an example.
    hypothesis.settings.register_profile("suite", deadline=None)
    hypothesis.settings.load_profile("suite")


def pytest_collection_modifyitems(items):
    """Long files first; the order within a file stays."""
    ranks = {ROOT / "tests" / name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: ranks.get(item.path, len(ranks)))


def pytest_collection_finish():
    """What is imported by now stays: no later collection of garbage needs to walk it, 0.4 s each time."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """`-n 2` hands out whole files, in the order above: their fixtures are made once."""
    from xdist.scheduler import LoadFileScheduling

    config.option.loadscopereorder = False
    return LoadFileScheduling(config, log)


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


@pytest.fixture
def byte_tokenizer():
    """A byte-level tokenizer of 257 tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["<|endoftext|>", *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")


@pytest.fixture(scope="session")
def shared(tmp_path_factory):
    """A folder for what is made once: of all workers of pytest-xdist, where they run."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session", autouse=True)
def _mlflow_template(shared):
    """MLflow's migrations run once."""
    os.environ[MLFLOW_TEMPLATE] = str(shared / "mlflow.db")
    use_template()
    yield
    del os.environ[MLFLOW_TEMPLATE]


@pytest.fixture(scope="session")
def corpus(shared):
    """Forty modules of the standard library as text files: real text, in seconds."""
    import sysconfig

    folder = shared / "corpus"
    with filelock.FileLock(shared / "corpus.lock"):
        if not folder.is_dir():
            partial = shared / "corpus.partial"
            partial.mkdir()
            sources = Path(sysconfig.get_paths()["stdlib"]).glob("*.py")
            for path in sorted(p for p in sources if 4_000 < p.stat().st_size < 30_000)[:40]:
                (partial / f"{path.stem}.txt").write_bytes(path.read_bytes())
            partial.rename(folder)
    return folder


@pytest.fixture(scope="session")
def cache(shared):
    """One data cache for the whole session."""
    folder = shared / "cache"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def finished_run(shared, corpus, cache):
    """A finished tiny run, made once: its folder, arguments and output. Tests read it only."""
    arguments = tiny_arguments(shared / "finished" / "run", corpus, cache)
    output = shared / "finished.out"
    with filelock.FileLock(shared / "finished.lock"):
        if not output.is_file():
            output.write_text(fit(arguments))
    return shared / "finished" / "run", arguments, output.read_text()


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
    from prism_lightning.cli.main import main

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
