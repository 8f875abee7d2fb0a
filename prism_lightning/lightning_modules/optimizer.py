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
WSD_DECAY_SHARE = 0.2  # of all steps, at the end: the share the warm-up-stable-decay papers use


def parameter_groups(
    model: PrismForCausalLM, learning_rate: float, prototype_learning_rate: float, weight_decay: float
) -> list[dict[str, Any]]:
    """Matrices decay; biases, norms and position-like vectors do not; prototypes have a rate of their own, no decay.

    Grouped by the owning module, not by shape: a sharding strategy may have flattened every parameter already.
    A tied matrix is listed once. The prototypes' epsilon suits gradients that are scaled down to a thousandth.
    """
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


def schedule_factor(step: int, schedule: Schedule, warmup_steps: int, total_steps: int, final: float) -> float:
    """Factor on the learning rate at an optimiser step: linear warm-up, then cosine, or stable and linear decay."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule == "cosine":
        progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
        return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))
    left = (total_steps - step) / max(1.0, WSD_DECAY_SHARE * total_steps)
    return final + (1 - final) * min(1.0, max(0.0, left))


def lr_schedule(optimizer: AdamW, schedule: Schedule, warmup_steps: int, total_steps: int, final: float) -> LambdaLR:
    """The schedule as a torch scheduler, stepped once per optimiser step."""
    return LambdaLR(optimizer, lambda step: schedule_factor(step, schedule, warmup_steps, total_steps, final))
