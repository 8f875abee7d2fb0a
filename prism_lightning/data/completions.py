"""Token ids and targets of documents with masked targets: prompts with completions, and chats."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerFast

from prism_lightning.data.chats import ChatEncoder
from prism_lightning.data.sources import Document
from prism_lightning.data.tokenizer import beginning_ids, encode_batch


class MaskedDocument(NamedTuple):
    """A tokenised document.

    Attributes:
        ids: token ids, the end-of-text token included.
        targets: whether each token is a target.
        target_bytes: UTF-8 length of the text that is a target, without special tokens.
    """

    ids: np.ndarray
    targets: np.ndarray
    target_bytes: int


def encode_masked(tokenizer: PreTrainedTokenizerFast, documents: list[Document]) -> list[MaskedDocument]:
    """Return the tokens of documents that are all chats, or all prompts with completions.

    Raises:
        UserError: as `ChatEncoder`.
    """
    if documents[0].messages is None:
        return _encode_completions(tokenizer, documents)
    encoder = ChatEncoder(tokenizer)
    return [_ended(encoder, tokenizer, document) for document in documents]


def _encode_completions(tokenizer: PreTrainedTokenizerFast, documents: list[Document]) -> list[MaskedDocument]:
    """Encode prompt and completion apart, as they are when the model continues the prompt."""
    lengths = [document.prompt_length or 0 for document in documents]
    prompts = [document.text[:length] for document, length in zip(documents, lengths, strict=True)]
    completions = [document.text[length:] for document, length in zip(documents, lengths, strict=True)]
    prompt_ids = encode_batch(tokenizer, prompts, [length == 0 for length in lengths])
    completion_ids = encode_batch(tokenizer, completions, [length > 0 for length in lengths])
    end = np.array([tokenizer.eos_token_id], np.uint32)
    beginning = len(beginning_ids(tokenizer))  # never a target; it belongs to a completion whose prompt is empty
    documents_ids = [np.concatenate([*parts, end]) for parts in zip(prompt_ids, completion_ids, strict=True)]
    return [
        MaskedDocument(ids, np.arange(len(ids)) >= max(len(prompt), beginning), len(text.encode()))
        for ids, prompt, text in zip(documents_ids, prompt_ids, completions, strict=True)
    ]


def _ended(encoder: ChatEncoder, tokenizer: PreTrainedTokenizerFast, document: Document) -> MaskedDocument:
    """Encode a chat; where the template does not end with the end-of-text token, add it as a masked target."""
    ids, targets, target_bytes = encoder.encode(document)
    if not len(ids) or ids[-1] != tokenizer.eos_token_id:
        ids, targets = np.append(ids, np.uint32(tokenizer.eos_token_id)), np.append(targets, False)
    return MaskedDocument(ids, targets, target_bytes)
