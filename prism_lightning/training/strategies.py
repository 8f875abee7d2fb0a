"""Devices and strategies: checks of the trainer's settings before anything is computed."""

from __future__ import annotations

from typing import Any

import torch

from prism_lightning.common.errors import UserError


def check_devices(recipe: str, trainer: dict[str, Any]) -> None:
    """Check that this machine has the GPUs that the recipe needs.

    Raises:
        UserError: it has none, or fewer.
    """
    accelerator = str(trainer.get("accelerator", "auto"))
    if accelerator in ("gpu", "cuda") and not torch.cuda.is_available():
        raise UserError(
            f"{recipe} needs CUDA GPUs (trainer.accelerator={accelerator}) but this machine has none that torch"
            f" {torch.__version__} can use: train recipes/quickstart.yaml here"
        )
    devices = trainer.get("devices", "auto")
    if accelerator in ("gpu", "cuda") and isinstance(devices, int) and devices > torch.cuda.device_count():
        raise UserError(
            f"{recipe} asks for {devices} GPUs (trainer.devices) but this machine has"
            f" {torch.cuda.device_count()}: lower it"
        )


# Settings of the trainer that other settings decide: the values allowed, and the setting to use in their place.
DECIDED_ELSEWHERE: dict[str, tuple[tuple[Any, ...], str]] = {
    "default_root_dir": ((None,), "everything that a run writes goes to its run directory: set run.dir"),
    "accumulate_grad_batches": ((1, None), "data.batch_size and data.micro_batch_size decide it"),
    "max_epochs": ((-1, None), "a run's length is trainer.max_steps"),
    "min_epochs": ((None,), "a run's length is trainer.max_steps"),
    "use_distributed_sampler": ((False, None), "the data module divides blocks among devices itself"),
    "check_val_every_n_epoch": ((None,), "trainer.val_check_interval counts optimiser steps"),
    "reload_dataloaders_every_n_epochs": ((0, None), "the order of blocks depends on the seed and the step alone"),
    "limit_train_batches": ((None, 1.0), "a run's length is trainer.max_steps"),
    "limit_val_batches": ((None, 1.0), "set data.validation_blocks"),
    "limit_test_batches": ((None, 1.0), "set data.validation_blocks"),
    "limit_predict_batches": ((None, 1.0), "set data.validation_blocks"),
    "overfit_batches": ((None, 0.0, 0), "set data.max_tokens"),
    "barebones": ((False, None), "it would turn off checkpoints and metrics that a run needs"),
    "fast_dev_run": ((False, 0, None), "it would export a model of one step: set trainer.max_steps and run.dir"),
}


def check_trainer(recipe: str, trainer: dict[str, Any], fit: bool) -> None:
    """Check that no setting of the trainer would be ignored silently.

    Raises:
        UserError: all such settings at once, and for `fit` a missing number of steps.
    """
    problems = [
        f"{recipe}: trainer.{name} is {trainer[name]!r} and has no effect here: {reason}"
        for name, (allowed_values, reason) in DECIDED_ELSEWHERE.items()
        if name in trainer
        and (type(trainer[name]), trainer[name]) not in [(type(value), value) for value in allowed_values]
    ]
    if fit and (trainer.get("max_steps") or -1) < 1:
        problems.append(f"{recipe}: trainer.max_steps must be a positive number: it sets the schedule's length")
    if problems:
        raise UserError(problems)


def device_count(trainer: dict[str, Any]) -> int:
    """Return the number of devices that the recipe uses over all nodes."""
    devices, nodes = trainer.get("devices", "auto"), int(trainer.get("num_nodes", 1) or 1)
    if isinstance(devices, list):
        return len(devices) * nodes
    if str(devices) in ("auto", "-1"):
        on_cpu = str(trainer.get("accelerator", "auto")) == "cpu" or not torch.cuda.is_available()
        return nodes * (1 if on_cpu else torch.cuda.device_count())
    return int(devices) * nodes


def settled_strategy(trainer: dict[str, Any]) -> Any:
    """Return the recipe's strategy; "auto" replaces DeepSpeed on one device, where there is nothing to shard."""
    strategy = trainer.get("strategy", "auto")
    if strategy_name(strategy) in ("DeepSpeedStrategy", "deepspeed") and device_count(trainer) == 1:
        return "auto"
    return strategy


def strategy_name(strategy: Any) -> str:
    """Return the name of a strategy, or of its class without the module."""
    name = strategy.get("class_path", "") if isinstance(strategy, dict) else str(strategy)
    return name.rpartition(".")[2]


def check_adapters(recipe: str, model: dict[str, Any], trainer: dict[str, Any]) -> None:
    """Check that adapters are trained by a strategy that keeps every weight whole.

    Raises:
        UserError: DeepSpeed or FSDP on several devices.
    """
    name = strategy_name(settled_strategy(trainer))
    if model.get("lora") and any(sharding in name.lower() for sharding in ("deepspeed", "fsdp")):
        raise UserError(
            f"{recipe}: model.lora needs whole weights, and {name} shards them: set trainer.strategy to ddp or auto"
        )
