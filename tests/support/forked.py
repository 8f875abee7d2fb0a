"""What a process that was forked from the tests' fork server does: it becomes `python -m prism_lightning ...`."""

import importlib.util
import multiprocessing
import os
import signal
import sys

from support.runs import ROOT


def main(arguments, environment, files, before=None):
    """Run a command line with its output in two files; exits with its code.

    Args:
        arguments: of the command line.
        environment: all of it.
        files: paths of stdout and stderr.
        before: called ahead of the command line.
    """
    _take_over(environment, files)
    sys.argv = [str(ROOT / "prism_lightning" / "__main__.py"), *arguments]
    # Lightning starts further ranks from this name.
    sys.modules["__main__"].__spec__ = importlib.util.find_spec("prism_lightning.__main__")

    import torch
    from lightning.fabric.utilities.rank_zero import _get_rank, rank_zero_only

    from prism_lightning.cli.main import main as prism
    from support.mlflow_template import use_template

    rank_zero_only.rank = _get_rank() or 0  # Lightning reads it from the environment when it is imported
    torch.set_num_threads(1)
    use_template()
    try:
        if before is not None:
            before()
        sys.exit(prism(arguments))
    finally:
        sys.stdout.flush()


def _take_over(environment, files):
    """Streams, environment, folder and signals of a new process."""
    for descriptor, path in zip((1, 2), files, strict=True):
        opened = os.open(path, os.O_WRONLY | os.O_APPEND)
        os.dup2(opened, descriptor)
        os.close(opened)
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", buffering=1, closefd=False)  # noqa: SIM115
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    # A suite started in the background ignores interrupts, and so would its children.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    multiprocessing.set_start_method(None, force=True)
