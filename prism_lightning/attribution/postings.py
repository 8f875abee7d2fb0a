"""Posting lists: for every prototype, the rows of a shard's records in which it is active. Numpy only."""

from __future__ import annotations

import numpy as np


def posting_lists(
    prototypes: np.ndarray, activations: np.ndarray, num_prototypes: int, path_vectors: bool
) -> dict[str, np.ndarray]:
    """Lists of all prototypes, one behind the other, each in the order of the tokens.

    Args:
        prototypes, activations: [n, k] of a shard's tokens.
        num_prototypes: K.
        path_vectors: a record has one vector per active prototype (row t k + slot), in place of one (row t).

    Returns:
        offsets [K + 1]; rows; activations beside them. Entries with activation 0 are left out.
    """
    token, slot = np.nonzero(activations > 0)
    order = np.argsort(prototypes[token, slot], kind="stable")
    token, slot = token[order], slot[order]
    counts_K = np.bincount(prototypes[token, slot], minlength=num_prototypes)
    rows = token * prototypes.shape[1] + slot if path_vectors else token
    return {
        "offsets": np.concatenate([[0], np.cumsum(counts_K)]).astype(np.uint32),
        "rows": rows.astype(np.uint32),
        "activations": activations[token, slot],
    }
