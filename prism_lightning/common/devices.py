"""Which device computes, and in which type: what `--device` and `--dtype` mean, in one place."""

from __future__ import annotations

import re

import torch

from prism_lightning.common.errors import UserError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def device_named(name: str, rank: int = 0) -> torch.device:
    """The device that `--device` names.

    Args:
        name: auto, cpu, cuda, cuda:N or mps. "auto" is CUDA where there is one, otherwise the CPU; mps only when asked
            for, since it has no float64.
        rank: of this process: processes that share "auto" or "cuda" take the machine's devices in turn.

    Raises:
        UserError: another name, or a device that this machine does not have.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return torch.device("cpu")
    if name == "mps":
        if not torch.backends.mps.is_available():
            raise UserError(f"--device mps: torch {torch.__version__} finds no Apple GPU here: give --device cpu")
        return torch.device("mps")
    given = re.fullmatch(r"cuda(?::(\d+))?", name)
    if given is None:
        raise UserError(f"--device {name}: give auto, cpu, cuda, cuda:N or mps")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        raise UserError(f"--device {name}: torch {torch.__version__} finds no CUDA device here: give --device cpu")
    number = rank % count if given[1] is None else int(given[1])
    if number >= count:
        there = "1 CUDA device: give cuda:0" if count == 1 else f"{count} CUDA devices: give cuda:0 to cuda:{count - 1}"
        raise UserError(f"--device {name}: this machine has {there}")
    return torch.device("cuda", number)


def dtype_named(name: str) -> torch.dtype:
    """The type that `--dtype` names; raises UserError for another than fp32 and bf16."""
    if name not in DTYPES:
        raise UserError(f"--dtype {name}: give fp32 or bf16")
    return DTYPES[name]


def check_float64(device: torch.device, what: str) -> None:
    """Raise UserError where a device cannot compute what needs float64."""
    if device.type == "mps":
        raise UserError(f"{what} needs float64, which mps does not have: give --device cpu")
