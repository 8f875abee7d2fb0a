"""Integrity of prepared data: a manifest has the size and checksum of every file, and is checked before use."""

from __future__ import annotations

import json
import sys
import zlib
from pathlib import Path
from typing import Any

from prism_lightning.common.errors import UserError
from prism_lightning.common.files import file_facts, mismatch, write_json
from prism_lightning.common.manifests import mapping, mapping_of, one_of, optional, problem_in, text, whole

FORMAT = 2  # Raise it when the files change meaning: older data are then prepared anew.
SPLITS = ("train", "validation")
TARGETS = "targets.bin"  # one byte per token, 1 for a target; only of data with masked targets
TOKEN_BYTES = {"uint16": 2, "uint32": 4}
FILES = (
    "tokenizer/tokenizer.json",
    *(f"{split}/{name}" for split in SPLITS for name in ("tokens.bin", "documents.arrow")),
)
MASKS = tuple(f"{split}/{TARGETS}" for split in SPLITS)
COUNTS = mapping(
    {name: whole() for name in ("tokens", "documents", "bytes", "max_id")} | {"targets": optional(whole())}
)
FILE_FACTS = mapping({"bytes": whole(), "crc32": whole()})
FIELDS = {
    "format": one_of(FORMAT),
    "fingerprint": text(),
    "inputs": mapping({}),
    "dtype": one_of(*TOKEN_BYTES),
    "tokenizer_size": whole(),
    "files": mapping({name: FILE_FACTS for name in FILES}),
} | dict.fromkeys(SPLITS, COUNTS)
LARGE_BYTES = 10 * 2**30  # Checking more data than this takes so long that a line is printed.
CHECKSUM_RATE = 1.0e9  # bytes per second on a busy machine; a free core of an AMD EPYC reaches 2.5e9

_verified_states: set[tuple[Any, ...]] = set()  # states of folders whose checksums this process has compared


class DamagedDataError(UserError):
    """Prepared data differ from what was written.

    Attributes:
        damage: what is wrong, without the name of the folder.
    """

    def __init__(self, folder: Path, damage: str) -> None:
        self.damage = damage
        super().__init__(
            f"prepared data {folder} are damaged: {damage}; run the `fit` or `index` that made them again: it prepares"
            " them anew"
        )


def write_manifest(folder: Path, facts: dict[str, Any]) -> None:
    """Write manifest.json: the facts, the size and checksum of every file in the folder, and a checksum of itself.

    Raises:
        OSError, UserError: the disk is full or cannot be written.
    """
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    content = {"format": FORMAT} | facts | {"files": {name: file_facts(folder / name) for name in names}}
    write_json(folder / "manifest.json", content | {"crc32": _content_checksum(content)})


def read_prepared(folder: Path, checksums: bool) -> dict[str, Any]:
    """Return the manifest of a prepared folder after comparing the sizes of its files.

    Args:
        folder: of the prepared data.
        checksums: also compare the files' checksums. A process does this once for each folder, and again after a
            file's modification time has changed.

    Raises:
        DamagedDataError: a file or an entry of the manifest is missing, or differs from what was written.
        UserError: a file cannot be read.
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
    if state in _verified_states:
        return
    size = sum(facts["bytes"] for facts in files.values())
    if size > LARGE_BYTES:
        seconds = size / CHECKSUM_RATE
        print(f"comparing checksums of {size / 1e9:.0f} GB of data, about {seconds:.0f} s", file=sys.stderr, flush=True)
    for name, facts in files.items():
        if problem := mismatch(folder / name, facts):
            raise DamagedDataError(folder, f"{name} {problem}")
    _verified_states.add(state)


def _manifest(folder: Path) -> dict[str, Any]:
    """Return the content of manifest.json after checking its types, ranges and checksum."""
    try:
        content_bytes = (folder / "manifest.json").read_bytes()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise DamagedDataError(folder, "manifest.json is missing") from error
    try:
        content = json.loads(content_bytes)
    except (ValueError, RecursionError) as error:
        problem = "is not JSON" if content_bytes else "is empty"
        raise DamagedDataError(folder, f"manifest.json {problem}") from error
    if content_problem := _content_problem(content):
        raise DamagedDataError(folder, f"manifest.json: {content_problem}")
    return content


def _content_problem(content: Any) -> str | None:
    """Return what is wrong with the content of a manifest, in words; None where nothing is."""
    if problem := problem_in(content, FIELDS) or problem_in(content, {"files": mapping_of(FILE_FACTS)}):
        return problem
    for name in content["files"]:
        if name not in (*FILES, *MASKS) and not _is_tokenizer_file(name):
            return f"files lists {name!r}, which is no file of prepared data"
    for split in SPLITS:
        if problem := _split_problem(content, split):
            return problem
    rest = {name: value for name, value in content.items() if name != "crc32"}
    return None if content.get("crc32") == _content_checksum(rest) else "its content does not match its checksum"


def _is_tokenizer_file(name: str) -> bool:
    # A folder below that of the tokenizer may hold chat templates.
    parts = Path(name).parts
    return parts[:1] == ("tokenizer",) and ".." not in parts


def _split_problem(content: dict[str, Any], split: str) -> str | None:
    counts, size = content[split], content["files"][f"{split}/tokens.bin"]["bytes"]
    if counts["tokens"] * TOKEN_BYTES[content["dtype"]] != size:
        return f"{split}.tokens is {counts['tokens']}, but the tokens take {size} bytes"
    flags = content["files"].get(f"{split}/{TARGETS}")
    if (flags is None) != ("targets" not in counts):
        return f"{split}.targets and {split}/{TARGETS} belong together, but one is missing"
    if flags is not None and flags["bytes"] != counts["tokens"]:
        return f"{split}.tokens is {counts['tokens']}, but {split}/{TARGETS} has {flags['bytes']} bytes"
    if counts.get("targets", 0) > counts["tokens"]:
        return f"{split}.targets is {counts['targets']}, more than the {counts['tokens']} tokens"
    if counts["documents"] > counts["tokens"]:
        return f"{split}.documents is {counts['documents']}, more than the {counts['tokens']} tokens"
    if counts["max_id"] >= content["tokenizer_size"]:
        return f"{split}.max_id is {counts['max_id']}, but the tokenizer has {content['tokenizer_size']} tokens"
    return None


def _content_checksum(content: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())
