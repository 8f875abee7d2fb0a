"""The interface of every method, and its input.

Shapes: S training sequences, Q queries, L = T + 1 tokens of a sequence (T inputs, T targets), V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from prism_lightning.attribution.curvature import records
from prism_lightning.models import PrismForCausalLM

BATCH = 128  # sequences in a forward pass
PEERS = 'pip install -e ".[benchmarks]", then pip install --no-deps -r benchmarks/peers.txt'


class Task(NamedTuple):
    """A trained model, and the sequences it was trained on."""

    model: PrismForCausalLM  # in eval mode; methods that change it in place copy it first
    train_SL: Tensor


class Queries(NamedTuple):
    """Q queries; the loss of each is the weighted sum of its targets' cross-entropies."""

    ids_QL: Tensor
    weights_QT: Tensor

    @classmethod
    def of_sequences(cls, ids_QL: Tensor) -> Queries:
        """Return a query for the summed loss of all targets of each sequence."""
        return cls(ids_QL, torch.ones(len(ids_QL), ids_QL.shape[1] - 1))

    @classmethod
    def of_tokens(cls, ids_QL: Tensor, targets_Q: Tensor) -> Queries:
        """Return a query for the loss of one target of each sequence, `targets_Q` counted from 0."""
        return cls(ids_QL, F.one_hot(targets_Q, ids_QL.shape[1] - 1).float())

    def part(self, start: int, stop: int) -> Queries:
        """Return some of the queries."""
        return Queries(self.ids_QL[start:stop], self.weights_QT[start:stop])


class Method(ABC):
    """A method that scores the influence of training sequences on queries.

    `fit` writes the method's state to `folder`, and `open` reads from it everything that `scores` needs. Nothing else
    prepares for `scores`.

    Args:
        task: what is attributed.
        folder: for the state; made here.
    """

    def __init__(self, task: Task, folder: Path) -> None:
        self.task, self.folder = task, folder
        folder.mkdir(parents=True, exist_ok=True)

    @abstractmethod
    def fit(self) -> None:
        """Compute the state from the model and the training sequences, and write it."""

    @abstractmethod
    def open(self) -> None:
        """Read the state that `fit` wrote, as a new process would."""

    @abstractmethod
    def scores(self, queries: Queries) -> Tensor:
        """Return scores [Q, S]; a larger one means that the sequence lowered the query's loss more, in any unit."""

    def top(self, queries: Queries, count: int) -> Tensor:
        """Return the sequences [Q, count] of largest score, best first; this is what the cost stage times."""
        return self.scores(queries).topk(min(count, len(self.task.train_SL)), dim=-1).indices

    def state_bytes(self) -> int:
        """Return the bytes on disk."""
        return sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())


@torch.no_grad()
def hidden(model: PrismForCausalLM, ids_SL: Tensor) -> Tensor:
    """Return hidden states z [S T, D] of all inputs, a bounded number of sequences at a time."""
    return torch.cat([model.hidden_states(ids_BL[:, :-1]).flatten(0, 1) for ids_BL in ids_SL.split(BATCH)])


@torch.no_grad()
def loss_gradients(model: PrismForCausalLM, z_ND: Tensor, targets_N: Tensor) -> Tensor:
    """Return the gradient delta [N, D] of every target's cross-entropy with respect to the hidden state before it."""
    return records.loss_gradients(model.lm_head.weight, z_ND, targets_N)[1]


def losses_of_batch(model: PrismForCausalLM, ids_QL: Tensor) -> Tensor:
    """Return the cross-entropy [Q, T] in nats of every target, for gradients."""
    logits_QTV = model(ids_QL[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits_QTV.float().transpose(1, 2), ids_QL[:, 1:], reduction="none")


def query_loss(model: PrismForCausalLM, queries: Queries) -> Tensor:
    """Return weighted sums [Q] of the targets' cross-entropies, in nats."""
    return (losses_of_batch(model, queries.ids_QL) * queries.weights_QT).sum(1)
