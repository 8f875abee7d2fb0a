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
from prism_lightning.models.metric_coordinates import METRIC_TOKENS, MetricCoordinates, first_prototypes
from prism_lightning.models.polishing import BATCH_TOKENS, PEAK_LEARNING_RATES, Polishing
from prism_lightning.models.prototypes import PrototypeLayer, prototypes_from
from prism_lightning.models.pursuit import Likeliest
from prism_lightning.retrofit.hidden_states import StateFile
from prism_lightning.retrofit.settings import RetrofitSettings

START_TOKENS_PER_PROTOTYPE = 4  # of the sample, from which the first prototypes are drawn
SAVE_SECONDS = 30.0


def states_needed(settings: RetrofitSettings) -> int:
    """Return the largest number of hidden states that a fit looks at."""
    return max(settings.fit_steps * BATCH_TOKENS, START_TOKENS_PER_PROTOTYPE * settings.prototypes, METRIC_TOKENS)


def fit_prototypes(
    states: StateFile,
    head_VD: Tensor,
    settings: RetrofitSettings,
    checkpoint: Path,
    report: Callable[[int, int], object],
) -> PrototypeLayer:
    """Return a layer of prototypes fitted to hidden states.

    A pursuit is fitted in coordinates in which its mean metric F = A A is the identity.

    Args:
        states: complete.
        head_VD: W, which defines the metric of a pursuit; on the device to compute on.
        settings: of the retrofit.
        checkpoint: file of the unfinished fit.
        report: called with the numbers of finished and of all steps.
    """
    generator = torch.Generator().manual_seed(settings.seed)

    def drawn(count: int) -> Tensor:
        return states.rows(torch.randperm(states.tokens, generator=generator)[:count], head_VD)[0]

    layer = PrototypeLayer(settings.prototypes, head_VD.shape[1], settings.active, settings.encoder).to(head_VD.device)
    start_ND = drawn(START_TOKENS_PER_PROTOTYPE * settings.prototypes)
    if layer.metric is None:
        layer.weight.data.copy_(prototypes_from(start_ND, settings.prototypes, settings.active, generator))
        _run(_polishing(layer, head_VD, states, settings), checkpoint, report)
        return layer
    coordinates = MetricCoordinates(head_VD, drawn(METRIC_TOKENS))
    layer.weight.data.copy_(first_prototypes(coordinates(start_ND), settings.prototypes))
    _run(_polishing(layer, head_VD, states, settings, coordinates), checkpoint, report)
    coordinates.leave(layer)
    return layer


def _polishing(
    layer: PrototypeLayer,
    head_VD: Tensor,
    states: StateFile,
    settings: RetrofitSettings,
    coordinates: MetricCoordinates | None = None,
) -> Polishing:
    def rows_of(rows: Tensor) -> tuple[Tensor, Likeliest]:
        z_nD, likeliest = states.rows(rows, head_VD)
        return (coordinates(z_nD) if coordinates else z_nD), likeliest

    fitted_head_VD = coordinates.head_VD if coordinates else head_VD
    rate = PEAK_LEARNING_RATES[settings.encoder] if settings.learning_rate is None else settings.learning_rate
    return Polishing(layer, fitted_head_VD, rows_of, states.tokens, settings.fit_steps, rate, settings.seed)


def _run(polishing: Polishing, checkpoint: Path, report: Callable[[int, int], object]) -> None:
    """Take the remaining steps; a stop loses at most the last `SAVE_SECONDS`."""
    if checkpoint.is_file():
        polishing.restore(load_file(checkpoint))
    saved = time.monotonic()
    while polishing.steps_done < polishing.steps:
        polishing.step()
        report(polishing.steps_done, polishing.steps)
        if polishing.steps_done == polishing.steps or time.monotonic() - saved > SAVE_SECONDS:
            tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in polishing.state_tensors().items()}
            with partial_file(checkpoint) as partial:
                save_file(tensors, partial)
            saved = time.monotonic()
