"""Continue token ids greedily, within the model's context."""

from __future__ import annotations

import torch

from prism_lightning.common.errors import UserError
from prism_lightning.models.language_model import PrismForCausalLM


def continued(model: PrismForCausalLM, ids: list[int], new_tokens: int) -> list[int]:
    """Token ids with the likeliest continuation behind them."""
    tokens_1T = torch.tensor([ids], device=model.device)
    out = model.generate(  # type: ignore[misc]
        tokens_1T, attention_mask=torch.ones_like(tokens_1T), max_new_tokens=new_tokens, do_sample=False
    )
    return list(out[0].tolist())


def check_length(model: PrismForCausalLM, tokens: int) -> None:
    """Raises UserError where a text would not fit into the model's context."""
    if tokens > model.config.context_length:
        raise UserError(
            f"{tokens} tokens do not fit into the model's context of {model.config.context_length}: shorten the text"
        )
