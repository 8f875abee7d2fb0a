"""Scores of documents that prototypes are held against: the head's own influence, hidden states, words."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.retrained import DAMPING, Trial
from prism_lightning.attribution.dictionary import Dictionary


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
