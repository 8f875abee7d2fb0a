"""Devices and number types: the meaning of `--device` and `--dtype`."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from prism_lightning.common.errors import UserError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def device_named(name: str, rank: int = 0) -> torch.device:
    """Return the device that `--device` names.

    Args:
        name: auto, cpu, cuda, cuda:N or mps. "auto" is CUDA if available, otherwise the CPU. It is never mps, which has
            no float64.
        rank: of this process. With "auto" or "cuda", process N takes device N modulo the number of devices.

    Raises:
        UserError: the name is unknown, or this machine does not have the device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return torch.device("cpu")
    if name == "mps":
        if not torch.backends.mps.is_available():
            raise UserError(f"--device mps: torch {torch.__version__} finds no Apple GPU here: give --device cpu")
        return torch.device("mps")
    cuda_name = re.fullmatch(r"cuda(?::(\d+))?", name)
    if cuda_name is None:
        raise UserError(f"--device {name}: give auto, cpu, cuda, cuda:N or mps")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        raise UserError(f"--device {name}: torch {torch.__version__} finds no CUDA device here: give --device cpu")
    number = rank % count if cuda_name[1] is None else int(cuda_name[1])
    if number >= count:
        names = "cuda:0" if count == 1 else f"cuda:0 to cuda:{count - 1}"
        devices = "1 CUDA device" if count == 1 else f"{count} CUDA devices"
        raise UserError(f"--device {name}: this machine has {devices}: give {names}")
    return torch.device("cuda", number)


def dtype_named(name: str) -> torch.dtype:
    """Return the type that `--dtype` names; raises UserError for any other than fp32 and bf16."""
    if name not in DTYPES:
        raise UserError(f"--dtype {name}: give fp32 or bf16")
    return DTYPES[name]


def check_float64(device: torch.device, feature: str) -> None:
    """Raise UserError if the device has no float64, naming the feature that needs it."""
    if device.type == "mps":
        raise UserError(f"{feature} needs float64, which mps does not have: give --device cpu")


def available_memory() -> int | None:
    """Return the bytes of memory that this process can still take, with a container's limit; None where unknown."""
    amounts = []
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        amounts.append(1024 * int(next(line.split()[1] for line in lines if line.startswith("MemAvailable"))))
    except (OSError, StopIteration):
        return None
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = ((group / name).read_text().strip() for name in ("memory.max", "memory.current"))
        if limit.isdigit():
            amounts.append(int(limit) - int(used))
    except OSError:  # no container, or an older kind of limit
        pass
    return min(amounts)
