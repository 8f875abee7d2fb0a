"""Behaviours: a property of texts, defined by words or by example texts, that can be found in any text.

Shapes: T targets of a passage.
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
from prism_lightning.data.tokenizer import beginning_ids
from prism_lightning.interventions.suppression.settings import BehaviourSource

MIN_EXAMPLES = 10  # of either kind
MIN_ACCURACY = 0.6  # of a classifier of the examples, where a guess has 0.5
FOLDS = 5
BIASED_WORDS = 20  # most telling words of examples, which the rival condition biases
NAMED_WORDS = 8  # of these, named to the reader
Span = tuple[int, int]  # first character and the one behind the last


class Behaviour(ABC):
    """Something that a text shows or does not show.

    Attributes:
        name: Name for tables.
        words: Words that stand for the behaviour; the rival condition biases them.
        notes: Facts that a reader must know.
    """

    name: str
    words: list[str]
    notes: list[str]

    @abstractmethod
    def shown_by(self, texts: list[str]) -> list[bool]:
        """Return whether each text shows the behaviour."""

    def present(self, text: str) -> bool:
        """Return whether a text shows the behaviour."""
        return self.shown_by([text])[0]

    @abstractmethod
    def spans(self, text: str) -> list[Span]:
        """Return the places of the behaviour in a text that shows it."""


class WordBehaviour(Behaviour):
    """Shown by texts with any of some words, as whole words in upper or lower case.

    Args:
        words: Words or signs, such as a quotation mark.
        tokenizer: The model's tokenizer; a note names the words that it splits.

    Raises:
        UserError: there is no word, or an empty one.
    """

    def __init__(self, words: list[str], tokenizer: PreTrainedTokenizerFast) -> None:
        if not words or not all(word.strip() for word in words):
            raise UserError("--words has an empty word: give words, each in quotation marks where it has blanks")
        self.words = [word.strip() for word in words]
        self.name = ", ".join(self.words)
        longest_first = sorted(self.words, key=len, reverse=True)
        self.pattern = re.compile("|".join(map(_whole_word, longest_first)), re.IGNORECASE)
        token_counts = {word: len(tokenizer.tokenize(" " + word)) for word in self.words}
        split_words = [f"{word} into {count}" for word, count in token_counts.items() if count > 1]
        self.notes = [f"the tokenizer splits {', '.join(split_words)} tokens; each counts"] if split_words else []

    def shown_by(self, texts: list[str]) -> list[bool]:
        return [self.pattern.search(text) is not None for text in texts]

    def spans(self, text: str) -> list[Span]:
        return [match.span() for match in self.pattern.finditer(text)]


def _whole_word(word: str) -> str:
    """Return a pattern of a word that stands alone; a sign may stand next to anything."""
    before, after = (r"(?<!\w)" if re.match(r"\w", word) else "", r"(?!\w)" if re.search(r"\w$", word) else "")
    return before + re.escape(word) + after


class ExampleBehaviour(Behaviour):
    """Shown by texts that a logistic regression on their words, fitted to examples, assigns to the behaviour.

    Args:
        name: Name for tables.
        with_it: Texts that show the behaviour.
        without_it: Texts that do not.

    Raises:
        UserError: either kind has fewer than ten texts, or words do not distinguish the two.
    """

    def __init__(self, name: str, with_it: list[str], without_it: list[str]) -> None:
        for option, texts in (("--with_texts", with_it), ("--without_texts", without_it)):
            if len(texts) < MIN_EXAMPLES:
                raise UserError(f"{option} has {len(texts)} texts: give {MIN_EXAMPLES} texts at least")
        self.name, texts = name, [*with_it, *without_it]
        labels = np.repeat([1, 0], [len(with_it), len(without_it)])
        counts = CountVectorizer(binary=True, token_pattern=r"\w+|[^\w\s]", min_df=2)
        self.classifier = make_pipeline(counts, LogisticRegression(C=0.3, class_weight="balanced", max_iter=1000))
        try:
            scores = cross_val_score(self.classifier, texts, labels, cv=FOLDS, scoring="balanced_accuracy")
            self.classifier.fit(texts, labels)
        except ValueError as error:  # no word occurs in two texts
            raise UserError(f"the examples have no words in common: {str(error).splitlines()[0]}") from error
        weights = self.classifier[-1].coef_[0]
        most_telling = np.argsort(-weights)[:BIASED_WORDS]
        self.words = [str(counts.get_feature_names_out()[index]) for index in most_telling if weights[index] > 0]
        if scores.mean() < MIN_ACCURACY or not self.words:
            raise UserError(
                f"words do not distinguish the examples ({100 * scores.mean():.0f} % are classified right, a guess has"
                " 50 %): give more examples, or --words"
            )
        self.notes = [
            f"a classifier of words defines the behaviour; it is right for {100 * scores.mean():.1f} % of held-out"
            f" examples (a guess: 50 %). Its most telling words: {', '.join(self.words[:NAMED_WORDS])}"
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
class MarkedPassage:
    """Consecutive tokens of a text, at most one more than the model's context.

    Attributes:
        text: Number of the text among all texts.
        ids: T + 1 tokens; each but the first is a target.
        marked_T: Whether each target belongs to the behaviour.
    """

    text: int
    ids: list[int]
    marked_T: np.ndarray


def marked_passages(
    texts: list[str], spans: list[list[Span]], tokenizer: PreTrainedTokenizerFast, length: int
) -> list[MarkedPassage]:
    """Return texts as passages of up to `length` targets, with the tokens that overlap a span of their text marked."""
    encoded = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
    beginning = beginning_ids(tokenizer)
    passages = []
    for text, (ids, offsets, text_spans) in enumerate(
        zip(encoded["input_ids"], encoded["offset_mapping"], spans, strict=True)
    ):
        marks = [any(start < last and end > first for first, last in text_spans) for start, end in offsets]
        ids, marks = beginning + ids, [False] * len(beginning) + marks
        for begin in range(0, len(ids) - 1, length):
            passage_ids = ids[begin : begin + length + 1]
            marked_T = np.array(marks[begin + 1 : begin + len(passage_ids)], dtype=bool)
            passages.append(MarkedPassage(text, passage_ids, marked_T))
    return passages
