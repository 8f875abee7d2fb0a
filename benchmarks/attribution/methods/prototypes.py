"""Prototype-Hessian attribution: this project's own index, built and queried as `index` and `attribute` do."""

from __future__ import annotations

from copy import deepcopy
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.attribution.corpus import SequenceStore
from benchmarks.attribution.task import Method, Queries, Task
from prism_lightning.attribution.build import Builder
from prism_lightning.attribution.dictionary import Dictionary
from prism_lightning.attribution.files import map_file
from prism_lightning.attribution.frame import preconditioner
from prism_lightning.attribution.index import Hits, Index, Query, summed
from prism_lightning.attribution.records import Records, head_chunks, loss_gradient, records_of
from prism_lightning.attribution.settings import IndexSettings
from prism_lightning.models import PrismForCausalLM
from prism_lightning.models.polishing import polish


class Prototypes(Method):
    """An index over the sequences.

    Args:
        task, folder: see `Method`.
        damping: of the curvature; may be changed after `open`.
        tokens_per_prototype: sets K of a fitted dictionary.
        polish_steps: with the model's own dictionary: fit its prototypes to the frozen decoder first, as `fit` does.
        **settings: of `IndexSettings`.
    """

    def __init__(
        self,
        task: Task,
        folder: Path,
        damping: float = 1e-3,
        tokens_per_prototype: int | None = None,
        polish_steps: int = 0,
        **settings: object,
    ) -> None:
        if polish_steps:
            task = task._replace(model=polished(task, polish_steps))
        super().__init__(task, folder)
        if tokens_per_prototype:
            settings["prototypes"] = task.train_SL[:, 1:].numel() // tokens_per_prototype
        self.settings = IndexSettings(damping=damping, **settings)  # type: ignore[arg-type]
        self._damping = damping

    @property
    def builder(self) -> Builder:
        """What builds it."""
        store = SequenceStore(self.task.train_SL, self.folder, self.task.model.config.vocab_size)
        return Builder(self.task.model, store, self.settings, self.folder, lambda *_: None)

    def fit(self) -> None:
        self.builder.build()

    def open(self) -> None:
        self.index = Index(self.folder, verify=False)
        prototypes_KD = torch.from_numpy(map_file(self.folder / "dictionary.safetensors")["prototypes"].copy())
        self.dictionary = Dictionary(prototypes_KD.float(), self.index.manifest["active"], exact=True)

    @property
    def damping(self) -> float:
        """Share of the mean curvature that is added to it."""
        return self._damping

    @damping.setter
    def damping(self, value: float) -> None:
        self._damping = value
        self.index.curvature = preconditioner(self.builder.frame(), self.index.shards, self.index.tokens, value)

    @torch.no_grad()
    def records(self, queries: Queries) -> tuple[Records, np.ndarray]:
        """Records of all targets asked about, and the query each belongs to; weights are in the gradients."""
        model, head_VD = self.task.model, self.task.model.lm_head.weight
        which_N, at_N = queries.weights_QT.nonzero(as_tuple=True)
        last = int(at_N.max()) + 1
        z_ND = model.hidden_states(queries.ids_QL[:, :last])[which_N, at_N]
        mean_ND = torch.cat([chunk.mean_CD for chunk in head_chunks(head_VD, z_ND)])
        delta_ND = loss_gradient(head_VD, mean_ND, queries.ids_QL[which_N, at_N + 1])
        delta_ND = delta_ND * queries.weights_QT[which_N, at_N, None]
        return records_of(self.dictionary, z_ND, delta_ND, self.settings.activation_path), which_N.numpy()

    def questions(self, queries: Queries) -> list[Query]:
        """The index's question for each query."""
        records, which_N = self.records(queries)
        arrays = [t.numpy() for t in (records.prototypes_Nk, records.activations_Nk, records.vectors_NrD)]
        bounds = np.searchsorted(which_N, np.arange(len(queries.ids_QL) + 1))
        return [self.index.query(*(array[first:last] for array in arrays)) for first, last in pairwise(bounds)]

    def by_sequence(self, query: Query) -> Hits:
        """Influence of every sequence that has a token in common lists with the query."""
        hits = self.index.score(query)
        return summed(hits.tokens // (self.task.train_SL.shape[1] - 1), hits.influence)

    def scores(self, queries: Queries) -> Tensor:
        out = torch.zeros(len(queries.ids_QL), len(self.task.train_SL))
        for row_S, query in zip(out, self.questions(queries), strict=True):
            hits = self.by_sequence(query)
            row_S[torch.from_numpy(hits.tokens)] = torch.from_numpy(hits.influence)
        return out

    def top(self, queries: Queries, count: int) -> Tensor:
        """As `Method.top`; fewer sequences where fewer share a prototype with a query: -1 fills the row."""
        return self.top_of(self.questions(queries), count)

    def top_of(self, questions: list[Query], count: int) -> Tensor:
        """The look-up alone."""
        out = torch.full((len(questions), count), -1)
        for row, query in zip(out, questions, strict=True):
            found = self.by_sequence(query).strongest(count).tokens
            row[: len(found)] = torch.from_numpy(found)
        return out

    def share_read(self, queries: Queries) -> float:
        """List entries that a query reads, as a share of all training tokens; the mean over queries."""
        usage_K = self.index.usage_K()
        read = [usage_K[query.prototypes_U].sum() for query in self.questions(queries)]
        return float(np.mean(read)) / self.index.tokens

    @torch.no_grad()
    def unexplained_variance(self) -> float:
        """Of the first training sequences' hidden states, by this dictionary."""
        z_ND = self.task.model.hidden_states(self.task.train_SL[:256, :-1]).flatten(0, 1)
        residual_ND = z_ND - self.dictionary.mixture(*self.dictionary.assign(z_ND))
        return (residual_ND.square().sum() / z_ND.square().sum()).item()


@torch.no_grad()
def polished(task: Task, steps: int) -> PrismForCausalLM:
    """A copy of the model whose own prototypes are fitted to the hidden states of all training tokens."""
    model = deepcopy(task.model)
    assert model.prototypes is not None
    z_ND = torch.cat([model.hidden_states(ids_BL[:, :-1]).flatten(0, 1) for ids_BL in task.train_SL.split(128)])
    with torch.enable_grad():
        for _ in polish(model.prototypes, z_ND, steps, learning_rate=1e-2, seed=0):
            pass
    return model
