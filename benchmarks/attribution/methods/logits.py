"""Prototype attribution in the space of logits: what an index could keep in place of hidden-space gradients.

The parameters are the prototypes' contributions to the logits, V_i = W p_i, a row of the vocabulary's length for each.
Their gradient at a token is a_i (pi - e_y), and the diagonal of their Gauss-Newton matrix, in closed form,
H_iv = E[a_i^2 pi(v) (1 - pi(v))]. Of the product of two errors under its inverse only the term of the query's target is
kept, and of that the training tokens with the same target:

    influence(s, q) = [y_s = y_q = v] (1 - pi_q(v)) (1 - pi_s(v)) sum_i a_qi a_si / H_iv / N,

so that a query reads, of its prototypes' lists, the stretch of its own target.

Shapes: N training tokens, C at once, K prototypes, k active, V vocabulary, P distinct pairs of a prototype and a
target, S sequences, Q queries.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.attribution.task import Method, Queries, Task
from prism_lightning.attribution.dictionary import Dictionary, fitted_dictionary
from prism_lightning.attribution.files import map_file, write_file
from prism_lightning.attribution.records import head_chunks

BATCH = 64  # sequences in a forward pass


class LogitPrototypes(Method):
    """Posting lists by prototype and target.

    Args:
        task, folder: see `Method`.
        tokens_per_prototype: sets K.
        active: k.
        fit_steps: of the dictionary.
        damping: share of the mean over all prototypes and tokens added to H.
    """

    def __init__(
        self,
        task: Task,
        folder: Path,
        tokens_per_prototype: int = 128,
        active: int = 8,
        fit_steps: int = 150,
        damping: float = 1.0,
    ) -> None:
        super().__init__(task, folder)
        self.size = max(active, task.train_SL[:, 1:].numel() // tokens_per_prototype)
        self.active, self.fit_steps, self.damping = active, fit_steps, damping
        self.length, self.vocabulary = task.train_SL.shape[1] - 1, task.model.config.vocab_size

    @torch.no_grad()
    def fit(self) -> None:
        parts = [self.task.model.hidden_states(ids_BL[:, :-1]) for ids_BL in self.task.train_SL.split(BATCH)]
        z_ND, targets_N = torch.cat(parts).flatten(0, 1), self.task.train_SL[:, 1:].flatten()
        prototypes_KD = self.fitted(z_ND).half()  # assigned to as they are stored
        indices_Nk, activations_Nk = self.dictionary_of(prototypes_KD.float()).assign(z_ND)
        surprise_N, curvature_KV = self.predictions(z_ND, targets_N, indices_Nk, activations_Nk)
        pairs = (indices_Nk * self.vocabulary + targets_N[:, None]).flatten().numpy()
        order = np.argsort(pairs, kind="stable")
        pairs_P, starts_P = np.unique(pairs[order], return_index=True)
        weights = (activations_Nk * surprise_N[:, None]).flatten().numpy()[order]
        tensors = {
            "prototypes": prototypes_KD.numpy(),
            "mean": curvature_KV.mean(0, keepdim=True).mean(1).numpy(),
            "pairs": pairs_P.astype(np.uint32),
            "curvature": curvature_KV.flatten()[torch.from_numpy(pairs_P)].numpy(),
            "offsets": np.append(starts_P, len(order)).astype(np.uint32),
            "rows": (order // self.active).astype(np.uint32),
            "weights": weights.astype(np.float16),
        }
        write_file(self.folder / "lists.safetensors", tensors)

    def predictions(
        self, z_ND: Tensor, targets_N: Tensor, indices_Nk: Tensor, activations_Nk: Tensor
    ) -> tuple[Tensor, Tensor]:
        """1 - pi of every target, and H [K, V]."""
        surprise_N, curvature_KV = torch.empty(len(z_ND)), torch.zeros(self.size, self.vocabulary)
        for chunk in head_chunks(self.task.model.lm_head.weight, z_ND):
            predicted_CV, rows = chunk.probabilities_CV, chunk.rows
            surprise_N[rows] = 1 - predicted_CV.gather(1, targets_N[rows, None])[:, 0]
            tokens_Ck = torch.arange(len(predicted_CV))[:, None].expand_as(indices_Nk[rows])
            where = torch.stack([indices_Nk[rows].flatten(), tokens_Ck.flatten()])
            squared_KC = torch.sparse_coo_tensor(
                where, activations_Nk[rows].square().flatten(), (self.size, len(predicted_CV)), check_invariants=False
            )
            curvature_KV += torch.sparse.mm(squared_KC, predicted_CV * (1 - predicted_CV))
        return surprise_N, curvature_KV / len(z_ND)

    def fitted(self, z_ND: Tensor) -> Tensor:
        """Prototypes [K, D]."""
        with torch.enable_grad():
            return fitted_dictionary(z_ND, self.size, self.active, self.fit_steps, 0).prototypes_KD

    def dictionary_of(self, prototypes_KD: Tensor, exact: bool = False) -> Dictionary:
        """What assigns hidden states to prototypes."""
        return Dictionary(prototypes_KD, self.active, exact)

    def open(self) -> None:
        self.state = map_file(self.folder / "lists.safetensors")
        prototypes_KD = torch.from_numpy(np.array(self.state["prototypes"], dtype=np.float32))
        self.dictionary = self.dictionary_of(prototypes_KD, exact=True)

    def questions(self, queries: Queries) -> list[tuple[np.ndarray, np.ndarray]]:
        """For each query the pairs of prototype and target that it asks about, and the weight of each."""
        with torch.no_grad():
            which_N, at_N = queries.weights_QT.nonzero(as_tuple=True)
            last = int(at_N.max()) + 1
            z_ND = self.task.model.hidden_states(queries.ids_QL[:, :last])[which_N, at_N]
            targets_N = queries.ids_QL[which_N, at_N + 1]
            surprise_N = 1 - self.task.model.lm_head(z_ND).softmax(-1).gather(1, targets_N[:, None])[:, 0]
            indices_Nk, activations_Nk = self.dictionary.assign(z_ND)
        pairs_Nk = (indices_Nk * self.vocabulary + targets_N[:, None]).numpy()
        at_Nk = self.at(pairs_Nk)
        curvature_Nk = self.state["curvature"][at_Nk] + self.damping * self.state["mean"]
        weights_N = (surprise_N * queries.weights_QT[which_N, at_N]).numpy() / self.task.train_SL[:, 1:].numel()
        weights_Nk = activations_Nk.numpy() * weights_N[:, None] / curvature_Nk
        bounds = np.searchsorted(which_N.numpy(), np.arange(len(queries.ids_QL) + 1))
        return [(pairs_Nk[a:b].ravel(), weights_Nk[a:b].ravel()) for a, b in pairwise(bounds)]

    def at(self, pairs: np.ndarray) -> np.ndarray:
        """Where pairs stand among those that have a list; of a pair that has none, some other."""
        return np.minimum(np.searchsorted(self.state["pairs"], pairs), len(self.state["pairs"]) - 1)

    def entries(self, pairs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Positions of all list entries of some pairs, and the number of entries of each pair."""
        at = self.at(pairs)
        found = self.state["pairs"][at] == pairs
        starts, stops = (self.state["offsets"][at + step].astype(np.int64) for step in (0, 1))
        counts = np.where(found, stops - starts, 0)
        before = np.cumsum(counts) - counts
        return np.arange(counts.sum()) + np.repeat(starts - before, counts), counts

    def sequence_scores(self, pairs: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """[S] influence of every sequence on one query."""
        positions, counts = self.entries(pairs)
        values = self.state["weights"][positions].astype(np.float32) * np.repeat(weights, counts)
        return np.bincount(self.state["rows"][positions] // self.length, values, len(self.task.train_SL))

    def scores(self, queries: Queries) -> Tensor:
        rows = [self.sequence_scores(*question) for question in self.questions(queries)]
        return torch.from_numpy(np.stack(rows)).float()

    def top(self, queries: Queries, count: int) -> Tensor:
        return self.top_of(self.questions(queries), count)

    def top_of(self, questions: list[tuple[np.ndarray, np.ndarray]], count: int) -> Tensor:
        """The look-up alone: the best sequences of each question, -1 where fewer are touched."""
        out = np.full((len(questions), count), -1)
        for row, (pairs, weights) in zip(out, questions, strict=True):
            positions, counts = self.entries(pairs)
            values = self.state["weights"][positions].astype(np.float32) * np.repeat(weights, counts)
            touched, where = np.unique(self.state["rows"][positions] // self.length, return_inverse=True)
            scores = np.bincount(where, values)
            best = np.argsort(-scores, kind="stable")[:count]
            row[: len(best)] = touched[best]
        return torch.from_numpy(out)

    def share_read(self, queries: Queries) -> float:
        """List entries that a query reads, as a share of all training tokens; the mean over queries."""
        counts = [self.entries(np.unique(pairs))[1].sum() for pairs, _ in self.questions(queries)]
        return float(np.mean(counts)) / self.task.train_SL[:, 1:].numel()


class TargetMatch(LogitPrototypes):
    """The same with one prototype that is active everywhere: all training tokens with the query's target, by surprise.

    It is the influence through a bias of the logits, with a diagonal curvature: the floor of what prototypes add.
    """

    def __init__(self, task: Task, folder: Path, damping: float = 1.0) -> None:
        super().__init__(task, folder, task.train_SL[:, 1:].numel(), 1, 0, damping)

    def predictions(
        self, z_ND: Tensor, targets_N: Tensor, indices_Nk: Tensor, activations_Nk: Tensor
    ) -> tuple[Tensor, Tensor]:
        """1 - pi of every target, and H [K, V]."""
        surprise_N, curvature_KV = torch.empty(len(z_ND)), torch.zeros(self.size, self.vocabulary)
        for chunk in head_chunks(self.task.model.lm_head.weight, z_ND):
            predicted_CV, rows = chunk.probabilities_CV, chunk.rows
            surprise_N[rows] = 1 - predicted_CV.gather(1, targets_N[rows, None])[:, 0]
            tokens_Ck = torch.arange(len(predicted_CV))[:, None].expand_as(indices_Nk[rows])
            where = torch.stack([indices_Nk[rows].flatten(), tokens_Ck.flatten()])
            squared_KC = torch.sparse_coo_tensor(
                where, activations_Nk[rows].square().flatten(), (self.size, len(predicted_CV)), check_invariants=False
            )
            curvature_KV += torch.sparse.mm(squared_KC, predicted_CV * (1 - predicted_CV))
        return surprise_N, curvature_KV / len(z_ND)

    def fitted(self, z_ND: Tensor) -> Tensor:
        return torch.ones(1, z_ND.shape[1])

    def dictionary_of(self, prototypes_KD: Tensor, exact: bool = False) -> Dictionary:
        return Everywhere(prototypes_KD, 1, exact)


class Everywhere(Dictionary):
    """One prototype, active in full for every hidden state."""

    def assign(self, z_ND: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros(len(z_ND), 1, dtype=torch.long), torch.ones(len(z_ND), 1)
