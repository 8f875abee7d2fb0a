"""Greedy continuation of token ids within the model's context. Shape suffixes: T tokens."""

from __future__ import annotations

import torch

from prism_lightning.common.errors import UserError
from prism_lightning.models.language_model import PrismForCausalLM


def continued(model: PrismForCausalLM, ids: list[int], new_tokens: int) -> list[int]:
    """Return token ids followed by their greedy continuation.

    Args:
        model: in eval mode.
        ids: at least one token id.
        new_tokens: number of tokens to add at most; fewer after an end-of-text token.
    """
    tokens_1T = torch.tensor([ids], device=model.device)
    out = model.generate(  # type: ignore[misc]
        tokens_1T, attention_mask=torch.ones_like(tokens_1T), max_new_tokens=new_tokens, do_sample=False
    )
    return list(out[0].tolist())


def check_length(model: PrismForCausalLM, tokens: int) -> None:
    """Raise UserError if a number of tokens is larger than the model's context."""
    if tokens > model.config.context_length:
        raise UserError(
            f"{tokens} tokens do not fit into the model's context of {model.config.context_length}: shorten the text"
        )
