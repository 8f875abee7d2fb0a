"""AdamW with its parameter groups, and the learning-rate schedules."""

from __future__ import annotations

import math
from typing import Any, Literal

from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from transformers.pytorch_utils import Conv1D

from prism_lightning.models import PrismForCausalLM, PrototypeLayer

Schedule = Literal["cosine", "wsd"]
WSD_DECAY_SHARE = 0.2  # last fifth of all steps: the share that the papers on warm-up-stable-decay use


def parameter_groups(
    model: PrismForCausalLM, learning_rate: float, prototype_learning_rate: float, weight_decay: float
) -> list[dict[str, Any]]:
    """Return AdamW's parameter groups: "decayed" matrices, "plain" vectors without decay, and "prototypes".

    The prototypes have a learning rate of their own and no decay. Their epsilon suits gradients that are scaled to a
    thousandth (method, section 3). A tied matrix is listed once. Empty groups are left out.
    """
    # Grouped by the owning module, not by shape: a sharding strategy may have flattened every parameter already.
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    prototypes: list[nn.Parameter] = []
    seen: set[int] = set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            if isinstance(module, PrototypeLayer):
                prototypes.append(parameter)
            elif name == "weight" and isinstance(module, nn.Linear | nn.Embedding | Conv1D):
                decayed.append(parameter)
            else:
                plain.append(parameter)
    groups = [
        {"name": "decayed", "params": decayed, "lr": learning_rate, "weight_decay": weight_decay},
        {"name": "plain", "params": plain, "lr": learning_rate, "weight_decay": 0.0},
        {"name": "prototypes", "params": prototypes, "lr": prototype_learning_rate, "weight_decay": 0.0, "eps": 1e-15},
    ]
    return [group for group in groups if group["params"]]


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
