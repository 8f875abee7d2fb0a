"""Gauss-Newton statistics equal an explicit Gauss-Newton matrix, built from Jacobians (float64)."""

import pytest
import torch
from support.corpus_model import hidden_and_targets

from benchmarks.choices.variants import block_eigenvalues
from prism_lightning.attribution.curvature.dictionary import Dictionary
from prism_lightning.attribution.curvature.hessian import HessianSums, eigenbasis
from prism_lightning.attribution.curvature.records import Records, head_chunks

TOKENS = 60


@pytest.fixture
def explicit(model, store):
    """Statistics of 60 tokens, and the whole Gauss-Newton matrix [K, D, K, D] of their mean loss."""
    model = model.double()
    z_ND, _ = hidden_and_targets(model, store)
    z_ND, head_VD = z_ND[:TOKENS], model.lm_head.weight.detach()
    dictionary = Dictionary(model.prototypes.weight.detach(), 3)
    indices_Nk, activations_Nk = dictionary.assign(z_ND)
    size = len(dictionary.unit_KD)
    gauss_newton = torch.zeros(size, 16, size, 16, dtype=torch.float64)
    for t in range(TOKENS):

        def logits_of(prototypes_KD, t=t):
            mixture_D = activations_Nk[t] @ prototypes_KD[indices_Nk[t]]
            return head_VD @ (z_ND[t] - mixture_D.detach() + mixture_D)

        jacobian_VKD = torch.autograd.functional.jacobian(logits_of, dictionary.prototypes_KD)
        probability_V = (head_VD @ z_ND[t]).softmax(-1)
        hessian_VV = probability_V.diag() - torch.outer(probability_V, probability_V)
        gauss_newton += torch.einsum("vid,vw,wje->idje", jacobian_VKD, hessian_VV, jacobian_VKD) / TOKENS
    return head_VD, z_ND, indices_Nk, activations_Nk, gauss_newton


def sums_over(head_VD, z_ND, indices_Nk, activations_Nk):
    sums = HessianSums(head_VD, 24)
    for chunk in head_chunks(head_VD, z_ND):
        sums.add(chunk, indices_Nk[chunk.rows], activations_Nk[chunk.rows])
    return sums


def test_eigenvalues_are_the_blocks_along_the_basis(explicit):
    head_VD, z_ND, indices_Nk, activations_Nk, gauss_newton = explicit
    _, basis_Dm = eigenbasis(sums_over(head_VD, z_ND, indices_Nk, activations_Nk).gauss_newton_DD(), 16)
    records = Records(indices_Nk, activations_Nk, torch.empty(0))
    eigenvalue_Km = block_eigenvalues(head_VD, z_ND, records, 24, basis_Dm)
    blocks_KDD = torch.einsum("idie->ide", gauss_newton)
    expected_Km = torch.einsum("dm,ide,em->im", basis_Dm, blocks_KDD, basis_Dm)
    assert (eigenvalue_Km - expected_Km).abs().max() < 1e-8
    assert expected_Km.max() > 1e-3


def test_factors_are_the_mean_curvature_and_the_mean_squared_activations(explicit):
    head_VD, z_ND, indices_Nk, activations_Nk, gauss_newton = explicit
    sums = sums_over(head_VD, z_ND, indices_Nk, activations_Nk)
    one = torch.ones(TOKENS, 1, dtype=torch.float64)
    # One prototype, always active at 1: its Gauss-Newton block is S itself.
    alone = Records(torch.zeros(TOKENS, 1).long(), one, torch.empty(0))
    eigenvalue_Km = block_eigenvalues(head_VD, z_ND, alone, 24, torch.eye(16, dtype=torch.float64))
    assert (eigenvalue_Km[0] * TOKENS - sums.gauss_newton_DD().diagonal()).abs().max() < 1e-8
    dense_NK = torch.zeros(TOKENS, 24, dtype=torch.float64).scatter_(1, indices_Nk, activations_Nk)
    assert (sums.activation_K - dense_NK.square().sum(0)).abs().max() < 1e-12
    # The trace of a block is linear in both: sum_i tr G_ii = E[sum_i a_i^2 tr M].
    traces = torch.stack([m.trace() for m in _curvatures(head_VD, z_ND)])
    total = torch.einsum("idid->", gauss_newton) * TOKENS
    assert torch.allclose(total, (dense_NK.square().sum(1) * traces).sum())


def _curvatures(head_VD, z_ND):
    from prism_lightning.inspection.localisation import curvatures

    return curvatures(head_VD, z_ND)


def test_the_share_on_diagonal_blocks_is_that_of_the_explicit_matrix(explicit):
    from prism_lightning.inspection.localisation import activation_matrix, block_share

    head_VD, z_ND, indices_Nk, activations_Nk, gauss_newton = explicit
    flat = _curvatures(head_VD, z_ND).flatten(1)
    matrix = activation_matrix(indices_Nk, activations_Nk, 24)
    got = block_share(matrix, (flat @ flat.T).numpy(), independent=False)
    diagonal = torch.einsum("idie->ide", gauss_newton).square().sum()
    assert got == pytest.approx((diagonal / gauss_newton.square().sum()).item(), abs=1e-10)


def test_products_of_output_curvatures_need_no_vocabulary_square(explicit):
    from prism_lightning.inspection.localisation import head_products

    head_VD, z_ND, *_ = explicit
    probabilities_nV = (z_ND[:6] @ head_VD.T).softmax(-1)
    matrices = torch.stack([p.diag() - torch.outer(p, p) for p in probabilities_nV]).flatten(1)
    assert torch.allclose(head_products(probabilities_nV), matrices @ matrices.T, atol=1e-14)
