"""The measurement of a retrofitted model on validation text: loss, unexplained variance, usage and faithfulness.

Shape suffixes: n tokens of a batch, D hidden size, k active prototypes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torchmetrics import MeanMetric

from prism_lightning.data.store import TokenStore
from prism_lightning.lightning_modules.metrics import (
    Faithfulness,
    LanguageModelingMetric,
    PrototypeUsage,
    derived,
)
from prism_lightning.models import PrismForCausalLM
from prism_lightning.models.blocks import block_states
from prism_lightning.models.faithfulness import faithfulness_figures
from prism_lightning.models.prototypes import unexplained_variance


@torch.no_grad()
def evaluated(
    model: PrismForCausalLM, store: TokenStore, tokens: int, batch_blocks: int, report: Callable[[int, int], object]
) -> dict[str, Any]:
    """Return the figures that `fit` reports of a model, on blocks spread evenly over a split.

    Args:
        model: in eval mode, with prototypes.
        store: the split.
        tokens: largest number of tokens.
        batch_blocks: number of blocks in one forward pass.
        report: called with the numbers of finished and of all blocks.
    """
    assert model.prototypes is not None
    config = model.config
    loss, unexplained = LanguageModelingMetric(), MeanMetric()
    usage, faithfulness = PrototypeUsage(config.num_prototypes), Faithfulness(config.hidden_size, config.vocab_size)
    for metric in (loss, unexplained, usage, faithfulness):
        metric.to(model.device)
    count = max(1, min(len(store), tokens // store.block_size))
    blocks = np.linspace(0, len(store) - 1, count).astype(int).tolist()
    for start in range(0, count, batch_blocks):
        z_nD, targets_n, _ = block_states(model, store.__getitems__(blocks[start : start + batch_blocks]))
        if not len(targets_n):
            continue
        mixture, _ = model.prototypes(z_nD, head_VD=model.lm_head.weight)
        loss.update(model.lm_head(z_nD, targets_n), len(targets_n))
        unexplained.update(unexplained_variance(z_nD, mixture.mixture_ND), weight=len(targets_n))
        active = mixture.indices_Nk[mixture.activations_Nk > 0]
        usage.update(torch.bincount(active, minlength=config.num_prototypes), len(targets_n))
        faithfulness.update(model.lm_head, z_nD, mixture.mixture_ND, targets_n)
        report(min(start + batch_blocks, count), count)
    figures = derived(loss.compute(), store.bytes_per_token) | {"unexplained_variance": unexplained.compute()}
    figures |= usage.compute() | faithfulness_figures(faithfulness.compute(), model.lm_head)
    return {name: round(float(value), 6) for name, value in figures.items()}
