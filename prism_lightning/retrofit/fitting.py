"""Fitting a dictionary of prototypes to sampled hidden states; resumed bit for bit after a stop.

Shape suffixes: N tokens, n of a batch, D hidden size, K prototypes, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from prism_lightning.common.files import partial_file
from prism_lightning.models.encoders import logit_metric
from prism_lightning.models.polishing import Polishing
from prism_lightning.models.prototypes import PrototypeLayer, prototypes_from
from prism_lightning.retrofit.hidden_states import StateFile
from prism_lightning.retrofit.settings import RetrofitSettings

METRIC_TOKENS = 8192  # of the sample, over which the head's Fisher matrix is averaged
START_TOKENS_PER_PROTOTYPE = 4  # of the sample, from which the first prototypes are drawn
SAVE_SECONDS = 30.0


def fit_prototypes(
    states: StateFile,
    head_VD: Tensor,
    settings: RetrofitSettings,
    checkpoint: Path,
    report: Callable[[int, int], object],
) -> PrototypeLayer:
    """Return a layer of prototypes fitted to hidden states.

    A pursuit is fitted in its own metric: states and prototypes are multiplied by A, and the result by its inverse.

    Args:
        states: complete.
        head_VD: W, which defines the metric of a pursuit; on the device to compute on.
        settings: of the retrofit.
        checkpoint: file of the unfinished fit.
        report: called with the numbers of finished and of all steps.
    """
    device = head_VD.device
    generator = torch.Generator().manual_seed(settings.seed)

    def drawn(count: int) -> Tensor:
        return states.rows(torch.randperm(states.tokens, generator=generator)[:count], device)

    metric_DD = _metric(head_VD, drawn(METRIC_TOKENS), settings)
    layer = PrototypeLayer(settings.prototypes, head_VD.shape[1], settings.active, settings.encoder).to(device)
    start_ND = drawn(START_TOKENS_PER_PROTOTYPE * settings.prototypes) @ metric_DD
    layer.weight.data.copy_(prototypes_from(start_ND, settings.prototypes, settings.active, generator))
    polishing = Polishing(
        layer,
        lambda rows: states.rows(rows, device) @ metric_DD,
        states.tokens,
        settings.fit_steps,
        settings.learning_rate,
        settings.seed,
    )
    if checkpoint.is_file():
        polishing.restore(load_file(checkpoint))
    _run(polishing, checkpoint, report)
    if layer.metric is not None:
        layer.metric.copy_(metric_DD)
        layer.weight.data.copy_(torch.linalg.solve(metric_DD.double(), layer.weight.data.double().T).T)
    return layer


def _metric(head_VD: Tensor, z_ND: Tensor, settings: RetrofitSettings) -> Tensor:
    """Return A, scaled so that the states keep their mean square; the identity for cosines."""
    if settings.encoder == "cosine":
        return torch.eye(z_ND.shape[1], device=z_ND.device)
    metric_DD = logit_metric(head_VD, z_ND)
    return metric_DD * (z_ND.square().mean() / (z_ND @ metric_DD).square().mean()).sqrt()


def _run(polishing: Polishing, checkpoint: Path, report: Callable[[int, int], object]) -> None:
    """Take the remaining steps; a stop loses at most the last `SAVE_SECONDS`."""
    saved = time.monotonic()
    while polishing.steps_done < polishing.steps:
        polishing.step()
        report(polishing.steps_done, polishing.steps)
        if polishing.steps_done == polishing.steps or time.monotonic() - saved > SAVE_SECONDS:
            tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in polishing.state_tensors().items()}
            with partial_file(checkpoint) as partial:
                save_file(tensors, partial)
            saved = time.monotonic()
