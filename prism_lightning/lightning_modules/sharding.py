"""Reading and writing one whole parameter under any strategy, sharded ones included."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn


def gathered(parameter: nn.Parameter) -> AbstractContextManager:
    """Inside, the parameter has its full shape on every rank (ZeRO-3 keeps only a shard outside)."""
    if not hasattr(parameter, "ds_id"):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameter)


@torch.no_grad()
def write_parameter(parameter: nn.Parameter, value: Tensor) -> None:
    """Overwrite a parameter on every rank; `value` is the same on all of them.

    A ZeRO optimiser keeps its own fp32 copy and would undo a change of the visible weight at its next step, so both
    are written.
    """
    if hasattr(parameter, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters(parameter, modifier_rank=0):
            parameter.copy_(value)
    else:
        parameter.copy_(value)
    if hasattr(parameter, "_hp_mapping") or hasattr(parameter, "ds_id"):
        from deepspeed.utils import safe_set_full_fp32_param

        safe_set_full_fp32_param(parameter, value.float())
