"""An index on disk, and its queries: influence of training tokens on a loss, through the prototypes they share.

    influence(s, q) = 1/N sum over i active in both of g_qi^T H_i^-1 g_si            (section 4)

Sign, here and everywhere: positive = training on the token lowered the query's loss. Unit: nats of the query's loss, to
first order, that one appearance of the training token is worth among N. Numpy only, so that a process that serves
queries stays small; the files are memory-mapped.

Shapes: N training tokens, k active, r vectors per record, m coordinates, D hidden size, U prototypes of a query.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np

from prism_lightning.attribution.files import damage, map_file, read_json
from prism_lightning.errors import UserError

GATHER_ROWS = 65_536  # of a list at once: the longest list of a skewed dictionary may be most of a shard


class Query(NamedTuple):
    """One question, already divided by the curvature: a vector for each prototype it touches."""

    prototypes_U: np.ndarray  # distinct, ascending
    vectors_Um: np.ndarray


class Hits(NamedTuple):
    """Training tokens that share a prototype with a query, ascending, and the influence of each in nats."""

    tokens: np.ndarray
    influence: np.ndarray

    @classmethod
    def total(cls, parts: list[Hits]) -> Hits:
        """The sum of several hits."""
        return summed(np.concatenate([part.tokens for part in parts]), np.concatenate([p.influence for p in parts]))

    def strongest(self, count: int, opposing: bool = False) -> Hits:
        """The `count` largest influences, descending; with `opposing` the most negative."""
        signed = -self.influence if opposing else self.influence
        count = min(count, len(signed))
        if not count:
            return self
        chosen = np.argpartition(-signed, count - 1)[:count]
        chosen = chosen[np.argsort(-signed[chosen], kind="stable")]
        return Hits(self.tokens[chosen], self.influence[chosen])


class Index:
    """A finished index, memory-mapped.

    Args:
        folder: what `index` built.
        verify: compare every file with its checksum first, which reads the whole index.

    Raises:
        UserError: no finished index there, or a damaged file, named.
    """

    def __init__(self, folder: Path, verify: bool = True) -> None:
        self.folder = Path(folder)
        manifest = read_json(self.folder / "manifest.json")
        if manifest is None:
            raise UserError(
                f"{folder} holds no finished index: run `index` with this recipe, it goes on where it stopped"
            )
        self.manifest = manifest
        self.tokens: int = manifest["tokens"]
        self.shard_tokens: int = manifest["shard_tokens"]
        self.activation_path: bool = manifest["settings"]["activation_path"]
        self.vectors_per_record: int = manifest["active"] if self.activation_path else 1
        self.num_shards: int = manifest["shards"]
        self.shard_paths = [shard_path(self.folder, number) for number in range(self.num_shards)]
        if verify:
            self._verify()
        self.curvature = map_file(self.folder / "curvature.safetensors")

    def _verify(self) -> None:
        others = [self.folder / f"{name}.safetensors" for name in ("dictionary", "curvature")]
        found = {path: damage(path) for path in [*self.shard_paths, *others]}
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

    def usage_K(self) -> np.ndarray:
        """Training tokens in which each prototype is active."""
        return np.sum([np.diff(shard["offsets"].astype(np.int64)) for shard in self.shards], axis=0)

    def postings(self, prototype: int) -> tuple[np.ndarray, np.ndarray]:
        """Training tokens in which a prototype is active, ascending, and their activations."""
        tokens, activations = [], []
        for number, shard in enumerate(self.shards):
            entries = _entries(shard, prototype)
            within = shard["rows"][entries].astype(np.int64) // self.vectors_per_record
            tokens.append(within + number * self.shard_tokens)
            activations.append(shard["activations"][entries])
        return np.concatenate(tokens), np.concatenate(activations)

    def query(self, prototypes_Qk: np.ndarray, activations_Qk: np.ndarray, vectors_QrD: np.ndarray) -> Query:
        """Divide the records of one or several tokens by the curvature and sum them, prototype by prototype.

        Influence is linear in the query, so the sum asks about the summed loss of all Q tokens at once.
        """
        weight_Qk = self.curvature["inverse_activation"][prototypes_Qk]
        if not self.activation_path:  # there the activations are inside the vectors
            weight_Qk = weight_Qk * np.asarray(activations_Qk, dtype=np.float32)
        terms = weight_Qk[..., None] * (vectors_QrD @ self.curvature["precondition"])  # r = 1 serves all k
        flat = prototypes_Qk.ravel()
        prototypes_U, which = np.unique(flat, return_inverse=True)
        terms = terms.reshape(len(flat), terms.shape[-1])
        if len(prototypes_U) == len(flat):
            vectors_Um = terms[np.argsort(which)]
        else:
            vectors_Um = np.zeros((len(prototypes_U), terms.shape[1]), dtype=np.float32)
            np.add.at(vectors_Um, which, terms)
        if "eigenvalues" in self.curvature:
            vectors_Um = vectors_Um / self.curvature["eigenvalues"][prototypes_U]
        return Query(prototypes_U, vectors_Um)

    def score(self, query: Query) -> Hits:
        """Influence of every training token that shares a prototype with the query; all others have none."""
        tokens, influence = [], []
        questions = list(zip(query.prototypes_U.tolist(), query.vectors_Um, strict=True))
        for number, shard in enumerate(self.shards):
            rows, scores = [], []
            for prototype, vector_m in questions:
                entries = _entries(shard, prototype)
                list_rows = shard["rows"][entries]
                dots = _dots(shard, list_rows, vector_m)
                if not self.activation_path:
                    dots *= shard["activations"][entries]
                rows.append(list_rows)
                scores.append(dots)
            if rows:
                hits = summed(np.concatenate(rows) // self.vectors_per_record, np.concatenate(scores))
                tokens.append(hits.tokens + np.int64(number * self.shard_tokens))
                influence.append(hits.influence)
        if not tokens:
            return Hits(np.empty(0, np.int64), np.empty(0, np.float32))
        return Hits(np.concatenate(tokens), np.concatenate(influence))

    def carriers(self, query: Query, tokens: np.ndarray) -> list[list[tuple[int, float]]]:
        """For each training token, its prototypes that the query touches and the influence each carries."""
        found = []
        for token in tokens.tolist():
            number, row = divmod(token, self.shard_tokens)
            shard, first = self.shards[number], row * self.vectors_per_record
            carried = []
            for prototype, vector_m in zip(query.prototypes_U.tolist(), query.vectors_Um, strict=True):
                entries = _entries(shard, prototype)
                rows = shard["rows"][entries]
                at = int(np.searchsorted(rows, first))
                if at < len(rows) and rows[at] < first + self.vectors_per_record:
                    value = float(_dots(shard, rows[at : at + 1], vector_m)[0])
                    weight = 1.0 if self.activation_path else float(shard["activations"][entries][at])
                    carried.append((prototype, value * weight))
            found.append(sorted(carried, key=lambda pair: -abs(pair[1])))
        return found

    def rescored(self, hits: Hits, z_D: np.ndarray, delta_D: np.ndarray) -> Hits:
        """The second stage: the same tokens by the head's K-FAC, (z_q C^-1 z_s)(delta_q S^-1 delta_s) / N.

        Only for an index that keeps hidden states.
        """
        hidden_h = z_D @ self.curvature["hidden_basis"]
        vector_m = delta_D @ self.curvature["precondition"] / np.float32(self.tokens)
        influence = np.empty(len(hits.tokens), dtype=np.float32)
        for shard in np.unique(hits.tokens // self.shard_tokens).tolist():
            mine = hits.tokens // self.shard_tokens == shard
            rows = hits.tokens[mine] - shard * self.shard_tokens
            tensors = self.shards[shard]
            alike = tensors["hidden"].take(rows, axis=0).astype(np.float32) @ hidden_h
            alike *= tensors["hidden_scales"].take(rows)
            influence[mine] = alike * _dots(tensors, rows, vector_m)
        return Hits(hits.tokens, influence)


def _entries(shard: dict[str, np.ndarray], prototype: int) -> slice:
    """Where a prototype's list stands among a shard's postings."""
    return slice(*shard["offsets"][prototype : prototype + 2].tolist())


def _dots(shard: dict[str, np.ndarray], rows: np.ndarray, vector_m: np.ndarray) -> np.ndarray:
    """Dot products of some rows' coordinates with a vector."""
    dots = np.empty(len(rows), dtype=np.float32)
    for start in range(0, len(rows), GATHER_ROWS):
        gathered = shard["coordinates"].take(rows[start : start + GATHER_ROWS], axis=0)
        dots[start : start + GATHER_ROWS] = gathered.astype(np.float32, copy=False) @ vector_m
    if "scales" in shard:
        dots *= shard["scales"].take(rows)
    return dots


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
