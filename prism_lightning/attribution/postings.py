"""Posting lists: for every prototype, the rows of the training tokens in which it is active. Numpy only."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np


def merged_postings(
    shards: Iterable[tuple[np.ndarray, np.ndarray]], num_prototypes: int, path_vectors: bool
) -> dict[str, np.ndarray]:
    """Lists of all prototypes, one behind the other, each in the order of the training tokens.

    Args:
        shards: prototypes [n, k] and activations [n, k] of each shard's tokens, in order.
        num_prototypes: K.
        path_vectors: a record has one vector per active prototype, in place of one per token.

    Returns:
        offsets [K + 1]; rows, of the records' vectors; activations beside them. Entries with activation 0 are left out.
    """
    shards = list(shards)
    counts_K = np.zeros(num_prototypes, dtype=np.int64)
    for prototypes, activations in shards:
        counts_K += np.bincount(prototypes[activations > 0], minlength=num_prototypes)
    offsets = np.concatenate([[0], np.cumsum(counts_K)])
    total = sum(p.shape[0] * (p.shape[1] if path_vectors else 1) for p, _ in shards)
    rows = np.empty(offsets[-1], dtype=np.uint32 if total < 2**32 else np.int64)
    out_activations = np.empty(offsets[-1], dtype=shards[0][1].dtype if shards else np.float16)
    filled_K, first_token = offsets[:-1].copy(), 0
    for prototypes, activations in shards:
        token, slot = np.nonzero(activations > 0)
        active = prototypes[token, slot].astype(np.int64)
        order = np.argsort(active, kind="stable")
        active, token, slot = active[order], token[order], slot[order]
        # The n-th entry of a prototype within this shard lands n behind what earlier shards filled.
        starts = np.flatnonzero(np.diff(active, prepend=-1))
        within = np.arange(len(active)) - np.repeat(starts, np.diff(starts, append=len(active)))
        place = filled_K[active] + within
        whole = token + first_token
        rows[place] = whole * prototypes.shape[1] + slot if path_vectors else whole
        out_activations[place] = activations[token, slot]
        filled_K += np.bincount(active, minlength=num_prototypes)
        first_token += len(prototypes)
    return {"offsets": offsets, "rows": rows, "activations": out_activations}
