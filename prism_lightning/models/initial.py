"""The model that a recipe starts from: new weights for the settings of a decoder, or pretrained ones."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch

from prism_lightning.common.errors import UserError
from prism_lightning.models.configuration import PrismConfig
from prism_lightning.models.conversion import configuration_of, converted
from prism_lightning.models.language_model import PrismForCausalLM
from prism_lightning.models.pretrained import decoder_configuration, open_pretrained

_reads_weights = ContextVar("_reads_weights", default=True)


@contextmanager
def without_pretrained_weights() -> Iterator[None]:
    """Within this context `initial_model` reads the configuration of a pretrained model and not its weights.

    For models whose weights are loaded from a checkpoint, or whose size alone is of interest.
    """
    token = _reads_weights.set(False)
    try:
        yield
    finally:
        _reads_weights.reset(token)


def initial_model(
    backbone: dict[str, Any] | None, pretrained: str | None, gguf_file: str | None, **prototype_settings: Any
) -> PrismForCausalLM:
    """Return a model to train, in training mode.

    Args:
        backbone: settings of a decoder with new weights.
        pretrained: hub id or folder of the model to start from, in place of `backbone`.
        gguf_file: name of a GGUF file of `pretrained`.
        prototype_settings: settings of `PrismConfig` about prototypes.

    Raises:
        UserError: both or neither of `backbone` and `pretrained`, or one of them cannot be used.
    """
    if (backbone is None) == (pretrained is None):
        both = "both are given" if pretrained else "neither is given"
        raise UserError(
            f"model.backbone and model.pretrained: {both}; give settings of a new decoder, e.g. {{model_type: gpt2}},"
            " or the hub id or folder of a pretrained one"
        )
    if gguf_file and pretrained is None:
        raise UserError(f"model.gguf_file is {gguf_file}: give the folder that holds it by model.pretrained")
    if pretrained is None:
        return PrismForCausalLM(PrismConfig(backbone_config=backbone, **prototype_settings))
    on_meta = torch.get_default_device().type == "meta"  # where a model has no weights
    if _reads_weights.get() and not on_meta:
        native = open_pretrained(pretrained, gguf_file)
        return converted(native, base_model=pretrained, fused=True, **prototype_settings).train()
    config = decoder_configuration(pretrained, gguf_file)
    config.dtype = torch.float32  # as it is opened
    if hasattr(config, "quantization_config"):  # of a GGUF file, whose weights are dequantised
        del config.quantization_config
    return PrismForCausalLM(configuration_of(config, base_model=pretrained, fused=True, **prototype_settings))
