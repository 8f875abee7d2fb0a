"""Low-rank adapters that are trained here: added to a decoder, saved in peft's format, and merged into its weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.pytorch_utils import Conv1D

from prism_lightning.common.errors import UserError
from prism_lightning.common.files import partial_folder
from prism_lightning.models.adapters import ADAPTER_WEIGHTS, import_peft, quiet
from prism_lightning.models.language_model import PrismForCausalLM


@dataclass
class LoraSettings:
    """Low-rank adapters in place of training all weights of a pretrained decoder.

    Args:
        rank: rank r of every adapter.
        alpha: scale: an adapter adds alpha / r times the product of its two matrices.
        dropout: share of an adapter's inputs that are dropped while training.
        targets: names of the linear layers that get one, such as [q_proj, v_proj]; by default those that peft adapts in
            the model's family, or all linear layers of the decoder in a family that it does not know.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: list[str] | None = None

    def __post_init__(self) -> None:
        problems = [] if self.rank >= 1 else [f"model.lora.rank is {self.rank}: give a positive number"]
        if not self.alpha > 0:
            problems.append(f"model.lora.alpha is {self.alpha}: give a positive number")
        if not 0 <= self.dropout < 1:
            problems.append(f"model.lora.dropout is {self.dropout}: give a share from 0 to below 1")
        if self.targets is not None and not self.targets:
            problems.append("model.lora.targets is empty: name linear layers, or leave it out")
        if problems:
            raise UserError(problems)


def add_adapters(model: PrismForCausalLM, settings: LoraSettings) -> None:
    """Add an adapter to the decoder's linear layers and freeze all other weights of decoder, embeddings and head.

    The adapters add nothing before their first step. They count among the model's matrix parameters, and the frozen
    matrices as frozen ones.

    Args:
        model: changed in place.
        settings: of the adapters.

    Raises:
        UserError: no peft, or a name of no linear layer.
    """
    peft = import_peft()
    names = sorted({name.rpartition(".")[2] for name, module in model.backbone.named_modules() if _is_linear(module)})
    targets = settings.targets or _usual_targets(model) or names
    if unknown := [name for name in targets if name.rpartition(".")[2] not in names]:
        raise UserError(
            f"model.lora.targets names {', '.join(unknown)}, but the linear layers of"
            f" {model.config.get_text_config().model_type} are {', '.join(names)}: give some of these"
        )
    try:
        with quiet():
            peft.inject_adapter_in_model(_configuration(peft, model, settings, targets), model.backbone)
    except ValueError as error:  # a dotted name that ends like a layer
        raise UserError(f"model.lora.targets: {' '.join(str(error).split())[:200]}") from error
    for parameter in (*model.backbone.parameters(), *model.lm_head.parameters()):
        parameter.requires_grad_(False)
    adapters = _parameters(model)
    for parameter in adapters.values():
        parameter.requires_grad_(True)
    model.frozen_parameters = model.matrix_parameters
    model.matrix_parameters += sum(parameter.numel() for parameter in adapters.values())


@torch.no_grad()
def take_out_adapters(model: PrismForCausalLM, merge: bool) -> None:
    """Make the model a plain one again, whose weights can all be trained.

    Args:
        model: changed in place.
        merge: whether the adapters' products are added to the weights, or dropped.

    Raises:
        UserError: merged weights that are not finite.
    """
    from peft.tuners.lora import LoraLayer

    for name, module in list(model.backbone.named_modules()):
        if isinstance(module, LoraLayer):
            if merge:
                try:
                    module.merge(safe_merge=True)
                except ValueError as error:
                    raise UserError(f"the adapter of {name} is not finite: train anew with a lower rate") from error
            model.backbone.set_submodule(name, module.get_base_layer())
    vars(model.backbone).pop("peft_config", None)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    model.matrix_parameters, model.frozen_parameters = model.frozen_parameters or model.matrix_parameters, 0


def save_adapter(model: PrismForCausalLM, settings: LoraSettings, folder: Path) -> None:
    """Write the adapters of a model as `peft.PeftModel.from_pretrained` opens them on the pretrained model.

    Args:
        model: with adapters.
        settings: by which they were added.
        folder: written completely or not at all; an earlier one is replaced.
    """
    peft = import_peft()
    config = model.config.get_text_config()
    native: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    adapters = {
        f"base_model.model.{native.base_model_prefix}.{name.replace('.default', '')}": parameter.detach()
        .cpu()
        .contiguous()
        for name, parameter in _parameters(model).items()
    }
    targets = sorted({name.partition(".lora_")[0].rpartition(".")[2] for name in adapters})
    if settings.targets:
        targets = settings.targets
    with partial_folder(folder) as partial:
        _configuration(peft, model, settings, targets).save_pretrained(partial)
        save_file(adapters, partial / ADAPTER_WEIGHTS, metadata={"format": "pt"})


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | Conv1D)


def _usual_targets(model: PrismForCausalLM) -> list[str] | None:
    """Return the layers that peft adapts in the model's family; None where it knows none, or they are a pattern."""
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as TARGETS

    targets = TARGETS.get(model.config.get_text_config().model_type)
    return list(targets) if isinstance(targets, list) else None


def _configuration(peft: Any, model: PrismForCausalLM, settings: LoraSettings, targets: list[str]) -> Any:
    is_transposed = any(isinstance(module, Conv1D) for module in model.backbone.modules())  # as in GPT-2
    return peft.LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=model.config.base_model,
        inference_mode=True,
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=targets,
        fan_in_fan_out=is_transposed,
    )


def _parameters(model: PrismForCausalLM) -> dict[str, nn.Parameter]:
    """Return the adapters' matrices by their names in the decoder."""
    return {name: parameter for name, parameter in model.backbone.named_parameters() if ".lora_" in name}
