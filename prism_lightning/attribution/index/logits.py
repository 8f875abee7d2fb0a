"""The index in the space of logits: posting lists by prototype and target, without a vector for any token.

The parameters are what each prototype adds to the logits, V_i = W p_i, a number for every token of the vocabulary.
The gradient of a training token's loss with respect to them is a_si (pi_s - e_y); of it the entry of the token's own
target is kept, -a_si (1 - pi_s(y)). The diagonal of their Gauss-Newton matrix, N times, is sum_s a_si^2 pi_s(v)
(1 - pi_s(v)). It is estimated from the labels there are, without a [K, V] matrix: the sum of a_si^2 (1 - pi_s(v)) over
the n tokens of the list (i, v), L_iv, has it for its mean over labels drawn from pi. Short lists are noisy, so L is
drawn towards the product of the sums over all targets and over all prototypes, as if PRIOR more tokens had said that:

    S_iv = (n L_iv + PRIOR A_i P_v / N) / (n + PRIOR)        A_i = sum_s a_si^2,  P_v = sum over y_s = v of 1 - pi_s(v)

(LDS .676; without the prior .666, with the exact diagonal .669: docs/attribution.md.) With r_q the query's negative
gradient with respect to the logits, of which only the entries asked about count, 1 - pi_q at its target,

    influence(s, q) = r_q(y_s) (1 - pi_s(y_s)) sum over i active in both of a_qi a_si / (S_i,y_s + d mean L).

Numpy only. Shapes: N training tokens, k active, Q query tokens, c targets of each that are asked about, U lists of a
query.
"""

from __future__ import annotations

import numpy as np

from prism_lightning.attribution.index.base import Hits, Index, Query, summed

PRIOR = 3.0  # tokens; in another trial 1: .656, 3: .658, 10: .654, 30: .647, without it .645
# Entries are sorted where they are few, and added up in an array of the shard's tokens where there are more than a
# sixteenth as many: a sequence of 128 tokens asks 3.1 million tokens in 25 ms in place of 78.
DENSE = 16


class LogitIndex(Index):
    """See `Index`; list i V + v is that of prototype i and target v."""

    @property
    def vocabulary(self) -> int:
        """V."""
        return self.manifest["vocabulary"]

    def sizes(self) -> dict[str, int]:
        tokens = sum(len(shard["surprise"]) for shard in self.shards)
        return {"vocabulary": len(self.curvature["surprise"]), "tokens": tokens}

    def usage_K(self) -> np.ndarray:
        edges = np.arange(self.num_prototypes + 1) * self.vocabulary
        counts = []
        for shard in self.shards:
            at = search(shard["lists"], edges)
            counts.append(np.diff(shard["offsets"][at].astype(np.int64)))
        return np.sum(counts, axis=0)

    def entries_read(self, query: Query) -> int:
        return sum(int(entries_of(shard, query.lists_U)[1].sum()) for shard in self.shards)

    def postings(self, prototype: int) -> tuple[np.ndarray, np.ndarray]:
        tokens, activations = [], []
        for number, shard in enumerate(self.shards):
            at = search(shard["lists"], np.array([prototype, prototype + 1]) * self.vocabulary)
            entries = slice(*shard["offsets"][at].tolist())
            order = np.argsort(shard["rows"][entries], kind="stable")
            tokens.append(shard["rows"][entries][order].astype(np.int64) + number * self.shard_tokens)
            activations.append(shard["activations"][entries][order])
        return np.concatenate(tokens), np.concatenate(activations)

    def query(self, *records: np.ndarray) -> Query:
        """See `Index`. `records`: prototypes and activations [Q, k], targets and residuals r_q of them [Q, c]."""
        prototypes_Qk, activations_Qk, targets_Qc, residuals_Qc = records
        lists_Qkc = prototypes_Qk[:, :, None].astype(np.int64) * self.vocabulary + targets_Qc[:, None]
        weights_Qkc = activations_Qk[:, :, None] * residuals_Qc[:, None]
        lists_U, which = np.unique(lists_Qkc.ravel(), return_inverse=True)
        weights_U = np.bincount(which, weights_Qkc.ravel(), len(lists_U))
        lists_U, weights_U = lists_U[weights_U != 0], weights_U[weights_U != 0]  # prototypes that were removed
        curvature_U = self._curvature(lists_U)
        weights_U = np.divide(weights_U, curvature_U, out=np.zeros_like(weights_U), where=curvature_U > 0)
        return Query(lists_U, weights_U[:, None].astype(np.float32))

    def _curvature(self, lists_U: np.ndarray) -> np.ndarray:
        """S, damped."""
        counts_U, sums_U = np.zeros((2, len(lists_U)))
        for shard in self.shards:
            at, found = places(shard, lists_U)
            at = at[found]
            counts_U[found] += shard["offsets"][at + 1].astype(np.int64) - shard["offsets"][at]
            sums_U[found] += shard["curvature"][at]
        prototypes_U, targets_U = np.divmod(lists_U, self.vocabulary)
        prior_U = self.curvature["activation"][prototypes_U] * self.curvature["surprise"][targets_U] / self.tokens
        return (counts_U * sums_U + PRIOR * prior_U) / (counts_U + PRIOR) + self.curvature["damping"][0]

    def _shard_hits(self, shard: dict[str, np.ndarray], query: Query) -> Hits:
        positions, counts = entries_of(shard, query.lists_U)
        values = shard["activations"][positions].astype(np.float32) * np.repeat(query.vectors_Um[:, 0], counts)
        rows = shard["rows"][positions]
        if DENSE * len(rows) > len(shard["surprise"]):
            total = np.bincount(rows, values)
            tokens = np.flatnonzero(total)
            hits = Hits(tokens.astype(rows.dtype), total[tokens].astype(np.float32))
        else:
            hits = summed(rows, values)
        return Hits(hits.tokens, hits.influence * shard["surprise"].take(hits.tokens))

    def carriers(self, query: Query, tokens: np.ndarray) -> list[list[tuple[int, float]]]:
        found: dict[int, list[tuple[int, float]]] = {token: [] for token in tokens.tolist()}
        for number in np.unique(tokens // self.shard_tokens).tolist():
            shard = self.shards[number]
            positions, counts = entries_of(shard, query.lists_U)
            wanted = np.isin(shard["rows"][positions], tokens - number * self.shard_tokens)
            rows, which = shard["rows"][positions[wanted]], np.repeat(np.arange(len(counts)), counts)[wanted]
            values = shard["activations"][positions[wanted]] * query.vectors_Um[which, 0] * shard["surprise"].take(rows)
            prototypes = query.lists_U[which] // self.vocabulary
            for row, pair in zip(rows.tolist(), zip(prototypes.tolist(), values.tolist(), strict=True), strict=True):
                found[row + number * self.shard_tokens].append(pair)
        return [sorted(found[token], key=lambda pair: -abs(pair[1])) for token in tokens.tolist()]


def search(lists: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """Where numbers belong among a shard's lists. Sought as another type they would have all lists converted first."""
    return np.searchsorted(lists, numbers.astype(lists.dtype))


def places(shard: dict[str, np.ndarray], lists_U: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where lists stand among those of a shard, and whether they are there at all."""
    stored = shard["lists"]
    if not len(stored):
        return np.zeros(len(lists_U), dtype=np.int64), np.zeros(len(lists_U), dtype=bool)
    at = np.minimum(search(stored, lists_U), len(stored) - 1)
    return at, stored[at] == lists_U


def entries_of(shard: dict[str, np.ndarray], lists_U: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Positions of all entries of some lists, one list behind the other, and the number of entries of each."""
    at, found = places(shard, lists_U)
    starts, stops = (shard["offsets"][np.where(found, at + step, 0)].astype(np.int64) for step in (0, 1))
    counts = stops - starts
    before = np.cumsum(counts) - counts
    return np.arange(counts.sum()) + np.repeat(starts - before, counts), counts
