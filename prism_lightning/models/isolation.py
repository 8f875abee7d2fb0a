"""Whether a decoder keeps documents apart that share a block, given positions that restart at each of them.

Shape suffixes: B blocks, T positions, D hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from prism_lightning.common.errors import UserError
from prism_lightning.models.language_model import PrismForCausalLM

PROBE_TOKENS = 12  # of each of the two documents
TOLERANCE = 1e-4  # relative difference of hidden states in fp32
NARROW_TOLERANCE = 16  # times the spacing of a narrower number type near 1


@torch.no_grad()
def check_isolation(model: PrismForCausalLM) -> None:
    """Compare the hidden states of two short documents in one block with those of each alone.

    Raises:
        UserError: they differ, or the decoder takes no positions.
    """
    kind = model.config.get_text_config().model_type
    advice = "set data.isolate_documents false, so that attention crosses documents in a block"
    training = model.training
    model.eval()
    try:
        packed_TD, alone_TD = _probe(model)
    except (TypeError, ValueError) as error:
        raise UserError(f"the decoder {kind} takes no positions that restart at every document: {advice}") from error
    finally:
        model.train(training)
    difference = float((packed_TD - alone_TD).norm(dim=-1).max() / alone_TD.norm(dim=-1).max())
    if not difference <= max(TOLERANCE, NARROW_TOLERANCE * torch.finfo(model.dtype).eps):
        raise UserError(f"the decoder {kind} does not keep documents apart that share a block: {advice}")


def _probe(model: PrismForCausalLM) -> tuple[Tensor, Tensor]:
    """Return the hidden states [T, D] of two documents in one block, and of each alone."""
    length = max(1, min(PROBE_TOKENS, model.config.context_length // 2))
    ids_BT = torch.arange(2 * length, device=model.device).view(2, length) * 7 % model.config.vocab_size
    positions_BT = torch.arange(length, device=model.device).expand(2, length)
    packed_BTD = model.hidden_states(ids_BT.reshape(1, -1), position_ids=positions_BT.reshape(1, -1))
    alone_BTD = model.hidden_states(ids_BT)
    return packed_BTD.flatten(0, 1).float(), alone_BTD.flatten(0, 1).float()
