"""Behaviours: what shall be suppressed, told by words or by example texts, found in any text.

Shapes: T tokens of a passage.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline
from transformers import PreTrainedTokenizerFast

from prism_lightning.common.errors import UserError
from prism_lightning.data.sources import local_files
from prism_lightning.interventions.suppression.settings import BehaviourSource

LEAST_EXAMPLES = 10
TOP_WORDS = 20  # that tell examples apart, for the rival that biases words
FOLDS = 5
LEAST_ACCURACY = 0.6  # of telling examples apart
Span = tuple[int, int]  # characters of a text, from and to


class Behaviour(ABC):
    """Something that texts do or do not.

    Attributes:
        name: for tables.
        words: that stand for it, for the rival that biases them.
        notes: for the reader.
    """

    name: str
    words: list[str]
    notes: list[str]

    @abstractmethod
    def shown_by(self, texts: list[str]) -> list[bool]:
        """Which of some texts show it."""

    def present(self, text: str) -> bool:
        """Whether a text shows it."""
        return self.shown_by([text])[0]

    @abstractmethod
    def spans(self, text: str) -> list[Span]:
        """Where in a text that shows it."""


class WordBehaviour(Behaviour):
    """A text shows it by any of some words, as whole words in upper or lower case.

    Args:
        words: or signs, such as a quotation mark.
        tokenizer: to say which words it splits.

    Raises:
        UserError: no word, or an empty one.
    """

    def __init__(self, words: list[str], tokenizer: PreTrainedTokenizerFast) -> None:
        if not words or not all(word.strip() for word in words):
            raise UserError("--words has an empty word: give words, each in quotation marks where it has blanks")
        self.words = [word.strip() for word in words]
        self.name = ", ".join(self.words)
        self.pattern = re.compile("|".join(map(_whole, sorted(self.words, key=len, reverse=True))), re.IGNORECASE)
        pieces = {word: tokenizer.tokenize(" " + word) for word in self.words}
        split = [f"{word} into {len(found)}" for word, found in pieces.items() if len(found) > 1]
        self.notes = [f"the tokenizer splits {', '.join(split)} tokens: each of them counts"] if split else []

    def shown_by(self, texts: list[str]) -> list[bool]:
        return [self.pattern.search(text) is not None for text in texts]

    def spans(self, text: str) -> list[Span]:
        return [match.span() for match in self.pattern.finditer(text)]


def _whole(word: str) -> str:
    """A pattern of a word that stands alone; signs stand anywhere."""
    before, after = (r"(?<!\w)" if re.match(r"\w", word) else "", r"(?!\w)" if re.search(r"\w$", word) else "")
    return before + re.escape(word) + after


class ExampleBehaviour(Behaviour):
    """A text shows it where a logistic regression on its words, fitted to examples, says so.

    Args:
        name: for tables.
        shown, other: texts with it and without it.

    Raises:
        UserError: fewer than ten of either.
    """

    def __init__(self, name: str, shown: list[str], other: list[str]) -> None:
        for option, texts in (("--with_texts", shown), ("--without_texts", other)):
            if len(texts) < LEAST_EXAMPLES:
                raise UserError(f"{option} has {len(texts)} texts: {LEAST_EXAMPLES} at least are needed")
        self.name, texts = name, [*shown, *other]
        labels = np.repeat([1, 0], [len(shown), len(other)])
        counts = CountVectorizer(binary=True, token_pattern=r"\w+|[^\w\s]", min_df=2)
        self.classifier = make_pipeline(counts, LogisticRegression(C=0.3, class_weight="balanced", max_iter=1000))
        try:
            scores = cross_val_score(self.classifier, texts, labels, cv=FOLDS, scoring="balanced_accuracy")
            self.classifier.fit(texts, labels)
        except ValueError as error:  # no word stands in two texts
            raise UserError(f"the examples have no words in common: {str(error).splitlines()[0]}") from error
        weights = self.classifier[-1].coef_[0]
        order = np.argsort(-weights)[:TOP_WORDS]
        self.words = [str(counts.get_feature_names_out()[at]) for at in order if weights[at] > 0]
        if scores.mean() < LEAST_ACCURACY or not self.words:
            raise UserError(
                f"the examples cannot be told apart by their words ({scores.mean():.0%} right, a guess has 50 %): give"
                " more of them, or --words"
            )
        self.notes = [
            f"texts are told apart by their words, {scores.mean():.1%} right of held-out examples (a guess: 50 %);"
            f" first of them: {', '.join(self.words[:8])}"
        ]

    def shown_by(self, texts: list[str]) -> list[bool]:
        return self.classifier.predict(texts).astype(bool).tolist() if texts else []

    def spans(self, text: str) -> list[Span]:
        return [(0, len(text))]


def load_behaviour(
    source: BehaviourSource, tokenizer: PreTrainedTokenizerFast
) -> tuple[Behaviour, list[str], list[bool] | None]:
    """Return a behaviour and, where examples define it, these texts and whether each shows the behaviour.

    Raises:
        UserError: as `WordBehaviour`, `ExampleBehaviour` and `local_files`.
    """
    if source.words:
        return WordBehaviour(source.words, tokenizer), [], None
    assert source.with_texts is not None
    with_it, without_it = (
        [document.text for document in local_files(str(path), "text").documents()]
        for path in (source.with_texts, source.without_texts)
    )
    behaviour = ExampleBehaviour(source.with_texts.stem, with_it, without_it)
    return behaviour, [*with_it, *without_it], [True] * len(with_it) + [False] * len(without_it)


@dataclass
class Passage:
    """Consecutive tokens of a text, as many as the model takes and one more.

    Attributes:
        text: its number among those given.
        ids: T + 1 tokens; each but the first is a target.
        marked_T: whether each target belongs to the behaviour.
    """

    text: int
    ids: list[int]
    marked_T: np.ndarray


def passages(
    texts: list[str], spans: list[list[Span]], tokenizer: PreTrainedTokenizerFast, length: int
) -> list[Passage]:
    """Texts as passages of up to `length` targets, with the tokens that overlap the spans of a behaviour marked."""
    encoded = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
    found = []
    for number, (ids, offsets, inside) in enumerate(
        zip(encoded["input_ids"], encoded["offset_mapping"], spans, strict=True)
    ):
        marks = np.array([any(a < to and b > start for start, to in inside) for a, b in offsets], dtype=bool)
        for first in range(0, len(ids) - 1, length):
            piece = ids[first : first + length + 1]
            found.append(Passage(number, piece, marks[first + 1 : first + len(piece)]))
    return found
