"""The base of both kinds of index: influence of training tokens on a query's loss, through shared prototypes.

`logit_influence.py` and `hidden_influence.py` hold the formula of each space and implement it. A positive influence
always means that training on the token lowered the query's loss. Its unit is nats of the query's loss, to first order,
for one appearance of the training token among N. Numpy alone is used, so that a process that serves queries stays
small; the files are memory-mapped.

Shapes: N training tokens, K prototypes, m coordinates of an entry, U lists that a query reads.
"""

from __future__ import annotations

import reprlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from prism_lightning.attribution.index.shards import Shard
from prism_lightning.common.errors import UserError
from prism_lightning.common.files import integrity_error, map_file, read_json
from prism_lightning.common.manifests import (
    anything,
    check_manifest,
    flag,
    mapping,
    one_of,
    optional,
    read_manifest,
    text,
    whole,
)
from prism_lightning.common.retired import retired_in

FORMAT = 2
MANIFEST = {
    "model": text(),
    "data": text(),
    "store": text(),
    "block_size": whole(1, 2**24),
    "tokens": whole(1),
    "targets": optional(whole(1)),
    "isolated": optional(flag()),
    "shard_tokens": whole(1, 2**32),
    "shards": whole(1, 10**5),
    "documents": whole(1),
    "prototypes": whole(1, 2**31),
    "active": whole(1, 2**16),
    "vocabulary": whole(1, 2**31),
    "settings": mapping({"space": one_of("logits", "hidden"), "dictionary": text()}),
}
REBUILD = "run the same `index` command, it builds only what is damaged anew"
MAX_PROBLEMS = 5  # an index with 100,000 missing shards is reported by its first ones


class Query(NamedTuple):
    """A query, divided by the curvature: the lists that it reads, and the vector for each list's entries."""

    lists_U: np.ndarray  # distinct, ascending
    vectors_Um: np.ndarray


class Hits(NamedTuple):
    """Training tokens that share a list with a query, ascending, and their influence in nats."""

    tokens: np.ndarray
    influence: np.ndarray

    @classmethod
    def total(cls, parts: list[Hits]) -> Hits:
        """Return the sum of several hits."""
        return sum_by_token(
            np.concatenate([part.tokens for part in parts]), np.concatenate([p.influence for p in parts])
        )

    def strongest(self, count: int, opposing: bool = False) -> Hits:
        """Return the `count` largest influences, descending; with `opposing`, the most negative ones alone."""
        signed = -self.influence if opposing else self.influence
        count = min(count, int((signed > 0).sum()) if opposing else len(signed))
        if not count:
            return Hits(self.tokens[:0], self.influence[:0])
        chosen = np.argpartition(-signed, count - 1)[:count]
        chosen = chosen[np.argsort(-signed[chosen], kind="stable")]
        return Hits(self.tokens[chosen], self.influence[chosen])


class Index(ABC):
    """A finished index, memory-mapped; `opening.open_index` makes it.

    Args:
        folder: of the index.
        verify: whether every file is compared with its checksum first, which reads the whole index.

    Raises:
        UserError: no finished index there, a damaged file, or a manifest that contradicts the files.
    """

    def __init__(self, folder: str | Path, verify: bool = True) -> None:
        self.folder = Path(folder)
        self.manifest = manifest = manifest_of(self.folder)
        self.tokens: int = manifest["tokens"]
        # N of every formula; masked targets have rows, without entries
        self.targets: int = manifest.get("targets", self.tokens)
        self.shard_tokens: int = manifest["shard_tokens"]
        self.num_shards: int = manifest["shards"]
        self.shard_paths = [shard_path(self.folder, number) for number in range(self.num_shards)]
        if verify:
            self._verify()
        self.curvature = map_file(self.folder / "curvature.safetensors")
        self._compare_sizes()

    def _compare_sizes(self) -> None:
        """Compare the manifest, which has no checksum, with the sizes of tensors; a wrong size gives wrong results."""
        path = self.folder / "manifest.json"
        facts = read_manifest(self.folder / "dictionary.json", {"active": whole(1)}, REBUILD) or {}
        try:
            prototypes = len(map_file(self.folder / "dictionary.safetensors")["prototypes"])
            sizes = {"prototypes": prototypes, "active": facts.get("active"), **self.sizes()}
            if "targets" in self.manifest or "targets" in self.curvature:
                sizes["targets"] = int(self.curvature["targets"][0])
        except KeyError as error:
            raise UserError(f"{self.folder} has a file without the tensor {error}: {REBUILD}") from error
        problems = [
            f"{path} is damaged ({name} is {self.manifest.get(name)}, the index's files have {size}): {REBUILD}"
            for name, size in sizes.items()
            if size != self.manifest.get(name)
        ]
        if problems:
            raise UserError(problems)

    @abstractmethod
    def sizes(self) -> dict[str, int]:
        """Return the sizes of tensors, by their name in the manifest."""

    def _verify(self) -> None:
        paths = [self.folder / f"{name}.safetensors" for name in ("dictionary", "curvature")]
        shards = set(self.shard_paths)
        problems = (
            f"{'shard ' if path in shards else ''}{path} {error}: {REBUILD}"
            for path in [*paths, *self.shard_paths]
            if (error := integrity_error(path))
        )
        shown = list(islice(problems, MAX_PROBLEMS))
        if len(shown) == MAX_PROBLEMS:
            shown[-1] += "; there may be more"
        if shown:
            raise UserError(shown)
        if not curvature_is_current(self.folder, self.num_shards):
            raise UserError(f"{self.folder} mixes files of different builds: run the same `index` command to finish it")

    @cached_property
    @abstractmethod
    def shards(self) -> Sequence[Shard]:
        """The shards, memory-mapped, in order."""

    @property
    def num_prototypes(self) -> int:
        """Number K of prototypes."""
        return self.manifest["prototypes"]

    @abstractmethod
    def usage_K(self) -> np.ndarray:
        """Return the number [K] of training tokens in which each prototype is active."""

    @abstractmethod
    def postings(self, prototype: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the training tokens in which a prototype is active, ascending, and their activations."""

    @abstractmethod
    def query(self, *records: np.ndarray) -> Query:
        """Divide the records of one or several tokens by the curvature and sum them, list by list.

        Influence is linear in the query, so the result is the query for the summed loss of all Q tokens.
        """

    @abstractmethod
    def entries_read(self, query: Query) -> int:
        """Return the number of list entries that a query reads."""

    @abstractmethod
    def contributions_by_prototype(self, query: Query, tokens: np.ndarray) -> list[list[tuple[int, float]]]:
        """Return for each training token the prototypes it shares with the query, and the influence through each."""

    @abstractmethod
    def _hits_by_shard(self, query: Query) -> list[Hits]:
        """Return the hits of `score` for each shard, with tokens counted from the start of the shard."""

    def score(self, query: Query) -> Hits:
        """Return the influence of every training token that shares a list with the query."""
        if not len(query.lists_U):
            return Hits(np.empty(0, np.int64), np.empty(0, np.float32))
        parts = self._hits_by_shard(query)
        tokens = [part.tokens + np.int64(number * self.shard_tokens) for number, part in enumerate(parts)]
        return Hits(np.concatenate(tokens), np.concatenate([part.influence for part in parts]))


def manifest_of(folder: Path) -> dict[str, Any]:
    """Return the manifest of a finished index, with every entry of its type and within its bounds.

    Raises:
        UserError: no finished index there, one of another version or with a retired setting, or a damaged manifest.
    """
    path = folder / "manifest.json"
    manifest = read_manifest(path, {"format": anything()}, REBUILD)
    if manifest is None:
        raise UserError(f"{folder} holds no finished index: run `index` with this recipe, it resumes where it stopped")
    if manifest["format"] != FORMAT:
        raise UserError(f"{folder} holds an index of another version of this package: remove it and run `index` again")
    check_manifest(manifest, MANIFEST, path, REBUILD)
    for name, value in retired_in(manifest["settings"]).items():
        raise UserError(
            f"{folder} was built with index.{name} {reprlib.repr(value)}, a retired setting: remove it and run `index`"
            " again"
        )
    tokens, shard_tokens, shards = (manifest[name] for name in ("tokens", "shard_tokens", "shards"))
    if -(-tokens // shard_tokens) != shards:
        raise UserError(
            f"{path} is damaged ({tokens} tokens in shards of {shard_tokens} are not {shards} shards): {REBUILD}"
        )
    return manifest


def sum_by_token(tokens: np.ndarray, influence: np.ndarray) -> Hits:
    """Return hits in which each token stands once, with the sum of its influences."""
    order = np.argsort(tokens, kind="stable")
    tokens, influence = tokens[order], influence[order]
    if len(tokens) == 0:
        return Hits(tokens, influence)
    starts = np.concatenate([[0], np.flatnonzero(tokens[1:] != tokens[:-1]) + 1])
    return Hits(tokens[starts], np.add.reduceat(influence, starts))


def part_checksums(folder: Path, num_shards: int) -> list[int | None]:
    """Return the recorded checksums of the dictionary and of every shard."""
    paths = [folder / "dictionary.json", *(shard_path(folder, n).with_suffix(".json") for n in range(num_shards))]
    return [(read_json(path) or {}).get("crc32") for path in paths]


def curvature_is_current(folder: Path, num_shards: int) -> bool:
    """Return whether the curvature was computed from the present dictionary and shards."""
    return (read_json(folder / "curvature.json") or {}).get("parts") == part_checksums(folder, num_shards)


def shard_path(folder: Path, number: int) -> Path:
    """Return the path of a shard."""
    return folder / "shards" / f"{number:05d}.safetensors"
