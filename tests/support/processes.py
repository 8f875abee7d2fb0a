"""Verbs in processes of their own. They are forked from a server that has the imports done: 0.1 s in place of 8 s.

    out = fit([*tiny, "--trainer.max_steps", "4"])          # stdout; fails unless the exit code is 0
    result = run("validate", *arguments, DS_ACCELERATOR="cpu")  # a subprocess.CompletedProcess; keywords: environment
    child = start("fit", *arguments)                        # a Child, much like subprocess.Popen
    child.wait_for("step 10/")                              # until its stdout says so
    child.send_signal(signal.SIGTERM)
    assert child.wait() == 143 and "stopped by" in child.stderr

`before=function` is called in the child ahead of the command line, to break something there: a function of a module's
top level, or functools.partial of one. Ranks that torchrun would start are `ranks(2, "fit", *arguments)`.

A child differs from `python -m prism_lightning` in its imports alone: environment, working folder, standard streams,
signals and exit code are those of a new process. Where the start itself is tested, or CUDA is used, which does not
survive a fork, take `subprocess` with `command(...)` and `child_environment()`.
"""

import atexit
import functools
import multiprocessing
import multiprocessing.forkserver
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from support import forked
from support.runs import ROOT

TESTS = ROOT / "tests"
LIMIT = 600  # seconds that anything may take
_context = multiprocessing.get_context("forkserver")
_children: list["Child"] = []


def command(*arguments):
    """The command line of a verb, for `subprocess`."""
    return [sys.executable, "-m", "prism_lightning", *map(str, arguments)]


def child_environment(**extra):
    """A child's environment: one thread, the tests importable, a wide terminal."""
    path = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path, "COLUMNS": "120"} | extra


class Child:
    """A verb that runs in a process of its own, with its output in files."""

    def __init__(self, arguments, environment, before):
        self.arguments = [str(argument) for argument in arguments]
        stem = Path(_output_folder().name) / str(len(_children))
        self._files = stem.with_suffix(".out"), stem.with_suffix(".err")
        for path in self._files:
            path.touch()
        self._process = _context.Process(
            target=forked.main, args=(self.arguments, child_environment(**environment), self._files, before)
        )
        _start_server()
        self._process.start()
        self.pid = self._process.pid
        _children.append(self)

    @property
    def stdout(self):
        """What it has printed so far."""
        return self._files[0].read_text(encoding="utf-8", errors="replace")

    @property
    def stderr(self):
        """What it has printed so far on stderr."""
        return self._files[1].read_text(encoding="utf-8", errors="replace")

    @property
    def returncode(self):
        """The exit code, negative where a signal ended it, None while it runs."""
        return self._process.exitcode

    def poll(self):
        return self.returncode

    def wait(self, timeout=LIMIT):
        """Wait for the end; returns the exit code."""
        self._process.join(timeout)
        if self.returncode is None:
            self.kill()
            raise AssertionError(f"{self.arguments} still ran after {timeout} s\n{self.stdout}\n{self.stderr}")
        return self.returncode

    def wait_for(self, text, timeout=LIMIT):
        """Wait until stdout holds a text."""
        deadline = time.monotonic() + timeout
        while text not in self.stdout:
            running = self.poll() is None and time.monotonic() < deadline
            assert running or text in self.stdout, (text, self.returncode, self.stdout, self.stderr)
            time.sleep(0.002)

    def send_signal(self, number):
        """Send a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self):
        """Kill it and wait for the end."""
        self.send_signal(signal.SIGKILL)
        self._process.join()

    def result(self, timeout=LIMIT):
        """Wait for the end; returns exit code and output."""
        self.wait(timeout)
        return subprocess.CompletedProcess(self.arguments, self.returncode, self.stdout, self.stderr)


def start(*arguments, before=None, **environment):
    """Start a verb; returns the Child."""
    return Child(arguments, environment, before)


def run(*arguments, before=None, **environment):
    """Run a verb to its end; returns exit code, stdout and stderr."""
    return start(*arguments, before=before, **environment).result()


def fit(arguments, before=None, **environment):
    """Run fit; returns what it printed."""
    result = run("fit", *arguments, before=before, **environment)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def ranks(world_size, *arguments, **environment):
    """Run a verb as the ranks of one machine, started by us as torchrun would; returns what rank 0 printed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "tests", "GROUP_RANK": "0"}
    environment |= {"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size)}
    children = [start(*arguments, RANK=str(rank), LOCAL_RANK=str(rank), **environment) for rank in range(world_size)]
    while any(child.poll() is None for child in children):
        if any(child.poll() for child in children):  # the others would wait for the one that failed
            for child in children:
                child.kill()
        time.sleep(0.01)
    assert not any(child.returncode for child in children), [(c.returncode, c.stdout, c.stderr) for c in children]
    return children[0].stdout


def _start_server():
    """Start the server of this process, if it does not run yet."""
    _context.set_forkserver_preload(["support.preload"])
    before = os.environ.copy()
    os.environ.update(child_environment(PYTHONPATH=os.pathsep.join([str(TESTS), str(ROOT)])))
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)


@functools.cache
def _output_folder():
    return tempfile.TemporaryDirectory(prefix="prism-tests-")


@atexit.register
def _kill_what_is_left():
    for child in _children:
        if child.poll() is None:
            child.kill()
