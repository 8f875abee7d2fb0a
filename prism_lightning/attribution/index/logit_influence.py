"""An index in the space of logits: posting lists by prototype and target, without a vector per token.

The parameters are what each prototype adds to the logits, V_i = W p_i, a number for every token of the vocabulary.
The gradient of a training token's loss with respect to them is a_si (pi_s - e_y); of it the entry of the token's own
target is kept, -a_si (1 - pi_s(y)). The diagonal of their Gauss-Newton matrix, N times, is sum_s a_si^2 pi_s(v)
(1 - pi_s(v)). It is estimated from the observed labels, without a [K, V] matrix: L_iv, the sum of a_si^2 (1 - pi_s(v))
over the n tokens of list (i, v), has it as its mean over labels drawn from pi. Short lists are noisy, so L is shrunk
towards the product of the sums over all targets and over all prototypes, with the weight of PRIOR tokens:

    S_iv = (n L_iv + PRIOR A_i P_v / N) / (n + PRIOR)        A_i = sum_s a_si^2,  P_v = sum over y_s = v of 1 - pi_s(v)

(LDS 0.676; 0.666 without the prior, 0.669 with the exact diagonal: docs/attribution.md.) With r_q the query's negative
gradient with respect to the logits, of which only the entries of its records count, 1 - pi_q at its target,

    influence(s, q) = r_q(y_s) (1 - pi_s(y_s)) sum over i active in both of a_qi a_si / (S_i,y_s + d mean L).

Numpy only. Shapes: N training tokens, k active, Q query tokens, c targets of each, U lists of a query.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np

from prism_lightning.attribution.index.base import Hits, Index, Query, sum_by_token
from prism_lightning.attribution.index.shards import LogitShard

PRIOR = 3.0  # tokens; LDS in another trial: 1 0.656, 3 0.658, 10 0.654, 30 0.647, without prior 0.645
# Few entries are sorted; more than a sixteenth of the shard's tokens are added up in an array of that size instead. A
# query of 128 tokens on 3.1 million tokens then takes 25 ms in place of 78 ms.
DENSE = 16


class LogitIndex(Index):
    """See `Index`; list i V + v belongs to prototype i and target v."""

    @property
    def vocabulary(self) -> int:
        """Size V of the vocabulary."""
        return self.manifest["vocabulary"]

    @cached_property
    def shards(self) -> list[LogitShard]:
        return [LogitShard.open(path) for path in self.shard_paths]

    def sizes(self) -> dict[str, int]:
        tokens = sum(len(shard.target_errors) for shard in self.shards)
        return {"vocabulary": len(self.curvature["surprise"]), "tokens": tokens}

    def usage_K(self) -> np.ndarray:
        numbers = np.arange(self.num_prototypes + 1) * self.vocabulary
        return np.sum([np.diff(shard.first_entries(numbers)) for shard in self.shards], axis=0)

    def entries_read(self, query: Query) -> int:
        return sum(int(shard.entries(query.lists_U)[1].sum()) for shard in self.shards)

    def postings(self, prototype: int) -> tuple[np.ndarray, np.ndarray]:
        tokens, activations = [], []
        for number, shard in enumerate(self.shards):
            entries = slice(*shard.first_entries(np.array([prototype, prototype + 1]) * self.vocabulary).tolist())
            order = np.argsort(shard.rows[entries], kind="stable")
            tokens.append(shard.rows[entries][order].astype(np.int64) + number * self.shard_tokens)
            activations.append(shard.activations[entries][order])
        return np.concatenate(tokens), np.concatenate(activations)

    def query(self, *records: np.ndarray) -> Query:
        """See `Index`. `records`: prototypes and activations [Q, k], targets and residuals r_q of them [Q, c]."""
        prototypes_Qk, activations_Qk, targets_Qc, residuals_Qc = records
        lists_Qkc = prototypes_Qk[:, :, None].astype(np.int64) * self.vocabulary + targets_Qc[:, None]
        weights_Qkc = activations_Qk[:, :, None] * residuals_Qc[:, None]
        lists_U, place = np.unique(lists_Qkc.ravel(), return_inverse=True)
        weights_U = np.bincount(place, weights_Qkc.ravel(), len(lists_U))
        lists_U, weights_U = (
            lists_U[weights_U != 0],
            weights_U[weights_U != 0],
        )  # removed prototypes
        curvature_U = self._curvature(lists_U)
        weights_U = np.divide(weights_U, curvature_U, out=np.zeros_like(weights_U), where=curvature_U > 0)
        return Query(lists_U, weights_U[:, None].astype(np.float32))

    def _curvature(self, lists_U: np.ndarray) -> np.ndarray:
        """The damped curvature S of some lists."""
        counts_U, sums_U = np.zeros((2, len(lists_U)))
        for shard in self.shards:
            at, present = shard.find(lists_U)
            at = at[present]
            counts_U[present] += shard.offsets[at + 1].astype(np.int64) - shard.offsets[at]
            sums_U[present] += shard.curvature[at]
        prototypes_U, targets_U = np.divmod(lists_U, self.vocabulary)
        prior_U = self.curvature["activation"][prototypes_U] * self.curvature["surprise"][targets_U] / self.targets
        return (counts_U * sums_U + PRIOR * prior_U) / (counts_U + PRIOR) + self.curvature["damping"][0]

    def _hits_by_shard(self, query: Query) -> list[Hits]:
        return [_hits(shard, query) for shard in self.shards]

    def contributions_by_prototype(self, query: Query, tokens: np.ndarray) -> list[list[tuple[int, float]]]:
        contributions: dict[int, list[tuple[int, float]]] = {token: [] for token in tokens.tolist()}
        for number in np.unique(tokens // self.shard_tokens).tolist():
            shard = self.shards[number]
            positions, counts = shard.entries(query.lists_U)
            of_tokens = np.isin(shard.rows[positions], tokens - number * self.shard_tokens)
            rows, list_number = shard.rows[positions[of_tokens]], np.repeat(np.arange(len(counts)), counts)[of_tokens]
            values = (
                shard.activations[positions[of_tokens]]
                * query.vectors_Um[list_number, 0]
                * shard.target_errors.take(rows)
            )
            prototypes = query.lists_U[list_number] // self.vocabulary
            for row, pair in zip(rows.tolist(), zip(prototypes.tolist(), values.tolist(), strict=True), strict=True):
                contributions[row + number * self.shard_tokens].append(pair)
        return [sorted(contributions[token], key=lambda pair: -abs(pair[1])) for token in tokens.tolist()]


def _hits(shard: LogitShard, query: Query) -> Hits:
    """Influence of a shard's tokens, counted from its start."""
    positions, counts = shard.entries(query.lists_U)
    values = shard.activations[positions].astype(np.float32) * np.repeat(query.vectors_Um[:, 0], counts)
    rows = shard.rows[positions]
    if DENSE * len(rows) > len(shard.target_errors):
        total = np.bincount(rows, values)
        tokens = np.flatnonzero(total)
        hits = Hits(tokens.astype(rows.dtype), total[tokens].astype(np.float32))
    else:
        hits = sum_by_token(rows, values)
    return Hits(hits.tokens, hits.influence * shard.target_errors.take(hits.tokens))
