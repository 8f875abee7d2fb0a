"""One `fit` at a time in a run directory."""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from pathlib import Path

import filelock

from prism_lightning.common.files import read_json
from prism_lightning.errors import UserError


def lock_run(folder: Path) -> filelock.BaseFileLock:
    """Take a run directory for this process; the lock ends with the process, also when it is killed.

    `lock` is the locked file. `lock.json` beside it says who holds it, for the error of the next one.

    Raises:
        UserError: another process has it.
    """
    lock = filelock.FileLock(folder / "lock", timeout=0)
    holder = folder / "lock.json"
    try:
        lock.acquire()
    except filelock.Timeout as error:
        facts = read_json(holder) or {}
        who = f"process {facts.get('pid', '?')} on {facts.get('host', '?')} since {facts.get('since', '?')}"
        raise UserError(
            f"{folder} is in use by {who}: wait until it ends, stop it, or choose another --run.dir"
        ) from error
    facts = {
        "pid": os.getpid(),
        "host": platform.node(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        "command": sys.argv[1:],
    }
    holder.write_text(json.dumps(facts))
    return lock
