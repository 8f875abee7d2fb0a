"""Prototype-Hessian attribution: this project's own index, built and queried as `index` and `attribute` do."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from benchmarks.attribution.corpus import SequenceStore
from benchmarks.attribution.methods.lists import ListMethod
from benchmarks.attribution.task import Queries, Task, hidden, loss_gradients
from prism_lightning.attribution.build.builder import Builder
from prism_lightning.attribution.curvature.dictionary import own_dictionary
from prism_lightning.attribution.curvature.records import LogitRecords, Records, residuals
from prism_lightning.attribution.index.base import Hits, Query, sum_by_token
from prism_lightning.attribution.index.opening import open_index
from prism_lightning.attribution.settings import IndexSettings
from prism_lightning.models import PrismForCausalLM
from prism_lightning.models.encoders import EncoderName
from prism_lightning.models.metric_coordinates import first_prototypes
from prism_lightning.models.polishing import PEAK_LEARNING_RATES, polish
from prism_lightning.models.prototypes import PrototypeLayer


class Prototypes(ListMethod):
    """An index over the sequences as a method.

    Args:
        task, folder: see `Method`.
        damping: of the curvature; may be changed after `open`.
        tokens_per_prototype: sets K of a fitted dictionary.
        polish_steps: with the model's own dictionary: fit its prototypes to the frozen decoder first, as `fit` does.
        encoder: how prototypes of a fitted dictionary are chosen; an index itself takes cosines.
        **settings: of `IndexSettings`.
    """

    def __init__(
        self,
        task: Task,
        folder: Path,
        damping: float | None = None,
        tokens_per_prototype: int | None = None,
        polish_steps: int = 0,
        encoder: EncoderName = "cosine",
        **settings: object,
    ) -> None:
        if polish_steps:
            task = task._replace(model=polished(task, polish_steps))
        if tokens_per_prototype:
            settings["prototypes"] = task.train_SL[:, 1:].numel() // tokens_per_prototype
        if encoder == "pursuit":
            size, active, steps = (int(settings.pop(name)) for name in ("prototypes", "active", "fit_steps"))  # type: ignore[call-overload]
            task = task._replace(model=pursued(task, size, active, steps))
            settings["dictionary"] = "model"
        super().__init__(task, folder)
        self.settings = IndexSettings(damping=damping, **settings)  # type: ignore[arg-type]
        self._damping = self.settings.damping_share

    @property
    def builder(self) -> Builder:
        """The builder of the index."""
        store = SequenceStore(self.task.train_SL, self.folder, self.task.model.config.vocab_size)
        return Builder(self.task.model, store, self.settings, self.folder, lambda *_: None)

    def fit(self) -> None:
        self.builder.build()

    def open(self) -> None:
        self.index = open_index(self.folder, verify=False)
        tensors = load_file(self.folder / "dictionary.safetensors")
        head_VD, active = self.task.model.lm_head.weight, self.index.manifest["active"]
        prototypes_KD, metric_DD = tensors["prototypes"].float(), tensors.get("metric")
        self.dictionary = own_dictionary(prototypes_KD, active, metric_DD, head_VD, exact=True)

    @property
    def damping(self) -> float:
        """Share of the mean curvature that is added to it."""
        return self._damping

    @damping.setter
    def damping(self, value: float) -> None:
        shard_builder = self.builder.shard_builder()
        shard_builder.settings = replace(self.settings, damping=value)  # the folder keeps those it was built with
        self.index.curvature = shard_builder.curvature(self.index.shards, self.index.targets)
        self._damping = value

    @torch.no_grad()
    def records(self, queries: Queries) -> tuple[Records | LogitRecords, np.ndarray]:
        """Return records of all queried targets, with weights in the gradients, and the query of each."""
        model = self.task.model
        query_N, at_N = queries.weights_QT.nonzero(as_tuple=True)
        last = int(at_N.max()) + 1
        z_ND = model.hidden_states(queries.ids_QL[:, :last])[query_N, at_N]
        targets_N, weights_N1 = queries.ids_QL[query_N, at_N + 1], queries.weights_QT[query_N, at_N, None]
        if self.settings.space == "logits":
            _, targets_N1, residuals_N1 = residuals(model.lm_head.weight, z_ND, targets_N)
            records = LogitRecords(*self.dictionary.assign(z_ND), targets_N1, residuals_N1 * weights_N1)
            return records, query_N.numpy()
        delta_ND = loss_gradients(model, z_ND, targets_N) * weights_N1
        return Records(*self.dictionary.assign(z_ND), delta_ND), query_N.numpy()

    def questions(self, queries: Queries) -> list[Query]:
        records, query_N = self.records(queries)
        bounds = np.searchsorted(query_N, np.arange(len(queries.ids_QL) + 1)).tolist()
        return [self.index.query(*records.arrays(slice(first, last))) for first, last in pairwise(bounds)]

    def by_sequence(self, question: Query) -> Hits:
        hits = self.index.score(question)
        return sum_by_token(hits.tokens // (self.task.train_SL.shape[1] - 1), hits.influence)

    def share_read(self, queries: Queries) -> float:
        return float(np.mean([self.index.entries_read(query) for query in self.questions(queries)])) / self.index.tokens

    @torch.no_grad()
    def unexplained_variance(self) -> float:
        """Return the unexplained variance of the first training sequences' hidden states."""
        z_ND = hidden(self.task.model, self.task.train_SL[:256])
        residual_ND = z_ND - self.dictionary.mixture(*self.dictionary.assign(z_ND))
        return (residual_ND.square().sum() / z_ND.square().sum()).item()


@torch.no_grad()
def pursued(task: Task, size: int, active: int, steps: int) -> PrismForCausalLM:
    """Return a copy of the model whose prototypes are fitted to its hidden states for a pursuit."""
    model = deepcopy(task.model)
    z_ND, head_VD = hidden(model, task.train_SL), model.lm_head.weight.detach()
    layer = PrototypeLayer(size, z_ND.shape[1], active, "pursuit")
    drawn = torch.randperm(len(z_ND), generator=torch.Generator().manual_seed(0))
    z_ND = z_ND[drawn]
    layer.weight.data.copy_(first_prototypes(z_ND, size))
    with torch.enable_grad():
        for _ in polish(layer, z_ND, steps, PEAK_LEARNING_RATES["pursuit"], seed=0, head_VD=head_VD):
            pass
    model.prototypes = layer
    model.config.num_prototypes, model.config.active_prototypes = size, active
    return model


@torch.no_grad()
def polished(task: Task, steps: int) -> PrismForCausalLM:
    """Return a copy of the model whose own prototypes are fitted to the hidden states of all training tokens."""
    model = deepcopy(task.model)
    assert model.prototypes is not None
    z_ND = hidden(model, task.train_SL)
    with torch.enable_grad():
        for _ in polish(model.prototypes, z_ND, steps, learning_rate=1e-2, seed=0):
            pass
    return model
