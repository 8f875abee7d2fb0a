"""Estimate the cost of a trial: parameters, tokens, floating-point operations (FLOPs), and hours on a device."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch

from prism_lightning.common.errors import UserError, nearest
from prism_lightning.config.validate import MODEL_PATHS, problems_in
from prism_lightning.lightning_modules.dense import DenseLM
from prism_lightning.models.flops import PEAK_FLOPS, flops_per_token
from prism_lightning.models.initial import without_pretrained_weights
from prism_lightning.sweeps.trials import SweepTrial

CPU = "cpu-2-cores"
CPU_FLOPS = 1.1e11  # per second: the quickstart's 12,123 tokens/s of 9.2 M operations each (docs/LOG.md)
ASSUMED_UTILISATION = 0.4  # share of an accelerator's peak that training is assumed to reach


@dataclass(frozen=True)
class TrialCost:
    """Estimated cost of a trial.

    Attributes:
        parameters: Number of parameters, prototypes included.
        tokens: Number of training tokens.
        flops: FLOPs of training, forward and backward.
        hours: Training time on the device of the plan.
    """

    parameters: int
    tokens: int
    flops: float
    hours: float


def device_speed(name: str) -> float:
    """Return the FLOPs per second that training is expected to reach on "H200", "8xH100" or "cpu-2-cores".

    Raises:
        UserError: the device's peak is not known.
    """
    count, _, device = name.rpartition("x") if re.match(r"\d+x", name) else ("1", "", name)
    speeds = {known.lower(): peak * ASSUMED_UTILISATION for known, peak in PEAK_FLOPS.items()} | {CPU: CPU_FLOPS}
    if device.lower() not in speeds:
        raise UserError(f"device {name!r} is not known: {nearest(device, [CPU, *PEAK_FLOPS])}")
    return int(count) * speeds[device.lower()]


def module_without_weights(config: dict[str, Any], source: str) -> DenseLM:
    """Return the Lightning module of a composed recipe, with weights on the meta device (they take no memory).

    Of a pretrained model only the configuration is read.

    Args:
        config: Composed recipe.
        source: Name of the trial or directory that the recipe belongs to, for error messages.

    Raises:
        UserError: all problems of the recipe, or the reason why the model cannot be built from it.
    """
    problems = problems_in(config)
    if problems:
        raise UserError([f"{source}: {problem}" for problem in problems])
    try:
        with torch.device("meta"), without_pretrained_weights():
            module: DenseLM = MODEL_PATHS[config["model"]["class_path"]](**config["model"]["init_args"])
    except (ValueError, TypeError, RuntimeError) as error:
        raise UserError(f"{source}: the model cannot be built: {' '.join(str(error).split())[:200]}") from error
    return module


def trial_cost(trial: SweepTrial, speed: float) -> TrialCost:
    """Return a trial's cost on a device that computes `speed` FLOPs per second."""
    module = module_without_weights(trial.config, trial.name)
    parameters = sum(parameter.numel() for parameter in module.parameters())
    flops = training_flops_per_token(module, trial.block_size) * trial.tokens
    return TrialCost(parameters, trial.tokens, flops, flops / speed / 3600)


def training_flops_per_token(module: DenseLM, block_size: int) -> float:
    """Return the FLOPs of training per token: decoder and head, and the forward search over the K prototypes."""
    model, config = module.model, module.model.config
    search = 2 * config.num_prototypes * config.hidden_size
    decoder = config.get_text_config()
    return flops_per_token(model.matrix_parameters, decoder, block_size, model.frozen_parameters) + search
