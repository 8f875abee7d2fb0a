"""The plain Hugging Face model of a decoder and its head, for programs that know nothing of prototypes."""

from __future__ import annotations

from copy import deepcopy

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from prism_lightning.common.errors import UserError
from prism_lightning.models.conversion import TOLERANCE, largest_difference, logit_factor, probe_tokens
from prism_lightning.models.language_model import PrismForCausalLM

UNFOLDED_ERROR = 1e-6  # of a weight that was multiplied by a factor and divided by it again; fp32 rounds by 6e-8


@torch.no_grad()
def native_model(model: PrismForCausalLM) -> PreTrainedModel:
    """Return the decoder and head of a model as the causal language model of the decoder's own family.

    The logits are compared on a few tokens, since some families compute more than `W z`: they cap or scale logits.

    Args:
        model: dense or PRISM, on any device; prototypes are left out, since un-suppressed logits do not depend on them.

    Raises:
        UserError: interventions are applied, which need the prototypes, or the family computes other logits.
    """
    family = model.config.get_text_config().model_type
    if model.scalings:
        raise UserError("a native model has no prototypes to scale: export without --native, or without --intervention")
    config = deepcopy(model.config.get_text_config())
    # A factor on the logits, which `converted` multiplies into the head, unties it.
    factor = logit_factor(config)
    head_VD, embedding_VD = model.lm_head.weight / factor, model.get_input_embeddings().weight
    error = 0 if factor == 1 else UNFOLDED_ERROR
    tied = head_VD.shape == embedding_VD.shape and torch.allclose(head_VD, embedding_VD, rtol=error, atol=0)  # type: ignore[arg-type]
    config.tie_word_embeddings = tied
    native = AutoModelForCausalLM.from_config(config).to(model.device).eval()
    native.base_model.load_state_dict(model.backbone.state_dict())
    if not tied:
        native.get_output_embeddings().weight.copy_(head_VD)
    ids_1T = probe_tokens(config).to(model.device)
    difference = largest_difference(native(ids_1T).logits, model(ids_1T).logits)
    if not difference <= TOLERANCE:
        raise UserError(
            f"{family} models compute other logits from the same weights (they differ by {difference:.3g}): export"
            " without --native"
        )
    return native
