"""Losses of texts from all logits, to compare faster computations with."""

import numpy as np

from prism_lightning.interventions.hidden_states import token_losses


def text_losses(model, batches, texts):
    """Summed loss in nats [G] and number of targets [G] of every text, under the model's interventions."""
    losses_G, tokens_G = np.zeros(texts), np.zeros(texts)
    for states in batches:
        losses_G += np.bincount(states.text_N, token_losses(model, states.z_ND, states.targets_N).numpy(), texts)
        tokens_G += np.bincount(states.text_N, minlength=texts)
    return losses_G, tokens_G
