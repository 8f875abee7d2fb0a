"""The standard library of the running Python as documents."""

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

# These are tests and third-party packages, or are absent from some installations.
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
    """Return the source files of the running Python as a source: real text on every machine without a download.

    Raises:
        UserError: this Python has no source files, or one of them cannot be read.
    """
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
                with tokenize.open(path) as file:  # applies the encoding that the file declares
                    text = file.read()
            except (SyntaxError, UnicodeDecodeError):
                continue  # A deliberately invalid sample; all modules of the library are readable.
            except OSError as error:
                raise unreadable(path, error, SETTING) from error
            key = path.relative_to(root).as_posix()
            yield Document(text, key, key)

    digests = {path.relative_to(root).as_posix(): file_digest(path, SETTING) for path in files}
    return Source({"standard_library": sys.version, "files": digests}, records)
