"""Files given by paths, folders and globs."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator
from pathlib import Path

from prism_lightning.common.errors import UserError
from prism_lightning.data.sources.registry import holds_no_text


def files_of(patterns: list[str], setting: str) -> tuple[list[Path], list[Path]]:
    """Return the files that patterns name, each once, and the files in folders that hold no text.

    A folder stands for the text files below it, sorted, without hidden ones. A name that exists is not taken as a glob.

    Raises:
        UserError: a pattern names no file.
    """
    files: dict[Path, None] = {}
    unread: dict[Path, None] = {}
    for pattern in patterns:
        path = Path(pattern).expanduser()
        try:
            matches = sorted(_files_below(path)) if path.is_dir() else [path] if path.is_file() else _matches(path)
        except OSError as error:
            raise UserError(f"{setting} {pattern}: {error.strerror}; give a path that can be read") from error
        if path.is_dir():
            unread |= dict.fromkeys(file for file in matches if holds_no_text(file, setting))
            matches = [file for file in matches if file not in unread]
        if not matches:
            problem = "no text files beneath this folder" if path.is_dir() else "no such file"
            raise UserError(f"{setting} {pattern}: {problem}; give a file, a folder or a glob")
        files |= dict.fromkeys(matches)
    return list(files), list(unread)


def _files_below(folder: Path) -> Iterator[Path]:
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(parent, name) for name in names if not name.startswith(".") and Path(parent, name).is_file())


def _matches(pattern: Path) -> list[Path]:
    """Return the files that match a glob; leading folders that exist are taken by name, including brackets."""
    folder, rest = Path(pattern.anchor), list(pattern.parts[1:] if pattern.anchor else pattern.parts)
    while rest and (folder / rest[0]).exists():
        folder /= rest.pop(0)
    head = "" if folder == Path() else glob.escape(str(folder))
    tail = os.path.join(*rest) if rest else ""
    for candidate in (tail, tail.replace("[", "[[]")):  # A bracket after a star may be part of a name, too.
        matches = (Path(match) for match in glob.glob(os.path.join(head, candidate), recursive=True))
        files = sorted(path for path in matches if path.is_file())
        if files:
            return files
    return []
