"""AdamW's parameter groups."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from prism_lightning.models import PrismForCausalLM, PrototypeLayer


def parameter_groups(
    model: PrismForCausalLM, learning_rate: float, prototype_learning_rate: float, weight_decay: float
) -> list[dict[str, Any]]:
    """Return AdamW's parameter groups: "decayed" matrices, "plain" vectors without decay, and "prototypes".

    The prototypes have a learning rate of their own and no decay. Their epsilon suits gradients that are scaled to a
    thousandth (method, section 3). A tied matrix is listed once. Frozen parameters and empty groups are left out.
    """
    # Grouped by the owning module, not by shape: a sharding strategy may have flattened every parameter already.
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    prototypes: list[nn.Parameter] = []
    seen: set[int] = set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen or not parameter.requires_grad:
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
