"""The base of methods with posting lists, where a query reads the records of some training sequences only."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from benchmarks.attribution.task import Method, Queries
from prism_lightning.attribution.index.base import Hits


class ListMethod(Method):
    """A method that reads some of its records for a query, in two steps: preparation and look-up."""

    @abstractmethod
    def questions(self, queries: Queries) -> list[Any]:
        """Return the prepared queries for the look-up, in a form of the method's own."""

    @abstractmethod
    def by_sequence(self, question: Any) -> Hits:
        """Return the influence of every sequence on the lists of a prepared query."""

    @abstractmethod
    def share_read(self, queries: Queries) -> float:
        """Return the list entries that a query reads, as a share of all training tokens; the mean over queries."""

    def scores(self, queries: Queries) -> Tensor:
        out = torch.zeros(len(queries.ids_QL), len(self.task.train_SL))
        for row_S, question in zip(out, self.questions(queries), strict=True):
            hits = self.by_sequence(question)
            row_S[torch.from_numpy(hits.tokens)] = torch.from_numpy(hits.influence).float()
        return out

    def top(self, queries: Queries, count: int) -> Tensor:
        """Return as `Method.top`; rows with fewer sequences are filled with -1."""
        return self.top_of(self.questions(queries), count)

    def top_of(self, questions: list[Any], count: int) -> Tensor:
        """Return `top` of prepared queries, by the look-up alone."""
        out = torch.full((len(questions), count), -1)
        for row, question in zip(out, questions, strict=True):
            best = self.by_sequence(question).strongest(count).tokens
            row[: len(best)] = torch.from_numpy(best)
        return out
