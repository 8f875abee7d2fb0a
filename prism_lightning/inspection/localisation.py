"""Locality of a model's curvature: the share of its Gauss-Newton matrix on the diagonal blocks (section 4.2).

G_ij = E_t[a_ti a_tj M_t] is never formed. With <M, M'> the Frobenius product and t, t' independent tokens,

    sum_ij ||G_ij||^2 = E_tt'[(a_t . a_t')^2 <M_t, M_t'>]
    sum_i  ||G_ii||^2 = E_tt'[sum_i a_ti^2 a_t'i^2 <M_t, M_t'>]

The dense head is measured in the same way, with its hidden units as prototypes: the logits are sum_j z_tj W_:j, so
block (j, l) is E_t[z_tj z_tl (diag(pi_t) - pi_t pi_t^T)].

Shapes: N tokens, n of them sampled, D hidden size, V vocabulary, K prototypes (or hidden units), k active.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import scipy.sparse
import torch
from torch import Tensor

from prism_lightning.attribution.curvature.dictionary import Dictionary
from prism_lightning.attribution.curvature.records import head_chunks
from prism_lightning.models.faithfulness import mixture_faithfulness

DAMPING = 1e-3  # share of the mean diagonal, as in an index
LARGEST_SPECTRUM = 2048  # eigenvalues of larger Grams take minutes and are left out


@dataclass
class Localisation:
    """Measurements of one set of prototypes, or of the dense head.

    Attributes:
        faithfulness: figures of the mixture, see `faithfulness_figures`; empty for the dense head and for random
            prototypes.
        gauss_newton_share: share of the squared Frobenius norm of G on its diagonal blocks.
        activation_share: the same share of the activation Gram E[a_i a_j] alone, over all N tokens.
        coactive_blocks: effective number of blocks in a row of the Gram (inverse participation ratio of its squares).
        read_share: length of the lists of an average token's prototypes, as a share of all tokens. Where nearly all
            tokens share a few prototypes, the diagonal is large but the curvature is not local.
        gram_condition: condition number of the damped Gram, over prototypes in use.
        diagonal_condition: condition number of its damped diagonal.
        curvature_condition: condition number of S = E[M_t], which every block shares.
    """

    name: str
    prototypes: int
    active: int
    faithfulness: dict[str, float]
    gauss_newton_share: float
    activation_share: float
    coactive_blocks: float
    read_share: float
    gram_condition: float | None
    diagonal_condition: float
    curvature_condition: float

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON; the unexplained variance is twice in it, since it was the only figure once."""
        return asdict(self) | {"unexplained_variance": self.faithfulness.get("unexplained_variance")}


def curvatures(head_VD: Tensor, z_nD: Tensor) -> Tensor:
    """Return M_t = W^T (diag(pi_t) - pi_t pi_t^T) W of some tokens, [n, D, D]."""
    out = []
    for chunk in head_chunks(head_VD, z_nD):
        for probability_V, mean_D in zip(chunk.probabilities_CV, chunk.mean_CD, strict=True):
            out.append((head_VD * probability_V[:, None]).T @ head_VD - torch.outer(mean_D, mean_D))
    return torch.stack(out)


def head_products(probabilities_nV: Tensor) -> Tensor:
    """Return <F_t, F_t'> of F_t = diag(pi_t) - pi_t pi_t^T, [n, n], without a [V, V] matrix."""
    squared_nV = probabilities_nV.square()
    plain_nn, mixed_nn = probabilities_nV @ probabilities_nV.T, squared_nV @ probabilities_nV.T
    return plain_nn - mixed_nn - mixed_nn.T + plain_nn.square()


def block_share(activations_nK: scipy.sparse.csr_array, products_nn: np.ndarray, independent: bool = True) -> float:
    """Return the share of ||G||^2 on the diagonal blocks, from <M_t, M_t'> of n tokens.

    Args:
        activations_nK: a_ti.
        products_nn: <M_t, M_t'>.
        independent: whether t = t' is left out, so that the expectation is over independent tokens; without it the
            result is exact for the G of these n tokens.
    """
    overlap_nn = (activations_nK @ activations_nK.T).toarray() ** 2 * products_nn
    squared_nK = activations_nK.power(2)
    diagonal_nn = (squared_nK @ squared_nK.T).toarray() * products_nn
    if independent:
        np.fill_diagonal(overlap_nn, 0)
        np.fill_diagonal(diagonal_nn, 0)
    return float(diagonal_nn.sum() / overlap_nn.sum())


def activation_matrix(indices_Nk: Tensor, activations_Nk: Tensor, size: int) -> scipy.sparse.csr_array:
    """Return a_ti as a sparse matrix [N, K]."""
    tokens, active = indices_Nk.shape
    pointers = np.arange(tokens + 1) * active
    values = activations_Nk.double().flatten().cpu().numpy()
    matrix = scipy.sparse.csr_array((values, indices_Nk.flatten().cpu().numpy(), pointers), shape=(tokens, size))
    matrix.sum_duplicates()
    return matrix


def activation_gram(activations_NK: scipy.sparse.csr_array) -> scipy.sparse.csr_array:
    """Return E[a_i a_j], sparse [K, K]."""
    return (activations_NK.T @ activations_NK).tocsr() / activations_NK.shape[0]


def activation_share(gram_KK: scipy.sparse.csr_array) -> float:
    """Return the share of the Gram's squared Frobenius norm on its diagonal."""
    return float((gram_KK.diagonal() ** 2).sum() / gram_KK.power(2).sum())


def coactive_blocks(gram_KK: scipy.sparse.csr_array) -> float:
    """Return the effective number of blocks in a row: the inverse participation ratio of its squared entries.

    Rows are weighted by their squared norm; rows of unused prototypes are left out.
    """
    squares_KK = gram_KK.power(2)
    second_K, fourth_K = (np.asarray(m.sum(axis=1)).ravel() for m in (squares_KK, squares_KK.power(2)))
    used = second_K > 0
    return float((second_K[used] * (second_K[used] ** 2 / fourth_K[used])).sum() / second_K[used].sum())


def read_share(activations_NK: scipy.sparse.csr_array) -> float:
    """Return the length of the lists of an average token's prototypes, added up, as a share of all tokens."""
    tokens, usage_K = activations_NK.shape[0], np.diff((activations_NK != 0).tocsc().indptr).astype(float)
    return float((usage_K / tokens * usage_K).sum() / tokens)


def gram_condition(gram_KK: scipy.sparse.csr_array) -> float | None:
    """Return the condition number of the damped Gram of the prototypes in use; None for more than LARGEST_SPECTRUM."""
    used = _used(gram_KK)
    size = int(used.sum())
    if size > LARGEST_SPECTRUM:
        return None
    damping = DAMPING * gram_KK.diagonal()[used].mean()
    values = torch.linalg.eigvalsh(torch.from_numpy(gram_KK[used][:, used].toarray() + damping * np.eye(size)))
    return float(values[-1] / values[0])


def diagonal_condition(gram_KK: scipy.sparse.csr_array) -> float:
    """Return the condition number of the damped diagonal of the Gram, over the prototypes in use."""
    diagonal_K = gram_KK.diagonal()[_used(gram_KK)]
    damped_K = diagonal_K + DAMPING * diagonal_K.mean()
    return float(damped_K.max() / damped_K.min())


def curvature_condition(curvature_DD: Tensor) -> float:
    """Return the condition number of S."""
    values = torch.linalg.eigvalsh(curvature_DD.double()).clamp_min(1e-12)
    return float(values[-1] / values[0])


def _used(gram_KK: scipy.sparse.csr_array) -> np.ndarray:
    """[K] whether a prototype is ever active."""
    return np.asarray(gram_KK.power(2).sum(axis=1)).ravel() > 0


def measure_localisation(
    name: str,
    activations_NK: scipy.sparse.csr_array,
    active: int,
    sample: np.ndarray,
    products_nn: np.ndarray,
    curvature_DD: Tensor,
    faithfulness: dict[str, float],
) -> Localisation:
    """Measure one set of activations.

    Args:
        name, active: of the set; the latter is k.
        activations_NK: a_ti.
        sample: the n rows that `products_nn` belongs to.
        products_nn: <M_t, M_t'>.
        curvature_DD: S.
        faithfulness: figures of the mixture, where there is one.
    """
    gram_KK = activation_gram(activations_NK)
    return Localisation(
        name=name,
        prototypes=activations_NK.shape[1],
        active=active,
        faithfulness=faithfulness,
        gauss_newton_share=block_share(activations_NK[sample], products_nn),
        activation_share=activation_share(gram_KK),
        coactive_blocks=coactive_blocks(gram_KK),
        read_share=read_share(activations_NK),
        gram_condition=gram_condition(gram_KK),
        diagonal_condition=diagonal_condition(gram_KK),
        curvature_condition=curvature_condition(curvature_DD),
    )


@torch.no_grad()
def measure_all(
    head_VD: Tensor,
    z_ND: Tensor,
    targets_N: Tensor,
    dictionaries: dict[str, Dictionary],
    sample_size: int,
    seed: int,
) -> Iterator[Localisation]:
    """Measure the dense head, and each dictionary with random prototypes of its size as a control.

    Args:
        head_VD: W.
        z_ND: hidden states of training tokens.
        targets_N: the tokens that follow.
        dictionaries: by name.
        sample_size: number n of tokens whose curvatures are compared in pairs.
        seed: of the sample and of the random prototypes.
    """
    generator = torch.Generator().manual_seed(seed)
    sample = torch.randperm(len(z_ND), generator=generator)[:sample_size].sort().values
    probabilities_nV = torch.cat([chunk.probabilities_CV for chunk in head_chunks(head_VD, z_ND[sample])])
    curvature_nDD = curvatures(head_VD, z_ND[sample])
    mean_DD = curvature_nDD.mean(0)
    flat = curvature_nDD.flatten(1)
    products_nn = (flat @ flat.T).double().cpu().numpy()
    del curvature_nDD, flat
    rows = sample.numpy()
    dense = scipy.sparse.csr_array(z_ND.double().cpu().numpy())
    size = z_ND.shape[1]
    head_nn = head_products(probabilities_nV.double()).cpu().numpy()
    yield measure_localisation("dense head", dense, size, rows, head_nn, mean_DD, {})
    for name, dictionary in dictionaries.items():
        shape = dictionary.prototypes_KD.shape
        control = Dictionary(torch.randn(shape, generator=generator).to(z_ND.device), dictionary.active)
        for label, candidate in ((name, dictionary), (f"random, as {name}", control)):
            indices_Nk, activations_Nk = candidate.assign(z_ND)
            figures = {}
            if candidate is dictionary:
                mixture_nD = candidate.mixture(indices_Nk[sample], activations_Nk[sample])
                figures = mixture_faithfulness(
                    lambda x_CD: x_CD @ head_VD.T, z_ND[sample], mixture_nD, targets_N[sample]
                )
            matrix = activation_matrix(indices_Nk, activations_Nk, shape[0])
            yield measure_localisation(label, matrix, candidate.active, rows, products_nn, mean_DD, figures)
