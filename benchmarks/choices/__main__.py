"""Effect of each choice of an index on its agreement with retraining (LDS), and on what a query reads.

python -m benchmarks.choices --config benchmarks/attribution/tinystories.yaml corpus.path=stories.jsonl

Needs the models that `benchmarks.attribution` trains with the same configuration. LDS: the rank correlation, over
models retrained on random halves, between a query's loss and the summed influence of the sequences in the half; mean
over queries, with standard error.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.attribution.config import load_settings
from benchmarks.choices.logit_choices import logit_choices, logit_scores
from benchmarks.choices.retrained import DAMPING, RetrainedBenchmark, Tokens
from benchmarks.choices.variants import activation_path_gradients, block_eigenvalues, residual_gradient
from benchmarks.common import finish
from prism_lightning.attribution.curvature.dictionary import Dictionary
from prism_lightning.attribution.curvature.hessian import eigenbasis
from prism_lightning.attribution.curvature.records import Records
from prism_lightning.attribution.index.quantisation import quantised
from prism_lightning.attribution.settings import IndexSettings

DEFAULT = (2048, 3)  # about one prototype per 32 tokens, as `index` chooses


class Choice(NamedTuple):
    """One way of building and reading an index."""

    dictionary: Dictionary
    curvature: str = "separable"  # identity, A only, S only, separable, eigenvalues, clusters, full
    rank: int | None = None
    precision: str = "fp32"
    activation_path: bool = False
    training_objective: bool = False


def scores(benchmark: RetrainedBenchmark, choice: Choice) -> tuple[Tensor, float, float]:
    """Return sequence scores [Q, S], unexplained variance, and the share of tokens that a one-token query reads."""
    train, queries, dictionary = benchmark.train, benchmark.queries, choice.dictionary
    scale = 2 * benchmark.model.config.reconstruction_weight / train.z_ND.square().sum(-1).mean().item()
    scale = scale if choice.training_objective else 0.0
    records, stored_gradients_NkD = tokens_records(train, choice, scale)
    query_records, query_gradients_NkD = tokens_records(queries, choice, 0.0)
    residual_ND = train.z_ND - dictionary.mixture(records.prototypes_Nk, records.activations_Nk)
    unexplained = (residual_ND.square().sum() / train.z_ND.square().sum()).item()
    usage_K = torch.bincount(records.prototypes_Nk.flatten(), minlength=len(dictionary.unit_KD)).double()
    touched = usage_K[query_records.prototypes_Nk].sum(-1).mean().item() / len(train.z_ND)
    size = benchmark.head_VD.shape[1]
    values_m, basis_Dm = eigenbasis(benchmark.curvature_DD + scale * torch.eye(size), choice.rank or size)
    whitening_Dm = (basis_Dm / values_m.sqrt()).float()
    stored = (stored_gradients_NkD @ whitening_Dm).numpy()
    quantised_rows, scales_N = quantised(stored.reshape(-1, stored.shape[-1]), choice.precision)
    stored_NkM = torch.from_numpy(quantised_rows.astype("float32")).view(stored.shape)
    if scales_N is not None:
        stored_NkM *= torch.from_numpy(scales_N).view(*stored.shape[:2], 1)
    out = [
        benchmark.by_sequence((vectors_KM[records.prototypes_Nk] * stored_NkM).sum((-1, -2)))
        for vectors_KM in query_vectors(
            benchmark, choice, records, query_records, query_gradients_NkD, values_m, whitening_Dm
        )
    ]
    return torch.stack(out), unexplained, touched


def tokens_records(tokens: Tokens, choice: Choice, reconstruction_scale: float) -> tuple[Records, Tensor]:
    """Return the records of some tokens and their gradients g_ti [N, k, D], as the choice has them."""
    dictionary = choice.dictionary
    records = Records(*dictionary.assign(tokens.z_ND), tokens.delta_ND)
    if reconstruction_scale:
        records = residual_gradient(dictionary, tokens.z_ND, records, reconstruction_scale)
    if choice.activation_path:
        return records, activation_path_gradients(dictionary, tokens.z_ND, records)
    return records, records.gradients_NkD()


def query_vectors(
    benchmark: RetrainedBenchmark,
    choice: Choice,
    records: Records,
    query_records: Records,
    query_gradients_NkD: Tensor,
    values_m: Tensor,
    whitening_Dm: Tensor,
) -> Iterator[Tensor]:
    """Yield for each query its gradients [K, m] for every prototype, divided by the chosen curvature."""
    size = len(choice.dictionary.unit_KD)
    gram_KK = _gram(records, size) if choice.curvature in ("clusters", "full") else None
    activation_K = torch.zeros(size).index_add_(
        0, records.prototypes_Nk.flatten(), records.activations_Nk.square().flatten()
    ) / len(records.prototypes_Nk)
    activation_K = activation_K + DAMPING * activation_K.mean()
    if gram_KK is not None:
        if choice.curvature == "clusters":
            cluster_K = coactive_clusters(gram_KK)
            gram_KK = gram_KK * (cluster_K[:, None] == cluster_K)
        solve_KK = torch.linalg.inv(gram_KK + DAMPING * gram_KK.diagonal().mean() * torch.eye(size).double()).float()
    eigenvalue_Km = None
    if choice.curvature == "eigenvalues":
        eigenvalue_Km = _eigenvalues(benchmark, records, size, whitening_Dm * values_m.sqrt().float())
    gradients_NkM = query_gradients_NkD @ whitening_Dm / (1 + DAMPING)
    for query in range(benchmark.num_queries):
        in_query = benchmark.queries.group_N == query
        vectors_KM = torch.zeros(size, gradients_NkM.shape[-1]).index_add_(
            0, query_records.prototypes_Nk[in_query].flatten(), gradients_NkM[in_query].flatten(0, 1)
        )
        if choice.curvature in ("identity", "A only"):
            vectors_KM = vectors_KM * values_m.float()
        if choice.curvature in ("A only", "separable"):
            vectors_KM = vectors_KM / activation_K[:, None]
        elif gram_KK is not None:
            vectors_KM = solve_KK @ vectors_KM
        elif eigenvalue_Km is not None:
            vectors_KM = vectors_KM * values_m.float() / eigenvalue_Km
        yield vectors_KM


def _gram(records: Records, size: int) -> Tensor:
    """E[a_ti a_tj], [K, K]."""
    gram_KK = torch.zeros(size * size, dtype=torch.float64)
    for i_N, a_N in zip(records.prototypes_Nk.T, records.activations_Nk.T, strict=True):
        for j_N, b_N in zip(records.prototypes_Nk.T, records.activations_Nk.T, strict=True):
            gram_KK.index_add_(0, i_N * size + j_N, (a_N * b_N).double())
    return gram_KK.view(size, size) / len(records.prototypes_Nk)


def coactive_clusters(gram_KK: Tensor, largest: int = 32) -> Tensor:
    """Return the group [K] of each prototype by co-activation; the strongest pairs join first, up to `largest`."""
    size = len(gram_KK)
    diagonal_K = gram_KK.diagonal().clamp_min(1e-12).sqrt()
    correlation_KK = torch.triu(gram_KK / diagonal_K[:, None] / diagonal_K, 1)
    values, where = correlation_KK.flatten().topk(min(size * 8, size * size))
    group = list(range(size))
    members = {i: [i] for i in range(size)}
    for pair in where[values > 0].tolist():
        first, second = group[pair // size], group[pair % size]
        if first != second and len(members[first]) + len(members[second]) <= largest:
            for membership in members.pop(second):
                group[membership] = first
                members[first].append(membership)
    return torch.tensor(group)


def _eigenvalues(benchmark: RetrainedBenchmark, records: Records, size: int, basis_Dm: Tensor) -> Tensor:
    eigenvalue_Km = block_eigenvalues(benchmark.head_VD, benchmark.train.z_ND, records, size, basis_Dm)
    return (eigenvalue_Km + DAMPING * eigenvalue_Km.mean()).float()


def head_scores(benchmark: RetrainedBenchmark, dictionary: Dictionary | None) -> Tensor:
    """Return head K-FAC scores (z_q C^-1 z_s)(delta_q S^-1 delta_s) of tokens that share a prototype, or of all."""
    train, queries = benchmark.train, benchmark.queries
    moment_DD, eye_DD = train.z_ND.T.double() @ train.z_ND.double() / len(train.z_ND), torch.eye(train.z_ND.shape[1])
    left_DD, right_DD = (
        torch.linalg.inv(m + DAMPING * m.diagonal().mean() * eye_DD).float()
        for m in (moment_DD, benchmark.curvature_DD)
    )
    whitened_ND, weighed_ND = queries.z_ND @ left_DD, queries.delta_ND @ right_DD
    stored_NK, query_NK = (
        (None, None) if dictionary is None else (membership(dictionary, t.z_ND) for t in (train, queries))
    )
    rows = []
    for query in range(benchmark.num_queries):
        in_query = queries.group_N == query
        scores_QN = (whitened_ND[in_query] @ train.z_ND.T) * (weighed_ND[in_query] @ train.delta_ND.T)
        if stored_NK is not None and query_NK is not None:
            scores_QN *= (stored_NK @ query_NK.to_dense()[in_query].T).T > 0
        rows.append(benchmark.by_sequence(scores_QN.sum(0)))
    return torch.stack(rows)


def membership(dictionary: Dictionary, z_ND: Tensor) -> Tensor:
    """Return a sparse matrix [N, K] that is 1 where a prototype is active."""
    indices_Nk, _ = dictionary.assign(z_ND)
    rows_N = torch.arange(len(z_ND)).repeat_interleave(indices_Nk.shape[1])
    where = torch.stack([rows_N, indices_Nk.flatten()])
    return torch.sparse_coo_tensor(where, torch.ones(indices_Nk.numel()), (len(z_ND), len(dictionary.unit_KD)))


def choices(benchmark: RetrainedBenchmark) -> Iterator[tuple[str, Choice]]:
    """Yield every variant of the table with its name."""
    layer = benchmark.model.prototypes
    assert layer is not None
    own = Dictionary(layer.weight.detach(), layer.active)
    yield f"the model's own, K {len(own.unit_KD)} k {own.active}, unpolished", Choice(own)
    yield "the same, eigenvalues per block", Choice(own, "eigenvalues")
    sizes = [(512, 8), (1024, 2), (1024, 4), (2048, 2), DEFAULT, (2048, 4), (4096, 2), (4096, 3), (4096, 4), (4096, 8)]
    for size, active in [*sizes, (8192, 2), (8192, 3), (8192, 4), (16384, 2)]:
        yield f"fitted, K {size} k {active}", Choice(benchmark.fit(size, active, IndexSettings.fit_steps))
    fitted, name = benchmark.fit(*DEFAULT, IndexSettings.fit_steps), "K {} k {}".format(*DEFAULT)
    for curvature in ("eigenvalues", "clusters", "full", "identity", "A only", "S only"):
        yield f"{name}, {curvature}", Choice(fitted, curvature)
    yield f"{name}, activation path", Choice(fitted, activation_path=True)
    yield f"{name}, training objective", Choice(fitted, training_objective=True)
    for precision in ("fp16", "int8"):
        yield f"{name}, {precision}", Choice(fitted, precision=precision)
    for rank in (64, 32, 16):
        yield f"{name}, int8, rank {rank}", Choice(fitted, rank=rank, precision="int8")
    for steps in (0, 50, 300):
        yield f"{name}, {steps} fitting steps", Choice(benchmark.fit(*DEFAULT, steps))


def main() -> None:
    """Score every choice; print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="Configuration of a run of benchmarks.attribution.")
    parser.add_argument("settings", nargs="*", help="Settings that override the file, as group.name=value.")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="Folder of the JSON file.")
    options = parser.parse_args()
    benchmark = RetrainedBenchmark(load_settings(options.config, options.settings))
    results: list[dict[str, Any]] = []
    default = torch.empty(0)

    def add(space: str, name: str, scores_QS: Tensor, **facts: float) -> None:
        values = torch.from_numpy(benchmark.lds(scores_QS))
        lower, root = values - default, math.sqrt(len(values))  # paired: the same queries
        errors = {"standard_error": values.std().item() / root, "difference_error": lower.std().item() / root}
        result = {"space": space, "choice": name, "lds": values.mean().item(), "minus_default": lower.mean().item()}
        results.append(result | errors | {"slope": benchmark.slope(scores_QS)} | facts)
        print(results[-1], flush=True)

    for name, logit_choice in logit_choices(benchmark):
        scores_QS, touched = logit_scores(benchmark, logit_choice)
        if not results:
            default = torch.from_numpy(benchmark.lds(scores_QS))
        add("logits", name, scores_QS, touched=touched)
    default_QS, _, _ = scores(benchmark, Choice(benchmark.fit(*DEFAULT, IndexSettings.fit_steps), precision="int8"))
    default = torch.from_numpy(benchmark.lds(default_QS))
    add("hidden", "head K-FAC, no first stage", head_scores(benchmark, None))
    for size, active in (DEFAULT, (4096, 4)):
        add(
            "hidden",
            f"head K-FAC behind K {size} k {active}",
            head_scores(benchmark, benchmark.fit(size, active, IndexSettings.fit_steps)),
        )
    for name, choice in choices(benchmark):
        scores_QS, unexplained, touched = scores(benchmark, choice)
        add("hidden", name, scores_QS, unexplained_variance=unexplained, touched=touched)
    rows = [
        [
            r["space"],
            r["choice"],
            f"{r['unexplained_variance']:.3f}" if "unexplained_variance" in r else "",
            f"{r['touched']:.2%}" if "touched" in r else "all",
            f"{r['lds']:.3f} ± {r['standard_error']:.3f}",
            f"{r['minus_default']:+.3f} ± {r['difference_error']:.3f}",
            f"{r['slope']:.2f}",
        ]
        for r in results
    ]
    columns = ["space", "choice", "unexplained variance", "entries read per query token", "LDS", "minus the default"]
    columns.append("slope")
    finish("choices", "Agreement with retraining", columns, rows, results, options.out)


if __name__ == "__main__":
    main()
