"""A retrained benchmark run in memory, on which `benchmarks.choices` scores variants.

Shapes: N tokens, D hidden size, S training sequences, Q queries, K prototypes, k active.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks.attribution.config import Settings
from benchmarks.attribution.corpus import open_corpus
from benchmarks.attribution.lds import predictions, rank_correlation
from benchmarks.attribution.retraining import decoder
from benchmarks.attribution.scoring import truth
from benchmarks.attribution.task import hidden, loss_gradients
from prism_lightning.attribution.curvature.dictionary import Dictionary, fitted_dictionary
from prism_lightning.attribution.curvature.hessian import mean_curvature

DAMPING = 1e-3


class Tokens(NamedTuple):
    """Hidden states, loss gradients and targets of some tokens, and the sequence or query of each."""

    z_ND: Tensor
    delta_ND: Tensor
    targets_N: Tensor
    group_N: Tensor


class RetrainedBenchmark:
    """The first decoder of a run with its main commitment, its losses after retraining, and its tokens' gradients."""

    def __init__(self, run: Settings) -> None:
        corpus, size, commitment = open_corpus(run), run.retraining.variant_size, run.training.commitments[0]
        self.model = decoder(run, commitment, size, 0)
        self.head_VD = self.model.lm_head.weight.detach()
        known = truth(run, commitment, size)
        self.included_MS, self.losses_QM = known["included"], known["sequence"].mean(0)
        self.train = self._tokens(corpus.train_SL[:size])
        self.queries = self._tokens(corpus.queries_QL)
        self.num_queries = len(corpus.queries_QL)
        self.curvature_DD = mean_curvature(self.head_VD, self.train.z_ND)
        self._fitted: dict[tuple[int, int, int], Dictionary] = {}

    def _tokens(self, ids_SL: Tensor) -> Tokens:
        z_ND, targets_ST = hidden(self.model, ids_SL), ids_SL[:, 1:]
        group_N = torch.arange(len(ids_SL)).repeat_interleave(targets_ST.shape[1])
        targets_N = targets_ST.flatten()
        return Tokens(z_ND, loss_gradients(self.model, z_ND, targets_N), targets_N, group_N)

    def lds(self, scores_QS: Tensor) -> np.ndarray:
        """Return rank correlations [Q] with the retrained losses."""
        return rank_correlation(predictions(self.included_MS, scores_QS.numpy()), self.losses_QM)

    def slope(self, scores_QS: Tensor) -> float:
        """Return the median change of retrained losses per nat of summed influence; 1 if influences were exact."""
        predicted_QM = predictions(self.included_MS, scores_QS.numpy())
        centred_QM = predicted_QM - predicted_QM.mean(1, keepdims=True)
        return float(np.median((centred_QM * self.losses_QM).sum(1) / np.square(centred_QM).sum(1)))

    def by_sequence(self, scores_N: Tensor) -> Tensor:
        """Return token scores summed over sequences."""
        return torch.zeros(self.included_MS.shape[1]).index_add_(0, self.train.group_N, scores_N.float())

    def fit(self, size: int, active: int, steps: int) -> Dictionary:
        """Return a dictionary fitted to this model's hidden states."""
        if (size, active, steps) not in self._fitted:
            self._fitted[size, active, steps] = fitted_dictionary(self.train.z_ND, size, active, steps, 0)
        return self._fitted[size, active, steps]
