"""All training tokens with the query's target, by surprise: the floor of what prototypes add in the space of logits.

It is the influence through a bias of the logits with a diagonal curvature: what an index in that space computes with
one prototype that is active everywhere.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

from benchmarks.attribution.methods.lists import ListMethod
from benchmarks.attribution.task import Queries, Task, hidden
from prism_lightning.attribution.files import map_file, write_file
from prism_lightning.attribution.index import Hits, summed
from prism_lightning.attribution.logit_index import entries_of, places
from prism_lightning.attribution.postings import target_lists
from prism_lightning.attribution.records import surprise


class TargetMatch(ListMethod):
    """Lists by target.

    Args:
        task, folder: see `Method`.
        damping: share of the mean curvature of all targets that is added to it.
    """

    def __init__(self, task: Task, folder: Path, damping: float = 0.05) -> None:
        super().__init__(task, folder)
        self.damping, self.length = damping, task.train_SL.shape[1] - 1

    @torch.no_grad()
    def fit(self) -> None:
        head_VD, targets_N = self.task.model.lm_head.weight, self.task.train_SL[:, 1:].flatten()
        surprise_N = surprise(head_VD, hidden(self.task.model, self.task.train_SL), targets_N)
        shape = (len(targets_N), 1)
        lists = target_lists(
            np.zeros(shape, int), np.ones(shape), surprise_N.numpy(), targets_N.numpy(), len(head_VD), 1
        )
        del lists["activations"]
        write_file(self.folder / "lists.safetensors", lists)

    def open(self) -> None:
        self.state = map_file(self.folder / "lists.safetensors")

    @torch.no_grad()
    def questions(self, queries: Queries) -> list[tuple[np.ndarray, np.ndarray]]:
        """As `ListMethod`: the targets asked about, and the weight of each."""
        which_N, at_N = queries.weights_QT.nonzero(as_tuple=True)
        z_ND = self.task.model.hidden_states(queries.ids_QL[:, : int(at_N.max()) + 1])[which_N, at_N]
        targets_N = queries.ids_QL[which_N, at_N + 1]
        surprise_N = surprise(self.task.model.lm_head.weight, z_ND, targets_N)
        at, found = places(self.state, targets_N.numpy())
        curvature_N = self.state["curvature"][at] * found + self.damping * self.state["curvature"].mean()
        weights_N = (surprise_N * queries.weights_QT[which_N, at_N]).numpy() / curvature_N
        bounds = np.searchsorted(which_N.numpy(), np.arange(len(queries.ids_QL) + 1)).tolist()
        return [(targets_N[a:b].numpy(), weights_N[a:b]) for a, b in pairwise(bounds)]

    def by_sequence(self, question: tuple[np.ndarray, np.ndarray]) -> Hits:
        targets, weights = question
        positions, counts = entries_of(self.state, targets)
        rows = self.state["rows"][positions].astype(np.int64)
        return summed(rows // self.length, self.state["surprise"].take(rows) * np.repeat(weights, counts))

    def share_read(self, queries: Queries) -> float:
        counts = [entries_of(self.state, np.unique(targets))[1].sum() for targets, _ in self.questions(queries)]
        return float(np.mean(counts)) / self.task.train_SL[:, 1:].numel()
