"""The coordinates in which an index stores records, and the curvature that a query is divided by (section 4.2).

Shapes: K prototypes, D hidden size, m coordinates of a record, h coordinates of a hidden state.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from torch import Tensor


class RecordBasis(NamedTuple):
    """The bases that are fixed before the pass over the tokens."""

    basis_Dm: Tensor  # orthonormal
    eigenvalue_m: Tensor  # of the sample's curvature: coordinates are divided by their roots
    hidden_Dh: Tensor | None  # whitens hidden states, for re-ranking

    @property
    def whitening_Dm(self) -> Tensor:
        """The matrix B^T whose product with a vector is its coordinates: vector @ whitening."""
        return self.basis_Dm / self.eigenvalue_m.sqrt()


def preconditioner(
    basis: RecordBasis, activation_K: np.ndarray, curvature_DD: np.ndarray, tokens: int, damping: float
) -> dict[str, np.ndarray]:
    """Return what turns a query's record into vectors whose dot products with stored coordinates are influences.

    It is 1 / (N (A_ii + d mean A)) for each prototype, and (B (S + d mean S) B^T)^-1 B for the coordinates B v.

    Args:
        basis: of the stored records.
        activation_K, curvature_DD: A_ii and S, means over all tokens.
        tokens: N.
        damping: d.
    """
    size = len(curvature_DD)
    whitening_Dm = basis.whitening_Dm.double().cpu().numpy()
    damped_DD = curvature_DD + damping * np.trace(curvature_DD) / size * np.eye(size)
    inverse_mm = np.linalg.inv(whitening_Dm.T @ damped_DD @ whitening_Dm)
    inverse_activation_K = 1 / (tokens * (activation_K + damping * activation_K.mean()))
    tensors = {
        "inverse_activation": inverse_activation_K.astype(np.float32),
        "precondition": (whitening_Dm @ inverse_mm).astype(np.float32),
    }
    if basis.hidden_Dh is not None:
        tensors["hidden_basis"] = basis.hidden_Dh.float().cpu().numpy()
    return tensors
