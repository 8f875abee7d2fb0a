"""An index on disk, and its queries: influence of training tokens on a loss, through the prototypes they share.

What both kinds of index share; `hidden_index` and `logit_index` hold what each keeps of a training token.

Sign, here and everywhere: positive = training on the token lowered the query's loss. Unit: nats of the query's loss, to
first order, that one appearance of the training token is worth among N. Numpy only, so that a process that serves
queries stays small; the files are memory-mapped.

Shapes: N training tokens, K prototypes, m coordinates of an entry, U lists that a query reads.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np

from prism_lightning.common.files import integrity_error, map_file, read_json
from prism_lightning.errors import UserError

FORMAT = 2


class Query(NamedTuple):
    """One question, already divided by the curvature: the lists it reads, and what their entries are multiplied by."""

    lists_U: np.ndarray  # distinct, ascending
    vectors_Um: np.ndarray


class Hits(NamedTuple):
    """Training tokens that share a list with a query, ascending, and the influence of each in nats."""

    tokens: np.ndarray
    influence: np.ndarray

    @classmethod
    def total(cls, parts: list[Hits]) -> Hits:
        """The sum of several hits."""
        return summed(np.concatenate([part.tokens for part in parts]), np.concatenate([p.influence for p in parts]))

    def strongest(self, count: int, opposing: bool = False) -> Hits:
        """The `count` largest influences, descending; with `opposing` the most negative, and none that are not."""
        signed = -self.influence if opposing else self.influence
        count = min(count, int((signed > 0).sum()) if opposing else len(signed))
        if not count:
            return Hits(self.tokens[:0], self.influence[:0])
        chosen = np.argpartition(-signed, count - 1)[:count]
        chosen = chosen[np.argsort(-signed[chosen], kind="stable")]
        return Hits(self.tokens[chosen], self.influence[chosen])


class Index(ABC):
    """A finished index, memory-mapped; see `spaces.open_index`.

    Args:
        folder: what `index` built.
        verify: compare every file with its checksum first, which reads the whole index.

    Raises:
        UserError: no finished index there, or a damaged file, named.
    """

    def __init__(self, folder: str | Path, verify: bool = True) -> None:
        self.folder = Path(folder)
        manifest = read_json(self.folder / "manifest.json")
        if manifest is None:
            raise UserError(
                f"{folder} holds no finished index: run `index` with this recipe, it goes on where it stopped"
            )
        if manifest["format"] != FORMAT:
            raise UserError(
                f"{folder} holds an index of another version of this package: remove it and run `index` again"
            )
        self.manifest = manifest
        self.tokens: int = manifest["tokens"]
        self.shard_tokens: int = manifest["shard_tokens"]
        self.num_shards: int = manifest["shards"]
        self.shard_paths = [shard_path(self.folder, number) for number in range(self.num_shards)]
        if verify:
            self._verify()
        self.curvature = map_file(self.folder / "curvature.safetensors")

    def _verify(self) -> None:
        others = [self.folder / f"{name}.safetensors" for name in ("dictionary", "curvature")]
        found = {path: integrity_error(path) for path in [*self.shard_paths, *others]}
        if not any(found.values()) and not made_from(self.folder, self.num_shards):
            raise UserError(f"{self.folder} mixes files of different builds: run the same `index` command to finish it")
        problems = [
            f"{'shard ' if path in self.shard_paths else ''}{path} {what}: run the same `index` command,"
            " it builds only what is damaged anew"
            for path, what in found.items()
            if what
        ]
        if problems:
            raise UserError(problems)

    @cached_property
    def shards(self) -> list[dict[str, np.ndarray]]:
        """Every shard's tensors."""
        return [map_file(path) for path in self.shard_paths]

    @property
    def num_prototypes(self) -> int:
        """K."""
        return self.manifest["prototypes"]

    @abstractmethod
    def usage_K(self) -> np.ndarray:
        """Training tokens in which each prototype is active."""

    @abstractmethod
    def postings(self, prototype: int) -> tuple[np.ndarray, np.ndarray]:
        """Training tokens in which a prototype is active, ascending, and their activations."""

    @abstractmethod
    def query(self, *records: np.ndarray) -> Query:
        """Divide the records of one or several tokens by the curvature and sum them, list by list.

        Influence is linear in the query, so the sum asks about the summed loss of all Q tokens at once.
        """

    @abstractmethod
    def entries_read(self, query: Query) -> int:
        """List entries that a query reads."""

    @abstractmethod
    def carriers(self, query: Query, tokens: np.ndarray) -> list[list[tuple[int, float]]]:
        """For each training token, its prototypes that the query touches and the influence each carries."""

    @abstractmethod
    def _shard_hits(self, shard: dict[str, np.ndarray], query: Query) -> Hits:
        """As `score`, in one shard and by its own count of tokens."""

    def score(self, query: Query) -> Hits:
        """Influence of every training token that shares a list with the query; what any other has is left out."""
        if not len(query.lists_U):
            return Hits(np.empty(0, np.int64), np.empty(0, np.float32))
        parts = [self._shard_hits(shard, query) for shard in self.shards]
        tokens = [part.tokens + np.int64(number * self.shard_tokens) for number, part in enumerate(parts)]
        return Hits(np.concatenate(tokens), np.concatenate([part.influence for part in parts]))


def summed(tokens: np.ndarray, influence: np.ndarray) -> Hits:
    """Hits with each token once, its influences added up."""
    order = np.argsort(tokens, kind="stable")
    tokens, influence = tokens[order], influence[order]
    if len(tokens) == 0:
        return Hits(tokens, influence)
    starts = np.concatenate([[0], np.flatnonzero(tokens[1:] != tokens[:-1]) + 1])
    return Hits(tokens[starts], np.add.reduceat(influence, starts))


def parts_of(folder: Path, num_shards: int) -> list[int | None]:
    """Checksums of the dictionary and of every shard, as their writers noted them."""
    paths = [folder / "dictionary.json", *(shard_path(folder, n).with_suffix(".json") for n in range(num_shards))]
    return [(read_json(path) or {}).get("crc32") for path in paths]


def made_from(folder: Path, num_shards: int) -> bool:
    """Whether the curvature was computed from the dictionary and shards that are there now."""
    return (read_json(folder / "curvature.json") or {}).get("parts") == parts_of(folder, num_shards)


def shard_path(folder: Path, number: int) -> Path:
    """A shard's file."""
    return folder / "shards" / f"{number:05d}.safetensors"
