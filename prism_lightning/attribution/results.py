"""Results of an attribution: training tokens, passages and documents with their influence, as plain data."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from prism_lightning.attribution.index.base import Hits, Index, Query, sum_by_token
from prism_lightning.data.sources import has_rows
from prism_lightning.data.store import TokenStore
from prism_lightning.data.token_text import token_bytes, token_text

PASSAGE_TOKENS = 64


@dataclass
class TrainingToken:
    """A training token in its context.

    `influence` is in nats; a positive one lowered the query's loss. The texts are for people and show parts of
    characters as bytes; `token_bytes` is the token's UTF-8 in hexadecimal digits.
    """

    position: int
    influence: float
    prototypes: list[tuple[int, float]]  # shared with the query, and the influence through each
    source: str
    before: str
    token: str
    after: str
    token_bytes: str


@dataclass
class Passage:
    """Up to 64 consecutive tokens of a document; its influence is the sum of its tokens'."""

    position: int
    influence: float
    source: str
    text: str


@dataclass
class TrainingDocument:
    """A training document; its influence is the sum of its tokens'."""

    document: int
    influence: float
    source: str


@dataclass
class Attribution:
    """The attribution of one query. All influences are in nats of `loss`; a positive one lowered it.

    Attributes:
        kind: "token", "sequence" (the sum over a text's tokens) or "contrast" (loss = logit of `other` - of `token`).
        loss: of the query: -log p, summed over a sequence's tokens.
        scored_by: "prototypes", or "head K-FAC" where the second stage re-ranked the prototypes' proposals.
        touched: number of training tokens on the lists that the query reads; the influence of others is not computed.
        influence: sum over all of them.
        indexed: the text that the index was built over, and whether the run trained the model on it.
    """

    kind: str
    context: str
    token: str
    loss: float
    scored_by: str
    touched: int
    influence: float
    prototypes: list[tuple[int, float]]  # of the query, with their activation
    tokens: list[TrainingToken]
    passages: list[Passage]
    documents: list[TrainingDocument]
    other: str | None = None
    indexed: str = ""
    notes: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


class Describer:
    """Describes hits as tokens, passages and documents with text and source.

    Args:
        store: the training split of the index.
        index: an index over it.
    """

    def __init__(self, store: TokenStore, index: Index) -> None:
        self.store, self.index = store, index

    def tokens(self, hits: Hits, query: Query, with_prototypes: bool) -> list[TrainingToken]:
        """Describe training tokens; on request with the prototypes through which each has its influence."""
        contributions: list[list[tuple[int, float]]] = [[] for _ in hits.tokens]
        if with_prototypes:
            contributions = self.index.contributions_by_prototype(query, hits.tokens)
        tokens = []
        for row, influence, prototypes in zip(
            hits.tokens.tolist(), hits.influence.tolist(), contributions, strict=True
        ):
            position = row + 1  # row r of the index is the loss of predicting token r + 1
            before, token, after = self.store.text_around(position, 12, 8)
            as_bytes = token_bytes(self.store.tokenizer, self.store.tokens[position : position + 1]).hex()
            source = self.source(position)
            tokens.append(TrainingToken(position, influence, prototypes, source, before, token, after, as_bytes))
        return tokens

    def by_passage(self, hits: Hits) -> Hits:
        """Return the influence of passages, by the position of their first token."""
        start = self.store.starts[self._documents_of(hits.tokens)]
        offset = hits.tokens + 1 - start
        return sum_by_token(start + offset // PASSAGE_TOKENS * PASSAGE_TOKENS, hits.influence)

    def by_document(self, hits: Hits) -> Hits:
        """Return the influence of documents, by their number."""
        return sum_by_token(self._documents_of(hits.tokens), hits.influence)

    def _documents_of(self, rows: np.ndarray) -> np.ndarray:
        return self.store.documents_of(rows + 1)

    def passages(self, hits: Hits) -> list[Passage]:
        """Describe passages that are given by the position of their first token."""
        return [
            Passage(position, influence, self.source(position), self._passage_text(position))
            for position, influence in zip(hits.tokens.tolist(), hits.influence.tolist(), strict=True)
        ]

    def documents(self, hits: Hits) -> list[TrainingDocument]:
        """Describe documents that are given by their number."""
        return [
            TrainingDocument(document, influence, self._name(document)[0])
            for document, influence in zip(hits.tokens.tolist(), hits.influence.tolist(), strict=True)
        ]

    def source(self, position: int) -> str:
        """Return the place of a token: FILE:LINE, or TABLE row R."""
        location = self.store.locate(position)
        name, is_table = self._name(location.document)
        if is_table:
            return name
        before = self.store.document_tokens(location.document)[: location.offset]
        return f"{name}:{1 + str(self.store.tokenizer.decode(before.tolist())).count(chr(10))}"

    def _name(self, document: int) -> tuple[str, bool]:
        name, row = (self.store.documents[column][document].as_py() for column in ("name", "row"))
        is_table = "dataset" in self.store.manifest["inputs"] or has_rows(name)
        return (f"{name} row {row}" if is_table else name), is_table

    def _passage_text(self, position: int) -> str:
        location = self.store.locate(position)
        tokens = self.store.document_tokens(location.document)
        return token_text(self.store.tokenizer, tokens[location.offset : location.offset + PASSAGE_TOKENS])
