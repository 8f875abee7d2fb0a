"""All training tokens with the query's target, by their target error probability, or also by their hidden states.

The first is the influence through a bias of the logits with a diagonal curvature. An index in the space of logits with
one prototype that is active everywhere computes the same, so it is the baseline of what prototypes add. The second is
the influence through the head's weights, with E[z z^T] in place of prototypes and the same diagonal, on the same lists.

Shapes: Q queries, T targets of each, N of them asked about, U different targets of a query, D hidden size, m
coordinates kept of hidden states.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.attribution.methods.lists import ListMethod
from benchmarks.attribution.task import Queries, Task, hidden
from prism_lightning.attribution.curvature.hessian import eigenbasis
from prism_lightning.attribution.curvature.records import target_error_probability
from prism_lightning.attribution.index.base import Hits, sum_by_token
from prism_lightning.attribution.index.quantisation import quantised
from prism_lightning.attribution.index.shards import LogitShard, entries_of, find_lists
from prism_lightning.common.files import map_file, write_file


class TargetMatch(ListMethod):
    """Posting lists by target.

    Args:
        task, folder: see `Method`.
        damping: share of the mean curvature of all targets that is added to it.
    """

    def __init__(self, task: Task, folder: Path, damping: float = 0.05) -> None:
        super().__init__(task, folder)
        self.damping, self.length = damping, task.train_SL.shape[1] - 1

    @torch.no_grad()
    def fit(self) -> None:
        write_file(self.folder / "lists.safetensors", self.lists(hidden(self.task.model, self.task.train_SL)))

    def lists(self, z_ND: Tensor) -> dict[str, np.ndarray]:
        """Return the lists of every target that occurs, one after the other."""
        head_VD, targets_N = self.task.model.lm_head.weight, self.task.train_SL[:, 1:].flatten()
        target_errors_N, shape = target_error_probability(head_VD, z_ND, targets_N).numpy(), (len(targets_N), 1)
        shard = LogitShard.of_tokens(
            np.zeros(shape, int), np.ones(shape), target_errors_N, targets_N.numpy(), len(head_VD), num_prototypes=1
        )
        tensors = shard.tensors()
        del tensors["activations"]  # all are 1
        return tensors

    def open(self) -> None:
        self.state = map_file(self.folder / "lists.safetensors")

    @torch.no_grad()
    def questions(self, queries: Queries) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return each query's distinct targets [U], ascending, and the vector [U, m] of each."""
        query_N, at_N = queries.weights_QT.nonzero(as_tuple=True)
        z_ND = self.task.model.hidden_states(queries.ids_QL[:, : int(at_N.max()) + 1])[query_N, at_N]
        targets_N = queries.ids_QL[query_N, at_N + 1]
        target_errors_N = target_error_probability(self.task.model.lm_head.weight, z_ND, targets_N)
        at, present = find_lists(self.state["lists"], targets_N.numpy())
        curvature_N = self.state["curvature"][at] * present + self.damping * self.state["curvature"].mean()
        weights_N = (target_errors_N * queries.weights_QT[query_N, at_N]).numpy() / curvature_N
        vectors_Nm = self.vectors(z_ND) * weights_N[:, None].astype(np.float32)
        bounds = np.searchsorted(query_N.numpy(), np.arange(len(queries.ids_QL) + 1)).tolist()
        return [_by_target(targets_N[a:b].numpy(), vectors_Nm[a:b]) for a, b in pairwise(bounds)]

    def vectors(self, z_ND: Tensor) -> np.ndarray:
        """Return the vectors [N, m] that multiply the records of a list."""
        return np.ones((len(z_ND), 1), np.float32)

    def by_sequence(self, question: tuple[np.ndarray, np.ndarray]) -> Hits:
        targets_U, vectors_Um = question
        positions, counts = self.entries(targets_U)
        rows = self.state["rows"][positions].astype(np.int64)
        values = self.agreement(positions, counts, vectors_Um)
        return sum_by_token(rows // self.length, self.state["surprise"].take(rows) * values)

    def entries(self, targets_U: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the positions of the entries of some targets' lists, and the length of each list."""
        return entries_of(self.state["lists"], self.state["offsets"], targets_U)

    def agreement(self, positions: np.ndarray, counts: np.ndarray, vectors_Um: np.ndarray) -> np.ndarray:
        """Return the product of a list's vector with the record of each of its entries."""
        return np.repeat(vectors_Um[:, 0], counts)

    def share_read(self, queries: Queries) -> float:
        counts = [self.entries(targets)[1].sum() for targets, _ in self.questions(queries)]
        return float(np.mean(counts)) / self.task.train_SL[:, 1:].numel()


def _by_target(targets_N: np.ndarray, vectors_Nm: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distinct targets, ascending, and the sum of the vectors of each."""
    targets_U, place_N = np.unique(targets_N, return_inverse=True)
    vectors_Um = np.zeros((len(targets_U), vectors_Nm.shape[1]), np.float32)
    np.add.at(vectors_Um, place_N, vectors_Nm)
    return targets_U, vectors_Um


class TargetKernel(TargetMatch):
    """Posting lists by target, with the whitened hidden state of every entry.

    Args:
        task, folder, damping: see `TargetMatch`.
        hidden_damping: share of the mean eigenvalue of E[z z^T] that is added to it; may be changed after `open`.
        bytes_per_token: of the lists (8 bytes) and of hidden states (int8 in the leading coordinates, and a scale).
    """

    def __init__(
        self,
        task: Task,
        folder: Path,
        damping: float = 0.05,
        hidden_damping: float = 0.01,
        bytes_per_token: int = 128,
    ) -> None:
        super().__init__(task, folder, damping)
        self.hidden_damping = hidden_damping
        self.kept = min(task.model.config.hidden_size, bytes_per_token - 10)

    @torch.no_grad()
    def fit(self) -> None:
        z_ND = hidden(self.task.model, self.task.train_SL)
        values_m, basis_Dm = eigenbasis((z_ND.T @ z_ND).double() / len(z_ND), self.kept)
        lists = self.lists(z_ND)
        white_Nm, scales_N = quantised((z_ND @ (basis_Dm / values_m.sqrt()).float()).numpy(), "int8")
        assert scales_N is not None
        lists |= {"hidden": white_Nm[lists["rows"]], "scales": scales_N[lists["rows"]]}
        lists |= {"values": values_m.float().numpy(), "basis": basis_Dm.float().numpy()}
        write_file(self.folder / "lists.safetensors", lists)

    def vectors(self, z_ND: Tensor) -> np.ndarray:
        values_m = self.state["values"]
        return z_ND.numpy() @ self.state["basis"] * values_m**0.5 / (values_m + self.hidden_damping * values_m.mean())

    def agreement(self, positions: np.ndarray, counts: np.ndarray, vectors_Um: np.ndarray) -> np.ndarray:
        out, first = np.empty(len(positions), np.float32), 0
        for count, vector_m in zip(counts.tolist(), vectors_Um, strict=True):
            if count:  # a list is contiguous in the file
                start = positions[first]
                rows_nm = self.state["hidden"][start : start + count].astype(np.float32)
                out[first : first + count] = rows_nm @ vector_m * self.state["scales"][start : start + count]
            first += count
        return out
