"""A pretrained decoder as a PRISM or dense model of this package, with equal logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_MAPPING

from prism_lightning.common.errors import UserError
from prism_lightning.models.configuration import PrismConfig
from prism_lightning.models.language_model import PrismForCausalLM, fuse_activations
from prism_lightning.models.prototypes import PrototypeLayer

PROBE_TOKENS = 16  # on which the two models' logits are compared
TOLERANCE = 1e-4  # largest difference of logits, relative to the largest logit where that is above 1


def logit_factor(config: PreTrainedConfig) -> float:
    """Return the factor that a family applies to its logits: Cohere multiplies them, Granite divides them."""
    return float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)


def configuration_of(config: PreTrainedConfig, base_model: str, fused: bool, **prototype_settings: Any) -> PrismConfig:
    """Return the configuration of the model that `converted` makes of a decoder; arguments as there."""
    if logit_factor(config) != 1:
        config.tie_word_embeddings = False
    return PrismConfig(backbone_config=config, base_model=base_model, fuse_activations=fused, **prototype_settings)


@torch.no_grad()
def converted(native: PreTrainedModel, base_model: str, fused: bool, **prototype_settings: Any) -> PrismForCausalLM:
    """Return a model of this package that shares the weights of a pretrained causal language model.

    The decomposition needs logits W z. A factor on the logits is multiplied into W. The logits of both models are
    compared on a few tokens.

    Args:
        native: in eval mode; it must not be used afterwards.
        base_model: hub id or folder name, recorded in the configuration.
        fused: whether GPT-2's activation runs as one kernel, see `PrismConfig`.
        prototype_settings: settings of `PrismConfig` about prototypes.

    Raises:
        UserError: a family whose logits are not W z, by name with the reason.
    """
    family, config = native.config.model_type, native.config
    head = native.get_output_embeddings()
    ids_1T = probe_tokens(config)
    expected_1TV = native(ids_1T).logits
    if reason := _obstacle(native, head):
        raise UserError(f"{family} models are not supported with {reason}: their logits are not W z")
    factor = logit_factor(config)
    settings = configuration_of(config, base_model, fused, **prototype_settings)
    with torch.device("meta"):  # only its structure is needed
        model = PrismForCausalLM(settings)
    model.backbone = native.base_model
    if fused:
        fuse_activations(model.backbone)
    model.lm_head.weight = head.weight if factor == 1 else nn.Parameter(head.weight * factor)
    if model.prototypes is not None:
        model.prototypes = PrototypeLayer(
            settings.num_prototypes, settings.hidden_size, settings.active_prototypes, settings.encoder
        )
    difference = largest_difference(model(ids_1T).logits, expected_1TV)
    if not difference <= TOLERANCE:
        raise UserError(
            f"{family} models are not supported: their logits are not W z (they differ by {difference:.3g})"
        )
    return model.eval()


def largest_difference(logits: Tensor, expected: Tensor) -> float:
    """Return the largest difference of two models' logits, relative to the largest logit where that is above 1."""
    return float((logits - expected).abs().max() / expected.abs().max().clamp_min(1))


def probe_tokens(config: PreTrainedConfig) -> Tensor:
    """Return a few random token ids [1, T], the same at every call, on which logits are compared."""
    length = min(PROBE_TOKENS, config.max_position_embeddings)
    return torch.randint(config.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))


def _obstacle(native: PreTrainedModel, head: nn.Module | None) -> str | None:
    """Return why the logits of a model are not W z, up to a factor; None where nothing is known against it."""
    config = native.config
    if not isinstance(head, nn.Linear):
        return "a head that is no single matrix"
    if getattr(config, "final_logit_softcapping", None):
        return f"capped logits (final_logit_softcapping {config.final_logit_softcapping:g})"
    if head.bias is not None and bool(head.bias.any()):
        return "a bias of the head"
    if head.weight.shape[1] != config.hidden_size:
        return f"a projection between hidden state ({config.hidden_size}) and head ({head.weight.shape[1]})"
    expected: Any = MODEL_MAPPING.get(type(config), type(None))
    if not isinstance(native.base_model, expected):
        return f"a decoder of another class ({type(native.base_model).__name__})"
    return None
