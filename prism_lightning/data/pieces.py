"""Cut long texts into pieces that are encoded one by one: memory then follows the piece, not the document.

The ids are those of the whole text. A cut stands where no token can reach across:

- before a blank that follows something else, or after a line's end before a letter or digit;
- in text without such places, where the pre-tokenizer starts a new word anyway.

Only a single word longer than a piece is cut inside. The tokenizers that we train have no such word
(`tokenizer.LONGEST_WORD`), so for them the ids never differ.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from tokenizers import Tokenizer

from prism_lightning.data.token_text import is_byte_level

# 16 pieces of this length take 250 MB while they are encoded: 124 bytes a character, measured.
PIECE_CHARACTERS = 2**17
UNSETTLED_WORDS = 4  # at the end of a piece: what follows may still change them ("'" + "re" is one word)
# After a line's end only where it stands alone: the end of a text takes several blanks as one word.
PLACES = re.compile(r"(?<=\S)(?= )|(?<=\S\n)(?=[^\W_])")
# Tokens that reach across such a place. A byte-level vocabulary spells a blank Ġ and a line's end Ċ.
ACROSS = {
    True: re.compile(r"[^ĠĊĉč\0]Ġ|Ċ[^ĠĊĉč\0!-/:-@\[-`{-~]"),
    False: re.compile(r"[^\s▁\0][▁ ]|\n[^\W_]"),
}


@dataclass(frozen=True)
class Piece:
    """A part of a text, and what to encode before it: its tokens are dropped again.

    A tokenizer that puts a blank before every text puts it before the context then, and not into the text.
    """

    text: str
    context: str = ""


class Cutter:
    """Cuts texts for one tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer, self.pre_tokenizer = tokenizer, tokenizer.pre_tokenizer

    @cached_property
    def places_are_safe(self) -> bool:
        """Whether no token of the vocabulary reaches across the places."""
        added = {token.content for token in self.tokenizer.get_added_tokens_decoder().values()}
        words = "\0".join(set(self.tokenizer.get_vocab(with_added_tokens=False)) - added)
        across = ACROSS[is_byte_level(self.tokenizer)]
        return not across.search(words) and not ACROSS[False].search("\0".join(added))

    def pieces(self, text: str) -> Iterator[Piece]:
        """The text in pieces of at most PIECE_CHARACTERS, their contexts left out."""
        start, context = 0, ""
        while len(text) - start > PIECE_CHARACTERS:
            end = self._place(text, start)
            following = text[end - 1]
            if end == start:
                end = start + self._word_start(text[start : start + PIECE_CHARACTERS])
                following = "a" if text[end].isspace() else "\n"  # no token reaches from these into the piece
            yield Piece(text[start:end], context)
            start, context = end, following
        yield Piece(text[start:], context)

    def _place(self, text: str, start: int) -> int:
        """The last place to cut within a piece's length; `start` where there is none."""
        if self.places_are_safe:
            limit = start + PIECE_CHARACTERS
            for first in (max(start + 1, limit - 1000), start + 1):  # nearly always the first is enough
                places = [match.start() for match in PLACES.finditer(text, first, limit + 1)]
                if places:
                    return places[-1]
        return start

    def _word_start(self, chunk: str) -> int:
        """The start of the last word of a chunk that what follows the chunk cannot change; its length without one.

        Never behind a blank: the end of a text takes several blanks as one word.
        """
        if self.pre_tokenizer is None:
            return len(chunk)
        starts = [start for _, (start, _) in self.pre_tokenizer.pre_tokenize_str(chunk)][1:-UNSETTLED_WORDS]
        settled = (at for at in reversed(starts) if chunk[at].isspace() or not chunk[at - 1].isspace())
        return next(settled, len(chunk))
