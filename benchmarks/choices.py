"""What each choice of an index does to its agreement with retraining (LDS), and to what a query reads.

python -m benchmarks.choices --retraining runs/retraining

Needs what `benchmarks.retraining` wrote. LDS: the rank correlation, over models retrained on random halves,
between a query's loss and the summed influence of the documents in the half; mean over queries, with standard error.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from scipy.stats import spearmanr
from torch import Tensor

from benchmarks.report import finish
from prism_lightning.attribution.dictionary import Dictionary, fitted_dictionary
from prism_lightning.attribution.hessian import HessianSums, eigenbasis
from prism_lightning.attribution.quantisation import quantised
from prism_lightning.attribution.records import Records, head_chunks, loss_gradient, records_of
from prism_lightning.data.store import TokenStore
from prism_lightning.exported import load_exported
from prism_lightning.models import PrismForCausalLM

DAMPING = 1e-3
DEFAULT, FIT_STEPS = (2048, 3), 150  # what `index` would choose for this corpus


class Tokens(NamedTuple):
    """Hidden states and loss gradients of some tokens, and the number of the document (or query) each is of."""

    z_ND: Tensor
    delta_ND: Tensor
    group_N: Tensor


class Trial:
    """The model on all documents, the retrained losses, and everything that scores are made of."""

    def __init__(self, folder: Path) -> None:
        self.model, tokenizer = load_exported(folder / "whole")
        losses = load_file(folder / "losses.safetensors")
        self.included_MS, self.losses_MQ = losses["included"].double(), losses["losses"].double()
        prepared = next(path for path in (folder / "cache").iterdir() if self._is_whole(path))
        block_size = self.model.config.context_length
        self.store = TokenStore(prepared, "train", block_size)
        self.query_texts = [json.loads(line)["text"] for line in (folder / "queries.jsonl").open()]
        self.document_texts = [json.loads(line)["text"] for line in (folder / "train.jsonl").open()]
        ids = [tokenizer(text)["input_ids"][: block_size + 1] for text in self.query_texts]
        self.train = self._train_tokens()
        self.queries = self._joined([self._tokens(torch.tensor(i)[None], q) for q, i in enumerate(ids)])
        self.head_VD = self.model.lm_head.weight.detach()
        self.curvature_DD = self._curvature()
        self._fitted: dict[tuple[int, int, int], Dictionary] = {}

    def _is_whole(self, path: Path) -> bool:
        manifest = path / "manifest.json"
        documents = self.included_MS.shape[1]
        return manifest.is_file() and json.loads(manifest.read_text())["train"]["documents"] == documents

    @torch.no_grad()
    def _tokens(self, ids_BT: Tensor, group: int | Tensor) -> Tokens:
        model: PrismForCausalLM = self.model
        z_ND, head_VD = model.hidden_states(ids_BT[:, :-1]).flatten(0, 1), model.lm_head.weight.detach()
        mean_ND = torch.cat([chunk.mean_CD for chunk in head_chunks(head_VD, z_ND)])
        delta_ND = loss_gradient(head_VD, mean_ND, ids_BT[:, 1:].flatten())
        return Tokens(z_ND, delta_ND, torch.as_tensor(group).expand(len(z_ND)))

    def _train_tokens(self) -> Tokens:
        parts = []
        starts = torch.from_numpy(self.store.documents["start"].to_numpy().copy())
        for first in range(0, len(self.store), 64):
            blocks = list(range(first, min(first + 64, len(self.store))))
            items = self.store.__getitems__(blocks)
            ids_BT = torch.stack([torch.cat([item["input_ids"], item["targets"][-1:]]) for item in items])
            count = len(blocks) * self.store.block_size
            positions = torch.arange(count) + first * self.store.block_size + 1
            parts.append(self._tokens(ids_BT, torch.searchsorted(starts, positions, right=True) - 1))
        return self._joined(parts)

    @staticmethod
    def _joined(parts: list[Tokens]) -> Tokens:
        return Tokens(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))

    def _curvature(self) -> Tensor:
        sums = HessianSums(self.head_VD, 1)
        for chunk in head_chunks(self.head_VD, self.train.z_ND):
            sums.add(chunk, torch.zeros(len(chunk.mean_CD), 1).long(), torch.zeros(len(chunk.mean_CD), 1))
        return sums.gauss_newton_DD() / sums.tokens

    def lds(self, scores_QS: Tensor) -> list[float]:
        """Rank correlation of each query with the retrained losses."""
        predicted_MQ = -(self.included_MS @ scores_QS.double().T)
        return [float(spearmanr(*pair).statistic) for pair in zip(predicted_MQ.T, self.losses_MQ.T, strict=True)]

    def by_document(self, scores_N: Tensor) -> Tensor:
        """Token scores summed over documents."""
        return torch.zeros(self.included_MS.shape[1]).index_add_(0, self.train.group_N, scores_N.float())

    def fit(self, size: int, active: int, steps: int) -> Dictionary:
        """A dictionary of this model's hidden states."""
        if (size, active, steps) not in self._fitted:
            *_, last = fitted_dictionary(self.train.z_ND, size, active, steps, 0)
            assert isinstance(last, Dictionary)
            self._fitted[size, active, steps] = last
        return self._fitted[size, active, steps]


class Choice(NamedTuple):
    """One way of building and reading an index."""

    dictionary: Dictionary
    curvature: str = "separable"  # identity, A only, S only, separable, eigenvalues, clusters, full
    rank: int | None = None
    precision: str = "fp32"
    activation_path: bool = False
    training_objective: bool = False


def scores(trial: Trial, choice: Choice) -> tuple[Tensor, float, float]:
    """Document scores [Q, S], unexplained variance, and the share of tokens that a one-token query reads."""
    train, queries, dictionary = trial.train, trial.queries, choice.dictionary
    scale = 2 * trial.model.config.reconstruction_weight / train.z_ND.square().sum(-1).mean().item()
    scale = scale if choice.training_objective else 0.0
    records = records_of(dictionary, train.z_ND, train.delta_ND, choice.activation_path, scale)
    asked = records_of(dictionary, queries.z_ND, queries.delta_ND, choice.activation_path)
    residual_ND = train.z_ND - dictionary.mixture(records.prototypes_Nk, records.activations_Nk)
    unexplained = (residual_ND.square().sum() / train.z_ND.square().sum()).item()
    usage_K = torch.bincount(records.prototypes_Nk.flatten(), minlength=len(dictionary.unit_KD)).double()
    touched = usage_K[asked.prototypes_Nk].sum(-1).mean().item() / len(train.z_ND)
    size = trial.head_VD.shape[1]
    values_m, basis_Dm = eigenbasis(trial.curvature_DD + scale * torch.eye(size), choice.rank or size)
    whitening_Dm = (basis_Dm / values_m.sqrt()).float()
    stored = (records.gradients_NkD() @ whitening_Dm).numpy()
    narrow, scales_N = quantised(stored.reshape(-1, stored.shape[-1]), choice.precision)
    stored_NkM = torch.from_numpy(narrow.astype("float32")).view(stored.shape)
    if scales_N is not None:
        stored_NkM *= torch.from_numpy(scales_N).view(*stored.shape[:2], 1)
    out = [
        trial.by_document((vectors_KM[records.prototypes_Nk] * stored_NkM).sum((-1, -2)))
        for vectors_KM in query_vectors(trial, choice, records, asked, values_m, whitening_Dm)
    ]
    return torch.stack(out), unexplained, touched


def query_vectors(
    trial: Trial, choice: Choice, records: Records, asked: Records, values_m: Tensor, whitening_Dm: Tensor
) -> Iterator[Tensor]:
    """For each query [K, m]: its gradient for every prototype, divided by the chosen curvature."""
    size = len(choice.dictionary.unit_KD)
    gram_KK = _gram(records, size) if choice.curvature in ("clusters", "full") else None
    activation_K = torch.zeros(size).index_add_(
        0, records.prototypes_Nk.flatten(), records.activations_Nk.square().flatten()
    ) / len(records.prototypes_Nk)
    activation_K = activation_K + DAMPING * activation_K.mean()
    if gram_KK is not None:
        if choice.curvature == "clusters":
            cluster_K = clusters(gram_KK)
            gram_KK = gram_KK * (cluster_K[:, None] == cluster_K)
        solve_KK = torch.linalg.inv(gram_KK + DAMPING * gram_KK.diagonal().mean() * torch.eye(size).double()).float()
    eigenvalue_Km = None
    if choice.curvature == "eigenvalues":
        eigenvalue_Km = _eigenvalues(trial, records, size, whitening_Dm * values_m.sqrt().float())
    gradients_NkM = asked.gradients_NkD() @ whitening_Dm / (1 + DAMPING)
    for query in range(len(trial.query_texts)):
        mine = trial.queries.group_N == query
        vectors_KM = torch.zeros(size, gradients_NkM.shape[-1]).index_add_(
            0, asked.prototypes_Nk[mine].flatten(), gradients_NkM[mine].flatten(0, 1)
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


def clusters(gram_KK: Tensor, largest: int = 32) -> Tensor:
    """Prototypes grouped by co-activation: the strongest pairs are joined first, up to `largest` in a group."""
    size = len(gram_KK)
    diagonal_K = gram_KK.diagonal().clamp_min(1e-12).sqrt()
    correlation_KK = torch.triu(gram_KK / diagonal_K[:, None] / diagonal_K, 1)
    values, where = correlation_KK.flatten().topk(min(size * 8, size * size))
    group = list(range(size))
    members = {i: [i] for i in range(size)}
    for pair in where[values > 0].tolist():
        one, two = group[pair // size], group[pair % size]
        if one != two and len(members[one]) + len(members[two]) <= largest:
            for member in members.pop(two):
                group[member] = one
                members[one].append(member)
    return torch.tensor(group)


def _eigenvalues(trial: Trial, records: Records, size: int, basis_Dm: Tensor) -> Tensor:
    sums = HessianSums(trial.head_VD, size, basis_Dm)
    for chunk in head_chunks(trial.head_VD, trial.train.z_ND):
        sums.add(chunk, records.prototypes_Nk[chunk.rows], records.activations_Nk[chunk.rows])
    assert sums.eigenvalue_Km is not None
    found_Km = sums.eigenvalue_Km / sums.tokens
    return (found_Km + DAMPING * found_Km.mean()).float()


def head_scores(trial: Trial, curvature: bool, shared: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """The dense head's own influence: K-FAC (z_q C^-1 z_s)(delta_q S^-1 delta_s), or the plain gradient dot product."""
    train, queries = trial.train, trial.queries
    size = train.z_ND.shape[1]
    second_DD = train.z_ND.T.double() @ train.z_ND.double() / len(train.z_ND)
    eye_DD = torch.eye(size).double()
    left_DD, right_DD = eye_DD, eye_DD
    if curvature:
        left_DD, right_DD = (
            torch.linalg.inv(m + DAMPING * m.diagonal().mean() * eye_DD) for m in (second_DD, trial.curvature_DD)
        )
    asked_ND, weighed_ND = queries.z_ND @ left_DD.float(), queries.delta_ND @ right_DD.float()
    rows = []
    for mine in (queries.group_N == q for q in range(len(trial.query_texts))):
        scores_QN = (asked_ND[mine] @ train.z_ND.T) * (weighed_ND[mine] @ train.delta_ND.T)
        rows.append(trial.by_document((scores_QN if shared is None else scores_QN * shared(mine)).sum(0)))
    return torch.stack(rows)


def second_stage_scores(trial: Trial, dictionary: Dictionary) -> Tensor:
    """The head's K-FAC, of those training tokens alone that share a prototype with the query token."""
    size = len(dictionary.unit_KD)
    stored, asked = (dictionary.assign(tokens.z_ND)[0] for tokens in (trial.train, trial.queries))
    member_NK = torch.sparse_coo_tensor(
        torch.stack([torch.arange(len(stored)).repeat_interleave(stored.shape[1]), stored.flatten()]),
        torch.ones(stored.numel()),
        (len(stored), size),
    )
    return head_scores(trial, True, lambda mine: (member_NK @ _indicator(asked[mine], size).T).T > 0)


def _indicator(indices_Nk: Tensor, size: int) -> Tensor:
    return torch.zeros(len(indices_Nk), size).scatter_(1, indices_Nk, 1.0)


def cosine_scores(trial: Trial) -> Tensor:
    """Cosine of mean hidden states."""
    means = []
    for tokens, count in ((trial.queries, len(trial.query_texts)), (trial.train, trial.included_MS.shape[1])):
        means.append(torch.zeros(count, tokens.z_ND.shape[1]).index_add_(0, tokens.group_N, tokens.z_ND))
    queries_QD, documents_SD = (torch.nn.functional.normalize(mean, dim=-1) for mean in means)
    return queries_QD @ documents_SD.T


def bm25_scores(queries: list[str], documents: list[str], k1: float = 1.2, b: float = 0.75) -> Tensor:
    """Okapi BM25 of whole words."""
    words = [Counter(re.findall(r"\w+", text.lower())) for text in documents]
    lengths = [sum(count.values()) for count in words]
    mean = sum(lengths) / len(lengths)
    containing = Counter(word for count in words for word in count)
    rows = []
    for query in queries:
        row = torch.zeros(len(documents))
        for word in re.findall(r"\w+", query.lower()):
            rarity = math.log(1 + (len(documents) - containing[word] + 0.5) / (containing[word] + 0.5))
            for number, count in enumerate(words):
                if word in count:
                    frequency = count[word]
                    row[number] += (
                        rarity * frequency * (k1 + 1) / (frequency + k1 * (1 - b + b * lengths[number] / mean))
                    )
        rows.append(row)
    return torch.stack(rows)


def choices(trial: Trial) -> Iterator[tuple[str, Choice]]:
    """Every variant of the table, with its name."""
    layer = trial.model.prototypes
    assert layer is not None
    own = Dictionary(layer.weight.detach(), layer.active)
    yield f"the model's own, K {len(own.unit_KD)} k {own.active}, unpolished", Choice(own)
    yield "the same, eigenvalues per block", Choice(own, "eigenvalues")
    sizes = [(512, 8), (1024, 2), (1024, 4), (2048, 2), DEFAULT, (2048, 4), (4096, 2), (4096, 3), (4096, 4), (4096, 8)]
    for size, active in [*sizes, (8192, 2), (8192, 3), (8192, 4), (16384, 2)]:
        yield f"fitted, K {size} k {active}", Choice(trial.fit(size, active, FIT_STEPS))
    fitted, name = trial.fit(*DEFAULT, FIT_STEPS), "K {} k {}".format(*DEFAULT)
    for curvature in ("eigenvalues", "clusters", "full", "identity", "A only", "S only"):
        yield f"{name}, {curvature}", Choice(fitted, curvature)
    yield f"{name}, activation path", Choice(fitted, activation_path=True)
    yield f"{name}, training objective", Choice(fitted, training_objective=True)
    for precision in ("fp16", "int8"):
        yield f"{name}, {precision}", Choice(fitted, precision=precision)
    for rank in (64, 32, 16):
        yield f"{name}, int8, rank {rank}", Choice(fitted, rank=rank, precision="int8")
    for steps in (0, 50, 300):
        yield f"{name}, {steps} fitting steps", Choice(trial.fit(*DEFAULT, steps))


def main() -> None:
    """Score every choice, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--retraining", type=Path, default=Path("runs/retraining"), help="what that benchmark wrote")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder of the JSON file")
    options = parser.parse_args()
    trial = Trial(options.retraining)
    results: list[dict[str, Any]] = []
    default_QS, _, _ = scores(trial, Choice(trial.fit(*DEFAULT, FIT_STEPS), precision="int8"))
    default = torch.tensor(trial.lds(default_QS))

    def add(name: str, scores_QS: Tensor, **facts: float) -> None:
        values = torch.tensor(trial.lds(scores_QS))
        lower, root = values - default, math.sqrt(len(values))  # paired: the same queries
        errors = {"standard_error": values.std().item() / root, "difference_error": lower.std().item() / root}
        found = {"choice": name, "lds": values.mean().item(), "minus_default": lower.mean().item()}
        results.append(found | errors | facts)
        print(results[-1], flush=True)

    add("head K-FAC", head_scores(trial, True))
    add("head gradient dot product", head_scores(trial, False))
    add("hidden-state cosine", cosine_scores(trial))
    add("BM25", bm25_scores(trial.query_texts, trial.document_texts))
    add("random", torch.rand(len(trial.query_texts), trial.included_MS.shape[1]))
    for size, active in (DEFAULT, (4096, 4)):
        scores_QS = second_stage_scores(trial, trial.fit(size, active, FIT_STEPS))
        add(f"second stage: head K-FAC behind K {size} k {active}", scores_QS)
    for name, choice in choices(trial):
        scores_QS, unexplained, touched = scores(trial, choice)
        add(name, scores_QS, unexplained_variance=unexplained, touched=touched)
    rows = [
        [
            r["choice"],
            f"{r['unexplained_variance']:.3f}" if "touched" in r else "",
            f"{r['touched']:.2%}" if "touched" in r else "all",
            f"{r['lds']:.3f} ± {r['standard_error']:.3f}",
            f"{r['minus_default']:+.3f} ± {r['difference_error']:.3f}",
        ]
        for r in results
    ]
    columns = ["choice", "unexplained variance", "tokens read per query token", "LDS", "minus the default"]
    finish("choices", "Agreement with retraining", columns, rows, results, options.out)


if __name__ == "__main__":
    main()
