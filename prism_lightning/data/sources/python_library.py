"""The standard library of the Python that runs, as documents."""

from __future__ import annotations

import sys
import sysconfig
import tokenize
from collections.abc import Iterator
from pathlib import Path

from prism_lightning.common.errors import UserError
from prism_lightning.data.sources.local import file_digest
from prism_lightning.data.sources.registry import unreadable
from prism_lightning.data.sources.source import Document, Source

# Not part of what a library reader would read, and absent from some installations.
STANDARD_LIBRARY_SKIPS = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idle_test",
    "idlelib",
    "lib2to3",
    "__pycache__",
}
SETTING = "the standard library"


def standard_library() -> Source:
    """The source files of the Python that runs: real text on every machine, nothing to download."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [
        path
        for path in sorted(root.rglob("*.py"))
        if not STANDARD_LIBRARY_SKIPS.intersection(path.relative_to(root).parts)
    ]
    if not files:
        raise UserError(f"this Python has no standard library sources under {root}: give data.path or data.dataset")

    def records() -> Iterator[Document]:
        for path in files:
            try:
                with tokenize.open(path) as file:  # honours the coding cookie of each file
                    text = file.read()
            except (SyntaxError, UnicodeDecodeError):
                continue  # a deliberately broken sample; the library's own modules all read
            except OSError as error:
                raise unreadable(path, error, SETTING) from error
            key = path.relative_to(root).as_posix()
            yield Document(text, key, key)

    digests = {path.relative_to(root).as_posix(): file_digest(path, SETTING) for path in files}
    return Source({"standard_library": sys.version, "files": digests}, records)
