"""Time of generation with and without an intervention."""

from __future__ import annotations

import math
import time

import torch

from prism_lightning.models import PrismForCausalLM
from prism_lightning.models.steering import Scaling

CONDITIONS = ("without", "with")
PROMPT_TOKENS = 16


def compare_generation(
    model: PrismForCausalLM,
    batch: int,
    factors: dict[int, float],
    new_tokens: int,
    repeats: int,
    seconds: float = math.inf,
) -> dict[str, list[float]]:
    """Return the milliseconds per token "without" and "with" factors, in pairs, and the increase "more_percent".

    The conditions take turns; the first one changes from pair to pair. A pair before the first repeat warms up.

    Args:
        model: PRISM model on its device.
        batch: Number of prompts, each of 16 random tokens, that are continued at once.
        factors: Factors on prototypes.
        new_tokens: New tokens of each prompt.
        repeats: Number of pairs.
        seconds: Time after which no further pair begins; at least one pair is measured.
    """
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(0, model.config.vocab_size, (batch, PROMPT_TOKENS), generator=generator).to(model.device)
    times: dict[str, list[float]] = {condition: [] for condition in CONDITIONS}
    started = time.perf_counter()
    for repeat in range(repeats + 1):
        if repeat > 1 and time.perf_counter() - started > seconds:
            break
        for condition in CONDITIONS if repeat % 2 else CONDITIONS[::-1]:
            model.intervene(Scaling(factors if condition == "with" else {}))
            milliseconds = milliseconds_per_token(model, prompts, new_tokens)
            if repeat:
                times[condition].append(milliseconds)
    model.intervene()
    more = [100 * (with_ / without - 1) for without, with_ in zip(*times.values(), strict=True)]
    return times | {"more_percent": more}


def milliseconds_per_token(model: PrismForCausalLM, prompts: torch.Tensor, new_tokens: int) -> float:
    """Return the time of greedy generation per new token of a prompt."""
    started = time.perf_counter()
    model.generate(  # type: ignore[misc]
        prompts,
        attention_mask=torch.ones_like(prompts),
        do_sample=False,
        min_new_tokens=new_tokens,
        max_new_tokens=new_tokens,
    )
    if prompts.is_cuda:
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - started) / new_tokens
