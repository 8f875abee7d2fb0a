"""What every method is given, and what it has to do.

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
    """Q questions: the loss of each is the weighted sum of its targets' cross-entropies."""

    ids_QL: Tensor
    weights_QT: Tensor

    @classmethod
    def of_sequences(cls, ids_QL: Tensor) -> Queries:
        """One question a sequence: the summed loss of all its targets."""
        return cls(ids_QL, torch.ones(len(ids_QL), ids_QL.shape[1] - 1))

    @classmethod
    def of_tokens(cls, ids_QL: Tensor, targets_Q: Tensor) -> Queries:
        """One question a sequence: the loss of its target number `targets_Q`, counted from 0."""
        return cls(ids_QL, F.one_hot(targets_Q, ids_QL.shape[1] - 1).float())

    def part(self, start: int, stop: int) -> Queries:
        """Some of them."""
        return Queries(self.ids_QL[start:stop], self.weights_QT[start:stop])


class Method(ABC):
    """One way to say which training sequences bear on a query.

    `fit` goes from nothing to a state in `folder`, from which `open` reads whatever answering needs: the two together
    and nothing else prepare for `scores`. What lies in `folder` is the method's state on disk.

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
        """[Q, S]: larger = training on the sequence lowered the query's loss more; any unit, comparable in a row."""

    def top(self, queries: Queries, count: int) -> Tensor:
        """[Q, count] sequences of largest score, best first: what is timed."""
        return self.scores(queries).topk(min(count, len(self.task.train_SL)), dim=-1).indices

    def state_bytes(self) -> int:
        """Bytes on disk."""
        return sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())


@torch.no_grad()
def hidden(model: PrismForCausalLM, ids_SL: Tensor) -> Tensor:
    """z [S T, D] of all inputs, a bounded number of sequences at a time."""
    return torch.cat([model.hidden_states(ids_BL[:, :-1]).flatten(0, 1) for ids_BL in ids_SL.split(BATCH)])


@torch.no_grad()
def loss_gradients(model: PrismForCausalLM, z_ND: Tensor, targets_N: Tensor) -> Tensor:
    """delta [N, D]: the gradient of every target's cross-entropy with respect to the hidden state before it."""
    return records.loss_gradients(model.lm_head.weight, z_ND, targets_N)[1]


def query_loss(model: PrismForCausalLM, queries: Queries) -> Tensor:
    """[Q] weighted sums of the targets' cross-entropies, in nats."""
    logits_QTV = model(queries.ids_QL[:, :-1], use_cache=False).logits
    losses_QT = F.cross_entropy(logits_QTV.float().transpose(1, 2), queries.ids_QL[:, 1:], reduction="none")
    return (losses_QT * queries.weights_QT).sum(1)
