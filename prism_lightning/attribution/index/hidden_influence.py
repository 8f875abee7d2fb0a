"""An index in the space of hidden states: a vector for every training token, and posting lists by prototype.

    influence(s, q) = 1/N sum over i active in both of g_qi^T H_i^-1 g_si            (section 4)

Numpy only. Shapes: N training tokens, k active, m coordinates, D hidden size, Q query tokens, U
prototypes of a query.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np

from prism_lightning.attribution.index.base import Hits, Index, Query, sum_by_token
from prism_lightning.attribution.index.shards import HiddenShard

GATHER_ROWS = 65_536  # of a list at once: the longest list may hold most of a shard


class HiddenIndex(Index):
    """See `Index`; there is a list for each prototype."""

    @cached_property
    def shards(self) -> list[HiddenShard]:
        return [HiddenShard.open(path) for path in self.shard_paths]

    def sizes(self) -> dict[str, int]:
        rows = sum(len(shard.coordinates) for shard in self.shards)
        return {"prototypes": len(self.curvature["inverse_activation"]), "tokens": rows}

    def usage_K(self) -> np.ndarray:
        return np.sum([np.diff(shard.offsets.astype(np.int64)) for shard in self.shards], axis=0)

    def entries_read(self, query: Query) -> int:
        return int(self.usage_K()[query.lists_U].sum())

    def postings(self, prototype: int) -> tuple[np.ndarray, np.ndarray]:
        tokens, activations = [], []
        for number, shard in enumerate(self.shards):
            entries = shard.entries(prototype)
            within = shard.rows[entries].astype(np.int64)
            tokens.append(within + number * self.shard_tokens)
            activations.append(shard.activations[entries])
        return np.concatenate(tokens), np.concatenate(activations)

    def query(self, *records: np.ndarray) -> Query:
        """See `Index`. `records`: prototypes [Q, k], activations [Q, k] and loss gradients [Q, D]."""
        prototypes_Qk, activations_Qk, delta_QD = records
        weight_Qk = self.curvature["inverse_activation"][prototypes_Qk] * np.asarray(activations_Qk, dtype=np.float32)
        terms = weight_Qk[..., None] * (delta_QD[:, None] @ self.curvature["precondition"])
        flat = prototypes_Qk.ravel()
        prototypes_U, place = np.unique(flat, return_inverse=True)
        terms = terms.reshape(len(flat), terms.shape[-1])
        if len(prototypes_U) == len(flat):
            vectors_Um = terms[np.argsort(place)]
        else:
            vectors_Um = np.zeros((len(prototypes_U), terms.shape[1]), dtype=np.float32)
            np.add.at(vectors_Um, place, terms)
        return Query(prototypes_U, vectors_Um)

    def _hits_by_shard(self, query: Query) -> list[Hits]:
        return [_hits(shard, query) for shard in self.shards]

    def contributions_by_prototype(self, query: Query, tokens: np.ndarray) -> list[list[tuple[int, float]]]:
        return [self._contributions_to(query, token) for token in tokens.tolist()]

    def _contributions_to(self, query: Query, token: int) -> list[tuple[int, float]]:
        number, row = divmod(token, self.shard_tokens)
        shard, contributions = self.shards[number], []
        for prototype, vector_m in zip(query.lists_U.tolist(), query.vectors_Um, strict=True):
            entries = shard.entries(prototype)
            rows = shard.rows[entries]
            at = int(np.searchsorted(rows, row))
            if at < len(rows) and rows[at] == row:
                value = float(_dots(shard, rows[at : at + 1], vector_m)[0])
                contributions.append((prototype, value * float(shard.activations[entries][at])))
        return sorted(contributions, key=lambda pair: -abs(pair[1]))

    def rescored(self, hits: Hits, z_D: np.ndarray, delta_D: np.ndarray) -> Hits:
        """Return the same tokens scored by the head's K-FAC, (z_q C^-1 z_s)(delta_q S^-1 delta_s) / N (second stage).

        The index must store hidden states.
        """
        hidden_h = z_D @ self.curvature["hidden_basis"]
        vector_m = delta_D @ self.curvature["precondition"] / np.float32(self.targets)
        influence = np.empty(len(hits.tokens), dtype=np.float32)
        for number in np.unique(hits.tokens // self.shard_tokens).tolist():
            in_shard = hits.tokens // self.shard_tokens == number
            rows = hits.tokens[in_shard] - number * self.shard_tokens
            shard = self.shards[number]
            assert shard.hidden is not None and shard.hidden_scales is not None  # where there is a hidden basis
            similarity = shard.hidden.take(rows, axis=0).astype(np.float32) @ hidden_h
            similarity *= shard.hidden_scales.take(rows)
            influence[in_shard] = similarity * _dots(shard, rows, vector_m)
        return Hits(hits.tokens, influence)


def _hits(shard: HiddenShard, query: Query) -> Hits:
    """Influence of a shard's tokens, counted from its start."""
    rows, scores = [], []
    for prototype, vector_m in zip(query.lists_U.tolist(), query.vectors_Um, strict=True):
        entries = shard.entries(prototype)
        list_rows = shard.rows[entries]
        rows.append(list_rows)
        scores.append(_dots(shard, list_rows, vector_m) * shard.activations[entries])
    return sum_by_token(np.concatenate(rows), np.concatenate(scores))


def _dots(shard: HiddenShard, rows: np.ndarray, vector_m: np.ndarray) -> np.ndarray:
    """Return dot products of some rows' coordinates with a vector."""
    dots = np.empty(len(rows), dtype=np.float32)
    for start in range(0, len(rows), GATHER_ROWS):
        gathered = shard.coordinates.take(rows[start : start + GATHER_ROWS], axis=0)
        dots[start : start + GATHER_ROWS] = gathered.astype(np.float32, copy=False) @ vector_m
    if shard.scales is not None:
        dots *= shard.scales.take(rows)
    return dots
