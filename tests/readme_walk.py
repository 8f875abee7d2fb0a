"""Run every command of the README in order, as a user would: the README's install line and nothing else.

python tests/readme_walk.py [--full]

The commands on the quickstart run at the top of docs/cli.md follow.

Standard library only, since the environment holds no test tools. Training, indexing and suppression are shortened
unless --full is given. Prints the seconds of each command; exits 1 where one fails.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
TASKS = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README + TASKS, flags=re.S)
PROGRAM = "python -m prism_lightning "
FIT = [
    *("--trainer.max_steps", "12", "--trainer.val_check_interval", "12", "--model.placement_step", "4"),
    *("--model.polish_steps", "5", "--model.polish_tokens", "8192", "--data.validation_blocks", "8"),
]
DATA = ["--data.max_tokens", "400000"]
SHORTER = {
    "fit": [*FIT, *DATA],
    "validate": [*FIT, *DATA],
    "predict": [*FIT, *DATA],
    "index": [*FIT, *DATA, "--index.fit_steps", "2"],
    "curvature": ["--tokens", "8192", "--sample", "200"],
    "suppress": ["--tokens", "100000", "--prompts", "40", "--draws", "1"],
    "evaluate": ["--limit", "10"],
}


def commands() -> list[str]:
    """Return the program's commands, each once: every line of the bash blocks that starts it."""
    lines = [line for language, block in BLOCKS if language == "bash" for line in block.splitlines()]
    return [line for line in dict.fromkeys(lines) if line.startswith(PROGRAM)]


def arguments(command: str, full: bool) -> list[str]:
    """Return what to start for a command of the README."""
    words = shlex.split(command)[3:]
    shorter = [] if full else SHORTER.get(words[0], [])
    prints_only = {"--help", "--print_config"} & set(words)
    return [sys.executable, "-m", "prism_lightning", *words, *([] if prints_only else shorter)]


def run(words: list[str], folder: Path, name: str) -> bool:
    """Return whether a command succeeds; print its seconds and, where it fails, what it printed."""
    started = time.monotonic()
    result = subprocess.run(words, cwd=folder, capture_output=True, text=True, encoding="utf-8", errors="replace")
    print(f"{time.monotonic() - started:7.1f} s  {name}", flush=True)
    if result.returncode:
        print(f"exit code {result.returncode}\n{result.stdout[-3000:]}\n{result.stderr[-3000:]}", flush=True)
    return result.returncode == 0


def main() -> int:
    """Walk through the README and return the exit code."""
    full = "--full" in sys.argv[1:]
    failed = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part in ("recipes", "evals", "benchmarks"):
            os.symlink(ROOT / part, folder / part)
        steps = [(command, arguments(command, full)) for command in commands()]
        steps += [("prism --version", [str(Path(sys.executable).with_name("prism")), "--version"])]
        python = [block for language, block in BLOCKS if language == "python"]
        steps += [(f"Python example {number}", [sys.executable, "-c", code]) for number, code in enumerate(python, 1)]
        for command, words in steps:
            if not run(words, folder, command):
                failed.append(command)
    print(f"{len(steps) - len(failed)} passed, {len(failed)} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
