"""Prepared data as they were written: a manifest with the size and checksum of every file, checked before use."""

from __future__ import annotations

import json
import sys
import zlib
from pathlib import Path
from typing import Any

from prism_lightning.common.errors import UserError
from prism_lightning.common.files import file_facts, mismatch, write_json

FORMAT = 2  # raise when the files change meaning: older data are then prepared anew
SPLITS = ("train", "validation")
TOKEN_BYTES = {"uint16": 2, "uint32": 4}
COUNTS = ("tokens", "documents", "bytes", "max_id")
FILES = (
    "tokenizer/tokenizer.json",
    *(f"{split}/{name}" for split in SPLITS for name in ("tokens.bin", "documents.arrow")),
)
LARGEST_COUNT = 2**62
SAID_BYTES = 10 * 2**30  # of data whose check takes so long that a line says so
CHECKSUM_RATE = 1.0e9  # bytes a second on a busy machine; a free core of an AMD EPYC reaches 2.5e9

_checked: set[tuple[Any, ...]] = set()  # states of folders whose checksums this process has compared


class DamagedDataError(UserError):
    """Prepared data that are not what was written. `damage` says what is wrong, without the folder."""

    def __init__(self, folder: Path, damage: str) -> None:
        self.damage = damage
        super().__init__(
            f"prepared data {folder} are damaged: {damage}; run the `fit` or `index` that made them again: it prepares"
            " them anew"
        )


def write_manifest(folder: Path, facts: dict[str, Any]) -> None:
    """Write manifest.json: the given facts, the size and checksum of every file of the folder, and its own checksum.

    Raises:
        OSError, UserError: the disk does not take it.
    """
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    content = {"format": FORMAT} | facts | {"files": {name: file_facts(folder / name) for name in names}}
    write_json(folder / "manifest.json", content | {"crc32": _content_checksum(content)})


def read_prepared(folder: Path, checksums: bool) -> dict[str, Any]:
    """The manifest of prepared data whose files have the right sizes and, if asked, checksums.

    Checksums are compared once in a process, unless a file's time of change says that it was written since.

    Raises:
        DamagedDataError: something is missing, or is not what was written.
        UserError: something cannot be read.
    """
    try:
        manifest = _manifest(folder)
        for name, facts in manifest["files"].items():
            if problem := mismatch(folder / name, facts, checksum=False):
                raise DamagedDataError(folder, f"{name} {problem}")
        if checksums:
            _compare_checksums(folder, manifest["files"])
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(
            f"prepared data {folder} cannot be read ({reason}): give yourself read access or set another data.cache_dir"
        ) from error
    return manifest


def _compare_checksums(folder: Path, files: dict[str, dict[str, int]]) -> None:
    state = (folder.resolve(), *((name, (folder / name).stat().st_mtime_ns, *files[name].values()) for name in files))
    if state in _checked:
        return
    size = sum(facts["bytes"] for facts in files.values())
    if size > SAID_BYTES:
        seconds = size / CHECKSUM_RATE
        print(f"comparing checksums of {size / 1e9:.0f} GB of data, about {seconds:.0f} s", file=sys.stderr, flush=True)
    for name, facts in files.items():
        if problem := mismatch(folder / name, facts):
            raise DamagedDataError(folder, f"{name} {problem}")
    _checked.add(state)


def _manifest(folder: Path) -> dict[str, Any]:
    """The content of manifest.json, its types and ranges checked."""
    try:
        text = (folder / "manifest.json").read_bytes()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise DamagedDataError(folder, "manifest.json is missing") from error
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DamagedDataError(folder, "manifest.json is not JSON" if text else "manifest.json is empty") from error
    if problem := _content_error(content):
        raise DamagedDataError(folder, f"manifest.json {problem}")
    return content


def _content_error(content: Any) -> str | None:
    """What is wrong with the content of a manifest, in words."""
    if not isinstance(content, dict):
        return "is no object"
    if not _is_count(content.get("format")) or content["format"] != FORMAT:
        return f"has format {content.get('format')!r}, this version reads {FORMAT}"
    kinds = {"fingerprint": str, "inputs": dict, "files": dict, "dtype": str} | dict.fromkeys(SPLITS, dict)
    for name, kind in kinds.items():
        if not isinstance(content.get(name), kind):
            return f"has no proper {name!r}"
    if not _is_count(content.get("tokenizer_size")) or content["dtype"] not in TOKEN_BYTES:
        return "has no proper 'tokenizer_size' or 'dtype'"
    return (
        _files_error(content["files"])
        or next(filter(None, (_split_error(content, split) for split in SPLITS)), None)
        or _checksum_error(content)
    )


def _files_error(files: dict[str, Any]) -> str | None:
    for name in FILES:
        if name not in files:
            return f"does not list {name}"
    for name, facts in files.items():
        proper = isinstance(facts, dict) and _is_count(facts.get("bytes")) and _is_count(facts.get("crc32"))
        if not proper or (name not in FILES and not _in_tokenizer(name)):
            return f"lists {name!r} wrongly"
    return None


def _in_tokenizer(name: str) -> bool:
    """Chat templates lie in a folder of their own there."""
    parts = Path(name).parts
    return parts[0] == "tokenizer" and ".." not in parts


def _split_error(content: dict[str, Any], split: str) -> str | None:
    counts = content[split]
    for name in COUNTS:
        if not _is_count(counts.get(name)):
            return f"has {split}.{name} {str(counts.get(name))[:40]!r}, no whole number from 0"
    size = content["files"][f"{split}/tokens.bin"]["bytes"]
    if counts["tokens"] * TOKEN_BYTES[content["dtype"]] != size:
        return f"has {split}.tokens {counts['tokens']}, which do not fill {size} bytes"
    if counts["documents"] > counts["tokens"] or counts["max_id"] >= content["tokenizer_size"]:
        return f"has {split}.documents or {split}.max_id out of range"
    return None


def _checksum_error(content: dict[str, Any]) -> str | None:
    rest = {name: value for name, value in content.items() if name != "crc32"}
    return None if content.get("crc32") == _content_checksum(rest) else "does not match its checksum"


def _content_checksum(content: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < LARGEST_COUNT
