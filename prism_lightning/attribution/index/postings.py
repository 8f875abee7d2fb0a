"""Posting lists: the rows of a shard's records in which each prototype is active. Numpy only."""

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


def target_lists(
    prototypes: np.ndarray,
    activations: np.ndarray,
    surprise: np.ndarray,
    targets: np.ndarray,
    vocabulary: int,
    num_prototypes: int,
) -> dict[str, np.ndarray]:
    """Lists of all pairs of a prototype and a target that occur, one behind the other, each in the order of the tokens.

    Args:
        prototypes, activations: [n, k] of a shard's tokens.
        surprise, targets: [n], 1 - pi of each target.
        vocabulary, num_prototypes: V and K.

    Returns:
        lists [P], the numbers prototype V + target of those there are, ascending; offsets [P + 1]; curvature [P], the
        sum of a^2 (1 - pi) over each; rows, and activations beside them; surprise; sum_activation [K], of a^2 over each
        prototype's entries; sum_surprise [V], over the tokens with each target. Entries with activation 0 are left out.
    """
    flat = np.flatnonzero(activations > 0)  # of 16 entries a token these arrays are most of a build's memory
    token = (flat // activations.shape[1]).astype(np.uint32)
    lists = prototypes.ravel()[flat].astype(np.int64) * vocabulary + targets[token]
    order = np.argsort(lists, kind="stable")
    token, values, lists = token[order], activations.ravel()[flat[order]], lists[order]
    starts_P = np.flatnonzero(np.diff(lists, prepend=-1))
    lists_P = lists[starts_P]
    squares = values.astype(np.float64) ** 2
    terms = squares * surprise[token]
    return {
        "lists": lists_P.astype(np.uint32 if vocabulary * num_prototypes < 2**32 else np.int64),
        "offsets": np.append(starts_P, len(token)).astype(np.uint32),
        "curvature": (np.add.reduceat(terms, starts_P) if len(terms) else terms).astype(np.float32),
        "rows": token,
        "activations": values.astype(np.float16),
        "surprise": surprise.astype(np.float16),
        "sum_activation": np.bincount(lists // vocabulary, squares, num_prototypes).astype(np.float32),
        "sum_surprise": np.bincount(targets, surprise, vocabulary).astype(np.float32),
    }
