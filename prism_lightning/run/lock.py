"""One `fit` at a time in a run directory."""

from __future__ import annotations

import os
import platform
import sys
import time
from pathlib import Path

import filelock

from prism_lightning.common.errors import UserError
from prism_lightning.common.files import read_json, write_json

WAIT_SECONDS = 5.0


def lock_run(folder: Path) -> filelock.BaseFileLock:
    """Take a run directory for this process; the lock ends with the process, also when it is killed.

    `lock` is the locked file. `lock.json` beside it says who holds it, for the error of the next one.

    Raises:
        UserError: another process has it, or the directory cannot be written.
    """
    # The workers of a killed process need a moment to notice that it is gone.
    lock = filelock.FileLock(folder / "lock", timeout=WAIT_SECONDS)
    holder = folder / "lock.json"
    try:
        lock.acquire()
    except OSError as error:
        if isinstance(error, filelock.Timeout):
            raise _in_use(folder, holder) from error
        raise UserError(f"{folder} cannot be locked ({error.strerror}): give yourself write access") from error
    facts = {
        "pid": os.getpid(),
        "host": platform.node(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        "command": sys.argv[1:],
    }
    write_json(holder, facts)
    return lock


def _in_use(folder: Path, holder: Path) -> UserError:
    facts = read_json(holder) or {}
    who = f"process {facts.get('pid', '?')} on {facts.get('host', '?')} since {facts.get('since', '?')}"
    return UserError(f"{folder} is in use by {who}: wait until it ends, stop it, or choose another --run.dir")
