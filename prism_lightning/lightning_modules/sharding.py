"""Reading and writing one whole parameter under any strategy, also one that shards parameters."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn


def gathered(parameter: nn.Parameter) -> AbstractContextManager:
    """Return a context in which the parameter has its full shape on every rank; outside, ZeRO-3 keeps only a shard."""
    if not hasattr(parameter, "ds_id"):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameter)


@torch.no_grad()
def write_parameter(parameter: nn.Parameter, value: Tensor) -> None:
    """Overwrite a parameter on every rank.

    Args:
        parameter: whole or sharded.
        value: of the full shape, the same on all ranks.
    """
    if hasattr(parameter, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters(parameter, modifier_rank=0):
            parameter.copy_(value)
    else:
        parameter.copy_(value)
    # A ZeRO optimiser keeps an fp32 copy of its own, from which its next step would restore the old weight.
    if hasattr(parameter, "_hp_mapping") or hasattr(parameter, "ds_id"):
        from deepspeed.utils import safe_set_full_fp32_param

        safe_set_full_fp32_param(parameter, value.float())
