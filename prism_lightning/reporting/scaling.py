"""The scaling law of each variant, as a table, and the gap it foresees at the paper's largest size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from prism_lightning.reporting.runs import Run
from prism_lightning.reporting.scaling_law import ScalingLaw, TooFewRunsError, fit
from prism_lightning.reporting.tables import Table

FAR_SIZE, FAR_TOKENS = 1.6e9, 5e10  # the paper's largest model and its training tokens


@dataclass
class Scaling:
    """What the runs say about scale.

    Attributes:
        laws: by label of the runs.
        refused: by label, why there is none.
    """

    laws: dict[str, ScalingLaw]
    refused: dict[str, str]


def scaling_of(runs: list[Run], report: Callable[[str, int, int], None]) -> Scaling:
    """Fit the law of each label that there are runs of, all on the same data."""
    found = Scaling({}, {})
    for variant in dict.fromkeys(run.label for run in runs):
        mine = [run for run in runs if run.label == variant]
        if len({run.data for run in mine}) > 1:
            found.refused[variant] = "the runs were validated on different data"
            continue
        sizes, tokens, losses = np.array([(run.parameters, run.tokens, run.results["loss"]) for run in mine]).T
        try:
            found.laws[variant] = fit(sizes, tokens, losses, report=partial(report, f"scaling law, {variant}"))
        except TooFewRunsError as error:
            found.refused[variant] = str(error)
    return found


def scaling_table(scaling: Scaling) -> Table:
    """E, A, alpha, B and beta with intervals, and the extrapolated loss and gap."""
    rows = []
    for variant, law in scaling.laws.items():
        cells = [f"{value:.3g} ({low:.3g} to {high:.3g})" for value, low, high in law.facts().values()]
        if not law.has_floor:
            cells[0] = "not told from 0"
        far = _interval(law.loss(FAR_SIZE, FAR_TOKENS), _far(law)) if law.has_floor else ""
        rows.append([variant, *cells, f"{law.error:.4f}", far])
    note = (
        "L(N, D) = E + A / N^alpha + B / D^beta in nats; N counts decoder, embeddings and head. Intervals: 95 %, from"
    )
    note += " bootstrap draws of the runs, which know nothing of whether the law holds so far out."
    for variant, reason in scaling.refused.items():
        note += f" No law for {variant}: {reason}."
    floorless = [variant for variant, law in scaling.laws.items() if not law.has_floor]
    if floorless:
        note += (
            f" The runs do not tell E of {' and '.join(floorless)} from 0, so nothing is said of 1.6B, where E is most"
            " of the loss: larger models and more tokens are needed."
        )
    gap = far_gap(scaling)
    if gap is not None:
        note += f" PRISM minus dense at 1.6B parameters and 50B tokens: {gap} nats."
    columns = ["model", "E", "A", "alpha", "B", "beta", "error of log L", "loss at 1.6B, 50B tokens"]
    return Table("Scaling law", columns, rows, note)


def _far(law: ScalingLaw) -> np.ndarray:
    return law.draws(FAR_SIZE, FAR_TOKENS)


def far_gap(scaling: Scaling) -> str | None:
    """PRISM's extrapolated loss minus the dense model's, with its interval; None where a law does not reach so far."""
    if set(scaling.laws) != {"dense", "PRISM"}:
        return None
    dense, prism = scaling.laws["dense"], scaling.laws["PRISM"]
    if not (dense.has_floor and prism.has_floor):
        return None
    value = prism.loss(FAR_SIZE, FAR_TOKENS) - dense.loss(FAR_SIZE, FAR_TOKENS)
    return _interval(value, _far(prism) - _far(dense), "+.3f")


def _interval(value: float, draws: np.ndarray, form: str = ".3f") -> str:
    low, high = np.quantile(draws, [0.025, 0.975])
    return f"{value:{form}} ({low:{form}} to {high:{form}})"
