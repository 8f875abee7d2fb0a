"""The plain Hugging Face model of a decoder and its head, for programs that know nothing of prototypes."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from prism_lightning.common.errors import UserError
from prism_lightning.models.language_model import PrismForCausalLM

PROBE_TOKENS = 16  # on which the two models' logits are compared
TOLERANCE = 1e-4  # largest difference of logits: another kernel of GPT-2's activation differs by 1e-6


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
    native = AutoModelForCausalLM.from_config(model.config.get_text_config()).to(model.device).eval()
    native.base_model.load_state_dict(model.backbone.state_dict())
    native.get_output_embeddings().weight.copy_(model.lm_head.weight)
    generator = torch.Generator().manual_seed(0)
    length = min(PROBE_TOKENS, model.config.context_length)
    ids_1T = torch.randint(model.config.vocab_size, (1, length), generator=generator).to(model.device)
    difference = (native(ids_1T).logits - model(ids_1T).logits).abs().max().item()
    if not difference <= TOLERANCE:
        raise UserError(
            f"{family} models compute other logits from the same weights (they differ by {difference:.3g}): export"
            " without --native"
        )
    return native
