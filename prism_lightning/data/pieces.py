"""Cut long texts into pieces that are encoded one by one, so that memory depends on the piece, not on the document.

The token ids are those of the whole text. A text is cut where no token can span the cut:

- before a space that follows a non-space, or between a newline and a letter or digit;
- in text without such places, where the pre-tokenizer begins a new word.

Only a single word that is longer than a piece is cut inside. The tokenizers that we train have no such word
(`tokenizer.LONGEST_WORD`), so their ids never differ.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from tokenizers import Tokenizer

from prism_lightning.data.token_text import is_byte_level

# Encoding 16 pieces of this length takes 250 MB: 124 bytes per character, measured.
PIECE_CHARACTERS = 2**17
UNSETTLED_WORDS = 4  # words at the end of a piece that following text may change: "'" and "re" become one word
# After a newline only if it stands alone: several spaces at the end of a text are one word.
CUT_PLACES = re.compile(r"(?<=\S)(?= )|(?<=\S\n)(?=[^\W_])")
# Tokens that span such a place, for byte-level vocabularies (True) and others. The former spell a space Ġ, a newline Ċ.
SPANNING_TOKENS = {
    True: re.compile(r"[^ĠĊĉč\0]Ġ|Ċ[^ĠĊĉč\0!-/:-@\[-`{-~]"),
    False: re.compile(r"[^\s▁\0][▁ ]|\n[^\W_]"),
}


@dataclass(frozen=True)
class Piece:
    """A part of a text, and a context to encode before it, whose tokens are dropped.

    A tokenizer that puts a space before every text then puts it before the context and not before the piece.
    """

    text: str
    context: str = ""


def context_before(text: str) -> str:
    """Return a context that no token spans together with the beginning of a text."""
    return "a" if text[:1].isspace() else "\n"


class Cutter:
    """Cuts texts into pieces for one tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer, self.pre_tokenizer = tokenizer, tokenizer.pre_tokenizer

    @cached_property
    def places_are_safe(self) -> bool:
        """Whether no token of the vocabulary spans a cut place."""
        added = {token.content for token in self.tokenizer.get_added_tokens_decoder().values()}
        words = "\0".join(set(self.tokenizer.get_vocab(with_added_tokens=False)) - added)
        spanning = SPANNING_TOKENS[is_byte_level(self.tokenizer)]
        return not spanning.search(words) and not SPANNING_TOKENS[False].search("\0".join(added))

    def pieces(self, text: str, continued: bool = False) -> Iterator[Piece]:
        """Yield the text in pieces of at most PIECE_CHARACTERS, not counting their contexts.

        Args:
            text: that is cut.
            continued: whether the text continues another one, so that its first piece has a context, too.
        """
        start, context = 0, context_before(text) if continued else ""
        while len(text) - start > PIECE_CHARACTERS:
            end = self._place(text, start)
            next_context = text[end - 1]
            if end == start:
                end = start + self._word_start(text[start : start + PIECE_CHARACTERS])
                next_context = context_before(text[end])
            yield Piece(text[start:end], context)
            start, context = end, next_context
        yield Piece(text[start:], context)

    def _place(self, text: str, start: int) -> int:
        """Return the last cut place within a piece's length after `start`; `start` where there is none."""
        if self.places_are_safe:
            limit = start + PIECE_CHARACTERS
            for first in (max(start + 1, limit - 1000), start + 1):  # The first is nearly always enough.
                places = [match.start() for match in CUT_PLACES.finditer(text, first, limit + 1)]
                if places:
                    return places[-1]
        return start

    def _word_start(self, chunk: str) -> int:
        """Return the start of a chunk's last word that following text cannot change; the chunk's length without one.

        It is never after a space: several spaces at the end of a text are one word.
        """
        if self.pre_tokenizer is None:
            return len(chunk)
        starts = [start for _, (start, _) in self.pre_tokenizer.pre_tokenize_str(chunk)][1:-UNSETTLED_WORDS]
        settled = (at for at in reversed(starts) if chunk[at].isspace() or not chunk[at - 1].isspace())
        return next(settled, len(chunk))
