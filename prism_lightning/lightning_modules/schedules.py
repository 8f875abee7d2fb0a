"""Learning-rate schedules: cosine, and warm-up-stable-decay."""

from __future__ import annotations

import math
from typing import Literal

from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

Schedule = Literal["cosine", "wsd"]
WSD_DECAY_SHARE = 0.2  # last fifth of all steps: the share that the papers on warm-up-stable-decay use


# Not transformers' schedules: their warm-up from 0 would train nothing at the first step, and every run's weights would
# change (factors differ by 0.01 for the cosine and 0.09 for WSD at 100 warm-up steps). After the warm-up they agree.
def schedule_factor(step: int, schedule: Schedule, warmup_steps: int, total_steps: int, final_share: float) -> float:
    """Return the factor on the peak learning rate at an optimiser step.

    Args:
        step: optimiser steps done.
        schedule: after the warm-up "cosine" falls along a half cosine; "wsd" is stable, then falls linearly.
        warmup_steps: steps of linear warm-up, from 1 / warmup_steps to 1.
        total_steps: steps of the run, warm-up included.
        final_share: the factor at the last step.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule == "cosine":
        progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
        return final_share + (1 - final_share) * 0.5 * (1 + math.cos(math.pi * progress))
    remaining_decay = (total_steps - step) / max(1.0, WSD_DECAY_SHARE * total_steps)
    return final_share + (1 - final_share) * min(1.0, max(0.0, remaining_decay))


def lr_schedule(
    optimizer: AdamW, schedule: Schedule, warmup_steps: int, total_steps: int, final_share: float
) -> LambdaLR:
    """Return a torch scheduler of `schedule_factor`, to be stepped once per optimiser step; arguments as there."""
    return LambdaLR(optimizer, lambda step: schedule_factor(step, schedule, warmup_steps, total_steps, final_share))
