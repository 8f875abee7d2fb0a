"""Tokens as text for people: a token that is part of a character is shown as its bytes, such as <E4 BD>.

Decoding would turn every such part into U+FFFD, so that all parts looked alike, and like a real U+FFFD of the text.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable
from functools import cache

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")
SPACE_MARK = "▁"  # stands for a space in sentencepiece vocabularies


def token_text(tokenizer: PreTrainedTokenizerFast, ids: Iterable[int]) -> str:
    """Return the text of consecutive tokens; bytes that are no whole character are shown as <E4 BD>.

    The texts of two adjacent sequences of tokens, joined, are the text of both, unless a character is cut between them.
    """
    return token_bytes(tokenizer, ids).decode("utf-8", "shown_as_bytes")


def token_bytes(tokenizer: PreTrainedTokenizerFast, ids: Iterable[int]) -> bytes:
    """Return the UTF-8 bytes of consecutive tokens, without loss for byte-level and byte-fallback vocabularies."""
    backend = tokenizer.backend_tokenizer
    kinds = _decoder_kinds(backend)
    ids = [int(number) for number in ids]
    tokens = [backend.id_to_token(number) for number in ids]
    if not kinds & {"ByteLevel", "ByteFallback", "Metaspace"}:
        return str(tokenizer.decode(ids)).encode()
    added = {number: token.content for number, token in backend.get_added_tokens_decoder().items()}
    parts = []
    for number, token in zip(ids, tokens, strict=True):
        if token is None:  # A model's vocabulary may be larger than its tokenizer's.
            parts.append(f"<token {number}>".encode())
        elif "ByteFallback" in kinds and (match := BYTE_TOKEN.fullmatch(token)):
            parts.append(bytes.fromhex(match[1]))
        elif number in added:
            parts.append(added[number].encode())
        elif "ByteLevel" in kinds and all(character in _bytes_of_characters() for character in token):
            parts.append(bytes(map(_bytes_of_characters().__getitem__, token)))
        else:
            parts.append(token.replace(SPACE_MARK, " ").encode())
    return b"".join(parts)


def is_byte_level(tokenizer: Tokenizer) -> bool:
    """Return whether the vocabulary spells bytes as characters, as GPT-2's does."""
    return "ByteLevel" in _decoder_kinds(tokenizer)


def _decoder_kinds(tokenizer: Tokenizer) -> set[str]:
    """Return the type names of a tokenizer's decoders."""
    if tokenizer.decoder is None:
        return set()
    state = json.loads(tokenizer.decoder.__getstate__())
    return {str(state["type"])} | {str(decoder["type"]) for decoder in state.get("decoders", [])}


@cache
def _bytes_of_characters() -> dict[str, int]:
    """Return the byte that each character of a byte-level vocabulary stands for, by GPT-2's table."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


def _shown_as_bytes(error: UnicodeError) -> tuple[str, int]:
    """Handle a decoding error: replace bytes that are no character by their hexadecimal digits."""
    assert isinstance(error, UnicodeDecodeError)
    return f"<{error.object[error.start : error.end].hex(' ').upper()}>", error.end


codecs.register_error("shown_as_bytes", _shown_as_bytes)
