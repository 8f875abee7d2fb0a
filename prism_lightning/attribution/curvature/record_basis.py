"""What every record of an index is expressed in, and what a query is divided by."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from torch import Tensor

from prism_lightning.attribution.curvature.dictionary import Dictionary


class RecordBasis(NamedTuple):
    """What is fixed before the pass: the dictionary, and the bases in which records are stored."""

    dictionary: Dictionary
    basis_Dm: Tensor  # orthonormal
    eigenvalue_m: Tensor  # of the sample's curvature: coordinates are divided by their roots
    hidden_Dh: Tensor | None
    reconstruction_scale: float

    @property
    def whitening_Dm(self) -> Tensor:
        """Coordinates of a vector are vector @ whitening."""
        return self.basis_Dm / self.eigenvalue_m.sqrt()


def preconditioner(
    basis: RecordBasis,
    activation_K: np.ndarray,
    curvature_DD: np.ndarray,
    eigenvalue_Km: np.ndarray | None,
    tokens: int,
    damping: float,
) -> dict[str, np.ndarray]:
    """What turns a query's record into vectors whose dot products with stored coordinates are influences.

    Args:
        frame: the bases of the records.
        activation_K, curvature_DD: A_ii and S, means over all tokens.
        eigenvalue_Km: mean eigenvalues of each prototype's own curvature; None for separable curvature.
        tokens: N.
        damping: d.

    Separable: 1 / (N (A_ii + d mean A)) per prototype, and (B (S + d mean S) B^T)^-1 B for the whitened coordinates
    B v. Eigenvalues: 1 / N, B rescaled, and lambda_i + d mean(lambda) per prototype. With the training objective the
    curvature of w_rec L_rec, which is 2 w_rec / mean ||z||^2 times A_ii, is added.
    """
    size = len(curvature_DD)
    whitening_Dm = basis.whitening_Dm.double().cpu().numpy()
    curvature_DD = curvature_DD + basis.reconstruction_scale * np.eye(size)
    tensors: dict[str, np.ndarray] = {}
    if eigenvalue_Km is not None:
        eigenvalue_Km = eigenvalue_Km + basis.reconstruction_scale * activation_K[:, None]
        tensors["eigenvalues"] = (eigenvalue_Km + damping * eigenvalue_Km.mean()).astype(np.float32)
        tensors["inverse_activation"] = np.full(len(activation_K), 1 / tokens, dtype=np.float32)
        tensors["precondition"] = (whitening_Dm * basis.eigenvalue_m.double().cpu().numpy()).astype(np.float32)
    else:
        damped_DD = curvature_DD + damping * np.trace(curvature_DD) / size * np.eye(size)
        inverse_mm = np.linalg.inv(whitening_Dm.T @ damped_DD @ whitening_Dm)
        tensors["inverse_activation"] = (1 / (tokens * (activation_K + damping * activation_K.mean()))).astype(
            np.float32
        )
        tensors["precondition"] = (whitening_Dm @ inverse_mm).astype(np.float32)
    if basis.hidden_Dh is not None:
        tensors["hidden_basis"] = basis.hidden_Dh.float().cpu().numpy()
    return tensors
