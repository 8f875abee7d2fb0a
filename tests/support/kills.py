"""Processes that kill themselves with SIGKILL at a named place, and what they leave behind.

Functions of this module are given to `support.processes` as `before=partial(...)`.
"""

import os
import signal
from functools import reduce
from importlib import import_module
from pathlib import Path


def at_call(target, call, when):
    """Let a function, given as module:name, kill its process at a call, "before" or "after" it does its work."""
    module, _, names = target.partition(":")
    *path, name = names.split(".")
    owner = reduce(getattr, path, import_module(module))
    function, calls = getattr(owner, name), 0

    def deadly(*arguments, **settings):
        nonlocal calls
        calls += 1
        if calls == call and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        result = function(*arguments, **settings)
        if calls == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, deadly)


def at_phase(phase, share=0.5):
    """Be killed when a share of a phase is done."""
    from prism_lightning.common.progress import PhaseProgress

    def call(self, phase_name, done, total):
        if phase_name == phase and done >= share * total:
            os.kill(os.getpid(), signal.SIGKILL)

    PhaseProgress.__call__ = call


def contents(folder, *left_out):
    """The bytes of every file of a folder, by its name, without locks and names that end in `left_out`."""
    files = [path for path in sorted(Path(folder).rglob("*")) if path.is_file()]
    names = {path.relative_to(folder).as_posix(): path for path in files}
    return {n: p.read_bytes() for n, p in names.items() if "lock" not in n and not n.endswith(left_out or ("\0",))}
