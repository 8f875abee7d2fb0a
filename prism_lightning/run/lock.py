"""The lock that lets only one `fit` at a time use a run directory."""

from __future__ import annotations

import os
import platform
import sys
import time
from typing import TYPE_CHECKING

import filelock

from prism_lightning.common.errors import UserError
from prism_lightning.common.files import read_json, write_json

if TYPE_CHECKING:
    from prism_lightning.run.directory import RunPaths

WAIT_SECONDS = 5.0  # the loader processes of a killed `fit` need a moment to end and to release its lock


def lock_run(paths: RunPaths) -> filelock.BaseFileLock:
    """Lock a run directory for this process and return the lock, which ends with the process, also after a kill.

    The lock's holder is recorded in a file beside it, for the error message of the next process.

    Raises:
        UserError: another process holds the lock after `WAIT_SECONDS`, or the directory cannot be written.
    """
    lock = filelock.FileLock(paths.lock, timeout=WAIT_SECONDS)
    try:
        lock.acquire()
    except OSError as error:
        if isinstance(error, filelock.Timeout):
            raise _in_use(paths) from error
        raise UserError(f"{paths.root} cannot be locked ({error.strerror}): give yourself write access") from error
    holder = {
        "pid": os.getpid(),
        "host": platform.node(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        "command": sys.argv[1:],
    }
    write_json(paths.lock_holder, holder)
    return lock


def _in_use(paths: RunPaths) -> UserError:
    holder = read_json(paths.lock_holder) or {}
    process = f"process {holder.get('pid', '?')} on {holder.get('host', '?')} since {holder.get('since', '?')}"
    return UserError(f"{paths.root} is in use by {process}: wait until it ends, stop it, or choose another --run.dir")
