"""Shards of an index: what one file keeps of a range of training tokens. Numpy only.

Shapes: n tokens of the shard, k active prototypes, K prototypes, V vocabulary, P lists, E entries of all lists, m
coordinates, h coordinates of a hidden state, D hidden size, U lists of a query.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np

from prism_lightning.common.files import map_file, write_file


@dataclass
class Shard:
    """Arrays of one shard; each is a tensor of its safetensors file."""

    # Tensors whose name in the file is not that of the field.
    TENSOR_NAMES: ClassVar[dict[str, str]] = {}

    @classmethod
    def open(cls, path: Path) -> Self:
        """Map the arrays of a file into memory.

        Raises:
            UserError: the file cannot be read.
            KeyError: it lacks a tensor.
        """
        tensors = map_file(path)
        optional = {field.name for field in fields(cls) if field.default is None}
        names = {field.name: cls.TENSOR_NAMES.get(field.name, field.name) for field in fields(cls)}
        return cls(**{name: tensors.get(key) if name in optional else tensors[key] for name, key in names.items()})

    def tensors(self) -> dict[str, np.ndarray]:
        """Return the arrays by the names that they have in the file."""
        arrays = {field.name: getattr(self, field.name) for field in fields(self)}
        return {self.TENSOR_NAMES.get(name, name): array for name, array in arrays.items() if array is not None}

    def write(self, path: Path, **facts: Any) -> None:
        """Write the file, and its checksum and the facts beside it; raises as `write_file`."""
        write_file(path, self.tensors(), **facts)


@dataclass
class LogitShard(Shard):
    """Posting lists by prototype and target, in the order of their numbers; entries in the order of the tokens.

    List `prototype * V + target` has the tokens with that target in which the prototype is active.

    Attributes:
        lists: [P] numbers of the lists that have entries, ascending.
        offsets: [P + 1] first entry of each list.
        curvature: [P] sum of a^2 (1 - pi) over each list.
        rows: [E] token of each entry, counted from the start of the shard.
        activations: [E] activation of each entry.
        target_errors: [n] 1 - pi of each token's target.
        sum_activation: [K] sum of a^2 over each prototype's entries.
        sum_target_error: [V] sum of 1 - pi over the tokens with each target.
    """

    TENSOR_NAMES: ClassVar[dict[str, str]] = {"target_errors": "surprise", "sum_target_error": "sum_surprise"}

    lists: np.ndarray
    offsets: np.ndarray
    curvature: np.ndarray
    rows: np.ndarray
    activations: np.ndarray
    target_errors: np.ndarray
    sum_activation: np.ndarray
    sum_target_error: np.ndarray

    @classmethod
    def of_tokens(
        cls,
        prototypes: np.ndarray,
        activations: np.ndarray,
        target_errors: np.ndarray,
        targets: np.ndarray,
        vocabulary: int,
        num_prototypes: int,
    ) -> Self:
        """Sort the entries of a shard's tokens into lists; entries with activation 0 are left out.

        Args:
            prototypes, activations: [n, k] of the tokens.
            target_errors, targets: [n], 1 - pi of each target.
            vocabulary, num_prototypes: V and K.
        """
        flat = np.flatnonzero(activations > 0)  # with 16 entries a token these arrays are most of a build's memory
        token = (flat // activations.shape[1]).astype(np.uint32)
        lists = prototypes.ravel()[flat].astype(np.int64) * vocabulary + targets[token]
        order = np.argsort(lists, kind="stable")
        token, values, lists = token[order], activations.ravel()[flat[order]], lists[order]
        starts_P = np.flatnonzero(np.diff(lists, prepend=-1))
        lists_P = lists[starts_P]
        squares = values.astype(np.float64) ** 2
        terms = squares * target_errors[token]
        return cls(
            lists=lists_P.astype(np.uint32 if vocabulary * num_prototypes < 2**32 else np.int64),
            offsets=np.append(starts_P, len(token)).astype(np.uint32),
            curvature=(np.add.reduceat(terms, starts_P) if len(terms) else terms).astype(np.float32),
            rows=token,
            activations=values.astype(np.float16),
            target_errors=target_errors.astype(np.float16),
            sum_activation=np.bincount(lists // vocabulary, squares, num_prototypes).astype(np.float32),
            sum_target_error=np.bincount(targets, target_errors, vocabulary).astype(np.float32),
        )

    def find(self, lists_U: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the places [U] of lists among the shard's, and whether each is there."""
        return find_lists(self.lists, lists_U)

    def entries(self, lists_U: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the positions of all entries of some lists, one list after the other, and each list's length [U]."""
        return entries_of(self.lists, self.offsets, lists_U)

    def first_entries(self, numbers: np.ndarray) -> np.ndarray:
        """Return the position of the first entry whose list has at least each of the given numbers."""
        return self.offsets[search(self.lists, numbers)].astype(np.int64)


@dataclass
class HiddenShard(Shard):
    """A whitened loss gradient for each token, and posting lists by prototype.

    Attributes:
        coordinates: [n, m] of each token's record, in fp32, fp16 or int8.
        offsets: [K + 1] first entry of each prototype's list.
        rows: [E] token of each entry, counted from the start of the shard; ascending in a list.
        activations: [E] activation of each entry.
        sum_activation: [K] sum of a^2 over the tokens.
        sum_curvature: [D, D] sum of M_t over the tokens.
        scales: [n] factor of each int8 row.
        hidden: [n, h] whitened hidden states in int8, for re-ranking.
        hidden_scales: [n] factor of each of these rows.
    """

    coordinates: np.ndarray
    offsets: np.ndarray
    rows: np.ndarray
    activations: np.ndarray
    sum_activation: np.ndarray
    sum_curvature: np.ndarray
    scales: np.ndarray | None = None
    hidden: np.ndarray | None = None
    hidden_scales: np.ndarray | None = None

    def entries(self, prototype: int) -> slice:
        """Return where a prototype's list stands among the entries."""
        return slice(*self.offsets[prototype : prototype + 2].tolist())


def search(lists_P: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """Return where numbers belong among ascending lists.

    The numbers take the lists' type: numpy would otherwise convert all lists first.
    """
    return np.searchsorted(lists_P, numbers.astype(lists_P.dtype))


def find_lists(lists_P: np.ndarray, lists_U: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the places [U] of some lists among ascending ones, and whether each is there."""
    if not len(lists_P):
        return np.zeros(len(lists_U), dtype=np.int64), np.zeros(len(lists_U), dtype=bool)
    at = np.minimum(search(lists_P, lists_U), len(lists_P) - 1)
    return at, lists_P[at] == lists_U


def entries_of(lists_P: np.ndarray, offsets_P: np.ndarray, lists_U: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the positions of all entries of some lists, one list after the other, and each list's length [U].

    Args:
        lists_P, offsets_P: numbers of the stored lists, ascending, and the first entry of each (one more at the end).
        lists_U: numbers of the lists that are read.
    """
    at, present = find_lists(lists_P, lists_U)
    starts, stops = (offsets_P[np.where(present, at + step, 0)].astype(np.int64) for step in (0, 1))
    counts = stops - starts
    before = np.cumsum(counts) - counts
    return np.arange(counts.sum()) + np.repeat(starts - before, counts), counts


def prototype_lists(prototypes: np.ndarray, activations: np.ndarray, num_prototypes: int) -> dict[str, np.ndarray]:
    """Return the offsets, rows and activations of a `HiddenShard`; entries with activation 0 are left out.

    Args:
        prototypes, activations: [n, k] of a shard's tokens.
        num_prototypes: K.
    """
    token, slot = np.nonzero(activations > 0)
    order = np.argsort(prototypes[token, slot], kind="stable")
    token, slot = token[order], slot[order]
    counts_K = np.bincount(prototypes[token, slot], minlength=num_prototypes)
    return {
        "offsets": np.concatenate([[0], np.cumsum(counts_K)]).astype(np.uint32),
        "rows": token.astype(np.uint32),
        "activations": activations[token, slot],
    }


def total_of(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """Return the sum of equal shapes in float64, added in order."""
    total = np.zeros(arrays[0].shape)
    for array in arrays:
        total += array
    return total
