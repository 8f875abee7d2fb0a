"""`suppress` killed with SIGKILL wherever it is: the same command goes on and writes the same file, and no other."""

import multiprocessing
import os
import shutil
import signal

import pytest
import torch

from prism_lightning.cli.main import main
from prism_lightning.common.progress import PhaseProgress

SMALL = ("--tokens", "8000", "--prompts", "20", "--new_tokens", "8", "--draws", "1")


def at_phase(phase):
    """Be killed when half of a phase is done."""

    def call(self, phase_name, done, total):
        if phase_name == phase and 2 * done >= total:
            os.kill(os.getpid(), signal.SIGKILL)

    PhaseProgress.__call__ = call


def at_file(part):
    """Be killed when a file was written aside and is not yet in its place."""
    replace = os.replace

    def killed(source, target):
        if part in str(target):
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)

    os.replace = killed


MOMENTS = [
    (at_file, "curvature.safetensors"),
    (at_phase, "removing prototypes one by one"),
    (at_phase, "scaling random prototypes"),
    (at_file, "interrupted.json"),
]


def prepared(moment, where, arguments):
    """What a process to be killed does."""
    torch.set_num_threads(1)
    moment(where)
    main(arguments)


def killed(moment, where, arguments):
    """Run the verb in a process of its own and see it killed."""
    context = multiprocessing.get_context("forkserver")  # its server has the imports done and no threads yet
    context.set_forkserver_preload(
        ["interventions.test_interrupted", "prism_lightning.interventions.suppression.experiment"]
    )
    child = context.Process(target=prepared, args=(moment, where, arguments))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL


def test_the_same_command_goes_on_after_a_kill_and_writes_the_same_file(run, cli, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(run, folder, ignore=shutil.ignore_patterns("prototypes", "interventions"))
    arguments = ["suppress", "--ckpt_path", str(folder), "--words", "(", "--name", "interrupted", *SMALL]
    cli(*arguments, check=0)
    out = folder / "interventions" / "interrupted.json"
    expected, written = out.read_bytes(), sorted(path.name for path in out.parent.iterdir())
    index = {path.name: path.read_bytes() for path in (folder / "prototypes").rglob("*.safetensors")}
    shutil.rmtree(folder / "interventions")
    shutil.rmtree(folder / "prototypes")
    for moment, where in MOMENTS:
        killed(moment, where, arguments)
        assert not out.exists()
    cli(*arguments, check=0)
    assert out.read_bytes() == expected
    assert sorted(path.name for path in out.parent.iterdir()) == written
    assert {path.name: path.read_bytes() for path in (folder / "prototypes").rglob("*.safetensors")} == index
    assert not list((folder / "prototypes").rglob("*.partial"))


def test_a_half_built_index_of_another_model_is_built_anew(run, cli, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(run, folder, ignore=shutil.ignore_patterns("prototypes", "interventions"))
    killed(at_file, "curvature.safetensors", ["prototypes", "--ckpt_path", str(folder)])
    settings = folder / "prototypes" / "settings.json"
    model = settings.read_text().split('"model": "')[1].split('"')[0]
    settings.write_text(settings.read_text().replace(model, "0" * len(model)))
    cli("prototypes", "--ckpt_path", folder, check=0)
    assert model in settings.read_text()


@pytest.mark.parametrize("place", [0, 1])
def test_progress_reaches_its_end_in_every_phase(run, cli, monkeypatch, place):
    """And never goes back within a phase."""
    seen = []
    monkeypatch.setattr(PhaseProgress, "__call__", lambda self, *call: seen.append(call))
    options = (("--words", "("), ("--id", "3", "--words", "("))[place]
    cli("suppress", "--ckpt_path", run, *options, "--name", f"progress{place}", *SMALL, check=0)
    phases = [call for call, following in zip(seen, [*seen[1:], ("", 0, 0)], strict=True) if call[0] != following[0]]
    assert all(done == total for _, done, total in phases)
    assert {phase for phase, *_ in phases} >= {
        "reading held-out texts",
        "continuing prompts",
        "removing prototypes one by one",
        "choosing the number of prototypes",
        "comparing on other prompts",
        "choosing the words' bias",
        "scaling random prototypes",
    }
    pairs = [(a, b) for a, b in zip(seen, seen[1:], strict=False) if a[0] == b[0] and a[1] < a[2]]
    assert pairs and all(before[1] < after[1] for before, after in pairs)
