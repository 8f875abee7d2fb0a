"""Labels of prototypes: tokens that are more frequent in a prototype's neighbourhood than in the corpus.

Shapes: n training tokens in which the prototype is active, N of all, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from prism_lightning.data.store import TokenStore
from prism_lightning.data.token_text import token_text

LABEL_TOKENS = 3  # in each half of a label
COUNT_CHUNK = 2**24  # tokens counted at a time; counting converts them to eight bytes


@dataclass
class Label:
    """The tokens that the model reads and predicts in a prototype's neighbourhood, most distinctive first.

    Attributes:
        after, after_share: tokens that the model has just read, and the share of the neighbourhood with one of them.
        says, says_share: tokens that follow, and the share of the neighbourhood with one of them.
        says_share_top, says_share_middle, says_share_random: the same share in the tenth with the largest activations,
            the tenth around the median, and a random tenth. They differ where a label fits the best cases only.
    """

    after: list[str]
    after_share: float
    says: list[str]
    says_share: float
    says_share_top: float
    says_share_middle: float
    says_share_random: float

    def __str__(self) -> str:
        if not self.says:
            return "dead"
        words = " ".join(f"“{word}”" for word in self.says)
        context = " ".join(f"“{word}”" for word in self.after)
        return f"{words} ({self.says_share:.0%}) after {context} ({self.after_share:.0%})"


class Labeller:
    """Labels prototypes by comparison with the token counts of a corpus.

    Args:
        store: the training split.
    """

    def __init__(self, store: TokenStore) -> None:
        self.store = store

    @cached_property
    def target_counts_V(self) -> np.ndarray:
        """Number of occurrences [V] of each token among the targets of the corpus."""
        return self._counts(0)

    @cached_property
    def read_counts_V(self) -> np.ndarray:
        """Number of targets of the corpus that each token precedes [V]; of unmasked data, of its occurrences."""
        return self._counts(-1) if self.store.masked else self.target_counts_V

    def _counts(self, offset: int) -> np.ndarray:
        tokens, size = self.store.tokens, self.store.manifest["tokenizer_size"]
        counts_V = np.zeros(size, np.int64)
        for start in range(0, len(tokens), COUNT_CHUNK):
            chosen = tokens[start : start + COUNT_CHUNK]
            if self.store.masked:
                places = np.arange(max(start, 1), min(start + COUNT_CHUNK, len(tokens)))
                chosen = tokens[places[self.store.are_targets(places)] + offset]
            counts_V += np.bincount(chosen, minlength=size)
        return counts_V

    def label(self, rows_n: np.ndarray) -> Label:
        """Return the label of a neighbourhood.

        Args:
            rows_n: positions of its tokens, largest activation first; each predicts the token after it.
        """
        if not len(rows_n):
            return Label([], 0.0, [], 0.0, 0.0, 0.0, 0.0)
        read_n, next_n = self.store.tokens[rows_n], self.store.tokens[rows_n + 1]
        after = _distinctive_tokens(read_n, self.read_counts_V)
        says = _distinctive_tokens(next_n, self.target_counts_V)
        follows_n = np.isin(next_n, says)
        tenth = max(1, len(rows_n) // 10)
        middle = (len(rows_n) - tenth) // 2
        random_rows = np.random.default_rng(0).permutation(len(rows_n))[:tenth]
        return Label(
            after=[token_text(self.store.tokenizer, [token]) for token in after],
            after_share=float(np.isin(read_n, after).mean()),
            says=[token_text(self.store.tokenizer, [token]) for token in says],
            says_share=float(follows_n.mean()),
            says_share_top=float(follows_n[:tenth].mean()),
            says_share_middle=float(follows_n[middle : middle + tenth].mean()),
            says_share_random=float(follows_n[random_rows].mean()),
        )


def _distinctive_tokens(tokens_n: np.ndarray, counts_V: np.ndarray) -> list[int]:
    """Return the tokens with the largest count here times the logarithm of count over expected count."""
    counts_here_V = np.bincount(tokens_n, minlength=len(counts_V))
    present = np.flatnonzero(counts_here_V)
    expected = counts_V[present] / counts_V.sum() * len(tokens_n)
    gain = counts_here_V[present] * np.log(counts_here_V[present] / np.maximum(expected, 1e-9))
    order = np.argsort(-gain, kind="stable")[:LABEL_TOKENS]
    return [int(present[at]) for at in order if gain[at] > 0]
