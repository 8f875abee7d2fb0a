"""Choices of an index in the space of logits, scored over all pairs of tokens with the same target.

Shapes: N training tokens, k active, K prototypes, V vocabulary, Q query tokens, c targets of each, S sequences.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.choices.retrained import RetrainedBenchmark
from prism_lightning.attribution.curvature.dictionary import Dictionary
from prism_lightning.attribution.curvature.records import head_chunks, residuals, target_error_probability
from prism_lightning.attribution.index.logit_influence import PRIOR
from prism_lightning.attribution.settings import IndexSettings

DEFAULT = (512, 16)  # about one prototype per 128 tokens, as `index` chooses


class LogitChoice(NamedTuple):
    """One way of building and reading an index in the space of logits."""

    dictionary: Dictionary
    curvature: str = "shrunk"  # shrunk, labels, exact, A p, A only, p only, identity
    damping: float = IndexSettings().damping_share
    competitors: int = 0
    weighed: bool = True


def logit_scores(benchmark: RetrainedBenchmark, choice: LogitChoice) -> tuple[Tensor, float]:
    """Return sequence scores [queries, S], and a one-token query's list entries as a share of all tokens."""
    train, queries, vocabulary = benchmark.train, benchmark.queries, len(benchmark.head_VD)
    indices_Nk, activations_Nk = choice.dictionary.assign(train.z_ND)
    query_indices_Qk, weights_Qk = choice.dictionary.assign(queries.z_ND)
    _, targets_Qc, residuals_Qc = residuals(benchmark.head_VD, queries.z_ND, queries.targets_N, choice.competitors)
    target_errors_N = target_error_probability(benchmark.head_VD, train.z_ND, train.targets_N)
    curvature_KV = _curvature(benchmark, choice, indices_Nk, activations_Nk, target_errors_N)
    order = torch.argsort(train.targets_N, stable=True)
    bounds = torch.searchsorted(train.targets_N[order], torch.arange(vocabulary + 1)).tolist()
    scores_QS, entries_read = torch.zeros(benchmark.num_queries, benchmark.included_MS.shape[1]), 0
    weights_N = target_errors_N if choice.weighed else torch.ones_like(target_errors_N)
    for query in range(len(query_indices_Qk)):
        for target, residual in zip(targets_Qc[query].tolist(), residuals_Qc[query].tolist(), strict=True):
            rows = order[bounds[target] : bounds[target + 1]]
            query_K = torch.zeros(len(curvature_KV))
            query_K[query_indices_Qk[query]] = weights_Qk[query] / curvature_KV[query_indices_Qk[query], target]
            terms = query_K[indices_Nk[rows]] * activations_Nk[rows]
            entries_read += int((terms > 0).sum())
            values = terms.sum(1) * weights_N[rows] * (residual if choice.weighed else 1.0)
            scores_QS[queries.group_N[query]].index_add_(0, train.group_N[rows], values)
    return scores_QS, entries_read / len(query_indices_Qk) / len(train.z_ND)


def _curvature(
    benchmark: RetrainedBenchmark,
    choice: LogitChoice,
    indices_Nk: Tensor,
    activations_Nk: Tensor,
    target_errors_N: Tensor,
) -> Tensor:
    """N times the damped diagonal, [K, V]."""
    size, vocabulary, targets_N = len(choice.dictionary.unit_KD), len(benchmark.head_VD), benchmark.train.targets_N
    lists = (indices_Nk * vocabulary + targets_N[:, None]).flatten()
    terms = (activations_Nk.square() * target_errors_N[:, None]).flatten()
    labels_KV = torch.zeros(size * vocabulary).index_add_(0, lists, terms).view(size, vocabulary)
    damping = choice.damping * labels_KV[labels_KV > 0].mean()
    if choice.curvature == "labels":
        return labels_KV + damping
    activation_K = torch.zeros(size).index_add_(0, indices_Nk.flatten(), activations_Nk.square().flatten())
    if choice.curvature == "shrunk":
        counts_KV = torch.zeros(size * vocabulary).index_add_(0, lists, torch.ones(len(lists))).view(size, vocabulary)
        sum_target_error_V = torch.zeros(vocabulary).index_add_(0, targets_N, target_errors_N)
        prior_KV = activation_K[:, None] * sum_target_error_V / len(targets_N)
        return (counts_KV * labels_KV + PRIOR * prior_KV) / (counts_KV + PRIOR) + damping
    exact_KV, spread_V = torch.zeros(size, vocabulary), torch.zeros(vocabulary)
    for chunk in head_chunks(benchmark.head_VD, benchmark.train.z_ND):
        variance_CV, rows = chunk.probabilities_CV * (1 - chunk.probabilities_CV), chunk.rows
        tokens_Ck = torch.arange(len(variance_CV))[:, None].expand_as(indices_Nk[rows])
        where = torch.stack([indices_Nk[rows].flatten(), tokens_Ck.flatten()])
        values, shape = activations_Nk[rows].square().flatten(), (size, len(variance_CV))
        exact_KV += torch.sparse.mm(torch.sparse_coo_tensor(where, values, shape, check_invariants=False), variance_CV)
        spread_V += variance_CV.sum(0)
    undamped_KV = {
        "exact": exact_KV,
        "A p": activation_K[:, None] * spread_V / len(indices_Nk),
        "A only": activation_K[:, None].expand(size, vocabulary),
        "p only": spread_V.expand(size, vocabulary),
        "identity": torch.ones(size, vocabulary),
    }[choice.curvature]
    # The same share of the mean, over as many of the largest cells as there are lists.
    return undamped_KV + choice.damping * undamped_KV.flatten().topk(int((labels_KV > 0).sum())).values.mean()


def logit_choices(benchmark: RetrainedBenchmark) -> Iterator[tuple[str, LogitChoice]]:
    """Yield every variant of the table with its name, the default first."""
    layer = benchmark.model.prototypes
    assert layer is not None
    fitted, name = benchmark.fit(*DEFAULT, IndexSettings.fit_steps), "K {} k {}".format(*DEFAULT)
    yield f"{name} (default)", LogitChoice(fitted)
    for size, active in ((128, 16), (256, 16), (512, 4), (512, 8), (512, 32), (1024, 16), (2048, 16), (2048, 3)):
        yield f"K {size} k {active}", LogitChoice(benchmark.fit(size, active, IndexSettings.fit_steps))
    own = Dictionary(layer.weight.detach(), layer.active)
    yield f"the model's own, K {len(own.unit_KD)} k {own.active}, unpolished", LogitChoice(own)
    for curvature in ("labels", "exact", "A p", "A only", "p only", "identity"):
        yield f"{name}, curvature {curvature}", LogitChoice(fitted, curvature)
    for damping in (0.0, 0.01, 0.2, 1.0):
        yield f"{name}, damping {damping}", LogitChoice(fitted, damping=damping)
    for competitors in (4, 16):
        yield f"{name}, {competitors} competitors", LogitChoice(fitted, competitors=competitors)
    yield f"{name}, errors not weighed by 1 - pi", LogitChoice(fitted, weighed=False)
    for steps in (0, 50, 300):
        yield f"{name}, {steps} fitting steps", LogitChoice(benchmark.fit(*DEFAULT, steps))
