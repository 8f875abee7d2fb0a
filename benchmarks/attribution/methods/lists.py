"""What methods with posting lists share: a query touches some training sequences, and names the best of them."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from benchmarks.attribution.task import Method, Queries
from prism_lightning.attribution.index.base import Hits


class ListMethod(Method):
    """A method that reads some of its records for a query, in two steps: the question, and the look-up."""

    @abstractmethod
    def questions(self, queries: Queries) -> list[Any]:
        """What the look-up needs to know of each query, in a form of the method's own."""

    @abstractmethod
    def by_sequence(self, question: Any) -> Hits:
        """Influence of every sequence that the question's lists touch."""

    @abstractmethod
    def share_read(self, queries: Queries) -> float:
        """List entries that a query reads, as a share of all training tokens; the mean over queries."""

    def scores(self, queries: Queries) -> Tensor:
        out = torch.zeros(len(queries.ids_QL), len(self.task.train_SL))
        for row_S, question in zip(out, self.questions(queries), strict=True):
            hits = self.by_sequence(question)
            row_S[torch.from_numpy(hits.tokens)] = torch.from_numpy(hits.influence).float()
        return out

    def top(self, queries: Queries, count: int) -> Tensor:
        """As `Method.top`; where fewer sequences are touched, -1 fills the row."""
        return self.top_of(self.questions(queries), count)

    def top_of(self, questions: list[Any], count: int) -> Tensor:
        """The look-up alone."""
        out = torch.full((len(questions), count), -1)
        for row, question in zip(out, questions, strict=True):
            best = self.by_sequence(question).strongest(count).tokens
            row[: len(best)] = torch.from_numpy(best)
        return out
