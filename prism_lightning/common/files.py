"""Files that are written whole or not at all; tensors with checksums, read by memory mapping. Needs numpy only."""

from __future__ import annotations

import json
import os
import reprlib
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from prism_lightning.common.errors import UserError, disk_is_full
from prism_lightning.common.json_text import as_json

TYPES = {"F64": "f8", "F32": "f4", "F16": "f2", "I8": "i1", "U16": "u2", "U32": "u4", "I64": "i8", "U8": "u1"}
READ_BYTES = 2**22
CHECKSUMS = "checksums.json"


def write_file(path: Path, tensors: dict[str, np.ndarray], **facts: Any) -> None:
    """Write tensors as safetensors, then a .json beside them with the checksum, the size and the facts.

    Raises:
        UserError: the file cannot be written. An earlier file stays unchanged.
    """
    content = save({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()})
    facts = {"bytes": len(content), "crc32": zlib.crc32(content)} | facts
    write_whole(path, content, before=path.with_suffix(".json"))
    write_json(path.with_suffix(".json"), facts)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file in the format of `as_json`, whole or not at all; raises as `write_file` does."""
    write_whole(path, as_json(content, indent=1).encode())


def write_whole(path: Path, content: bytes, before: Path | None = None) -> None:
    """Write a file, whole or not at all; raises as `write_file` does.

    Args:
        path: of the file.
        content: of the file.
        before: a file that is removed first; a new file must never stand beside the old one's checksum.
    """
    try:
        if before:
            before.unlink(missing_ok=True)
        # Processes that write the same file at the same time must not share a partial one.
        with partial_file(path, f".{os.getpid()}.partial") as partial, partial.open("wb") as file:
            file.write(content)
    except OSError as error:
        reason = "the disk is full" if disk_is_full(error) else error.strerror
        raise UserError(
            f"{path} could not be written ({reason}): free space and run the same command; what is finished is kept"
        ) from error


@contextmanager
def partial_file(path: Path, suffix: str = ".partial") -> Iterator[Path]:
    """Yield the path of a partial file beside `path`, and rename it to `path` once the block has written it.

    A kill leaves the old file, or the new one, whole. A block that fails leaves no partial file.

    Raises:
        OSError: the partial file cannot be removed, flushed to the disk or renamed.
    """
    partial = path.with_name(path.name + suffix)
    partial.unlink(missing_ok=True)  # of a process that was killed
    try:
        yield partial
        descriptor = os.open(partial, os.O_RDONLY)
        try:
            os.fsync(descriptor)  # the content must be on the disk before the name
        finally:
            os.close(descriptor)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


@contextmanager
def partial_folder(folder: Path) -> Iterator[Path]:
    """Yield the path of a partial folder beside `folder`, and rename it to `folder` once the block has filled it.

    The block makes the folder. A kill leaves the old folder, none, or the new one, whole. A block that fails leaves no
    partial folder.

    Raises:
        OSError: a folder cannot be removed or renamed.
    """
    partial = folder.with_name(f"{folder.name}.partial")
    remove(partial)  # of a process that was killed
    try:
        yield partial
        remove(folder)
        os.rename(partial, folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def remove(path: Path) -> None:
    """Remove a file, a link or a folder with everything in it, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def read_json(path: Path) -> dict[str, Any] | None:
    """Return the JSON object in a file; None where the file is missing or damaged.

    Raises:
        UserError: the file exists and cannot be read.
    """
    try:
        content = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, ValueError, RecursionError):
        return None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    return content if isinstance(content, dict) else None


def integrity_error(path: Path) -> str | None:
    """Return what is wrong with a file of an index, in words; None where its bytes are those that were written."""
    facts = read_json(path.with_suffix(".json"))
    if facts is None or not path.is_file():
        return "is missing"
    return mismatch(path, facts)


def file_facts(path: Path) -> dict[str, int]:
    """Return the size and the checksum of a file, as `mismatch` compares them."""
    return {"bytes": path.stat().st_size, "crc32": _checksum(path)}


def mismatch(path: Path, facts: dict[str, Any], checksum: bool = True) -> str | None:
    """Return what differs between a file and its facts, in words; None where nothing does.

    Args:
        path: of the file.
        facts: from `file_facts`.
        checksum: compare the checksum as well as the size.

    Raises:
        OSError: the file cannot be read.
    """
    if not path.is_file():
        return "is missing"
    size, written_size = path.stat().st_size, facts.get("bytes")
    if size != written_size:
        return f"has {size} of {reprlib.repr(written_size)} bytes"
    return "does not match its checksum" if checksum and _checksum(path) != facts.get("crc32") else None


def write_checksums(folder: Path) -> None:
    """Write checksums.json, the facts of every other file of a folder; raises as `write_file` does."""
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.name != CHECKSUMS)
    write_json(folder / CHECKSUMS, {path.name: file_facts(path) for path in files})


def folder_integrity_error(folder: Path) -> str | None:
    """Return what differs between a folder's files and its checksums.json, in words; None if nothing, or without it."""
    path = folder / CHECKSUMS
    if not path.exists():
        return None
    checksums = read_json(path)
    if not isinstance(checksums, dict):
        return f"{path} is damaged"
    for name, facts in checksums.items():
        if not isinstance(facts, dict) or not facts.keys() >= {"bytes", "crc32"}:
            return f"{path} is damaged"
        if problem := mismatch(folder / name, facts):
            return f"{folder / name} {problem}"
    return None


def _checksum(path: Path) -> int:
    """Return the CRC-32 of a file."""
    checksum = 0
    with path.open("rb") as file:
        while part := file.read(READ_BYTES):
            checksum = zlib.crc32(part, checksum)
    return checksum


def map_file(path: Path) -> dict[str, np.ndarray]:
    """Return the tensors of a safetensors file as read-only memory maps.

    Raises:
        UserError: the file is missing, damaged or truncated.
    """
    try:
        with path.open("rb") as file:
            length, size = int.from_bytes(file.read(8), "little"), path.stat().st_size
            if length > size - 8:
                raise ValueError(f"its header has {length} bytes, the file {size}")
            header = json.loads(file.read(length))
        return _mapped(path, header, size - 8 - length)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"{type(error).__name__}: {str(error)[:80]}"
        raise UserError(f"{path} cannot be read ({reason}): run the command that wrote it again") from error


def _mapped(path: Path, header: dict[str, Any], size: int) -> dict[str, np.ndarray]:
    entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
    if not entries:
        raise ValueError("it holds no tensors")
    if size != max(entry["data_offsets"][1] for entry in entries.values()):
        raise ValueError("it is truncated or longer than its tensors")
    # A file whose tensors are all empty has nothing to map.
    content = np.empty(0, np.uint8)
    if size:
        content = np.memmap(path, dtype=np.uint8, mode="r", offset=path.stat().st_size - size)
    return {
        name: np.asarray(content[slice(*entry["data_offsets"])]).view(TYPES[entry["dtype"]]).reshape(entry["shape"])
        for name, entry in entries.items()
    }
