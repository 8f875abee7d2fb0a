"""What a trial will take: parameters, tokens, floating-point operations, hours on a named device."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch

from prism_lightning.common.errors import UserError, nearest
from prism_lightning.config.validate import MODEL_PATHS, problems_in
from prism_lightning.lightning_modules.dense import DenseLM
from prism_lightning.models.flops import PEAK_FLOPS, flops_per_token
from prism_lightning.sweeps.trials import Trial

CPU, CPU_FLOPS = "cpu-2-cores", 1.1e11  # the quickstart's 12,123 tokens/s of 9.2 M operations each (docs/LOG.md)
REACHED = 0.4  # share of an accelerator's peak that training is assumed to reach


@dataclass(frozen=True)
class Cost:
    """What a trial takes.

    Attributes:
        parameters: in all.
        tokens: of training.
        flops: of training, forward and backward.
        hours: on the device of the plan.
    """

    parameters: int
    tokens: int
    flops: float
    hours: float


def device_speed(name: str) -> float:
    """Floating-point operations a second that training is expected to reach on "H200", "8xH100" or "cpu-2-cores".

    Raises:
        UserError: a device whose peak is not known.
    """
    count, _, device = name.rpartition("x") if re.match(r"\d+x", name) else ("1", "", name)
    speeds = {known.lower(): peak * REACHED for known, peak in PEAK_FLOPS.items()} | {CPU: CPU_FLOPS}
    if device.lower() not in speeds:
        raise UserError(f"device {name!r} is not known: {nearest(device, [CPU, *PEAK_FLOPS])}")
    return int(count) * speeds[device.lower()]


def module_of(config: dict[str, Any], where: str) -> DenseLM:
    """A recipe's module without weights.

    Raises:
        UserError: every problem of the recipe, or a decoder that cannot be built from it.
    """
    problems = problems_in(config)
    if problems:
        raise UserError([f"{where}: {problem}" for problem in problems])
    try:
        with torch.device("meta"):
            module: DenseLM = MODEL_PATHS[config["model"]["class_path"]](**config["model"]["init_args"])
    except (ValueError, TypeError, RuntimeError) as error:
        raise UserError(f"{where}: the model cannot be built: {' '.join(str(error).split())[:200]}") from error
    return module


def cost(trial: Trial, speed: float) -> Cost:
    """A trial's cost at a speed in operations a second."""
    module = module_of(trial.config, trial.name)
    parameters = sum(parameter.numel() for parameter in module.parameters())
    flops = training_flops(module, trial.block_size) * trial.tokens
    return Cost(parameters, trial.tokens, flops, flops / speed / 3600)


def training_flops(module: DenseLM, block_size: int) -> float:
    """Operations of training per token: decoder and head, and the search over K prototypes, forward only."""
    config = module.model.config
    search = 2 * config.num_prototypes * config.hidden_size
    return flops_per_token(module.model.matrix_parameters, config.get_text_config(), block_size) + search
