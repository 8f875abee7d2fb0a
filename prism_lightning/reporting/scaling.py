"""The scaling law of each model variant as a table, extrapolated to the paper's largest model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from prism_lightning.reporting.runs import Run
from prism_lightning.reporting.scaling_law import ScalingLaw, UnidentifiableLawError, fit_law
from prism_lightning.reporting.tables import Table

PAPER_SIZE, PAPER_TOKENS = 1.6e9, 5e10  # parameters and training tokens of the paper's largest model


@dataclass
class Scaling:
    """Scaling laws of the runs.

    Attributes:
        laws: Fitted laws by the label of the runs.
        refusals: Reason why there is no law, by label.
    """

    laws: dict[str, ScalingLaw]
    refusals: dict[str, str]


def fit_scaling_laws(runs: list[Run], report: Callable[[str, int, int], None]) -> Scaling:
    """Fit a law to the runs of each label.

    Args:
        runs: Finished runs.
        report: Function that is called with the name of a fit, its finished bootstrap draws and their number.
    """
    scaling = Scaling({}, {})
    for label in dict.fromkeys(run.label for run in runs):
        group = [run for run in runs if run.label == label]
        if len({run.data for run in group}) > 1:
            scaling.refusals[label] = "the runs were validated on different data"
            continue
        sizes, tokens, losses = np.array([(run.parameters, run.tokens, run.results["loss"]) for run in group]).T
        try:
            scaling.laws[label] = fit_law(sizes, tokens, losses, report=partial(report, f"scaling law, {label}"))
        except UnidentifiableLawError as error:
            scaling.refusals[label] = str(error)
    return scaling


def scaling_table(scaling: Scaling) -> Table:
    """Return the parameters of each law with intervals, and the loss extrapolated to the paper's largest model."""
    rows = []
    for label, law in scaling.laws.items():
        cells = [f"{value:.3g} ({low:.3g} to {high:.3g})" for value, low, high in law.estimates().values()]
        if not law.has_floor:
            cells[0] = "indistinguishable from 0"
        extrapolated = ""
        if law.has_floor:
            loss, draws = law.loss(PAPER_SIZE, PAPER_TOKENS), law.loss_draws(PAPER_SIZE, PAPER_TOKENS)
            extrapolated = _with_interval(loss, draws)
        rows.append([label, *cells, f"{law.error:.4f}", extrapolated])
    columns = ["model", "E", "A", "alpha", "B", "beta", "error of log L", "loss at 1.6B, 50B tokens"]
    return Table("Scaling law", columns, rows, _note(scaling))


def _note(scaling: Scaling) -> str:
    note = (
        "L(N, D) = E + A / N^alpha + B / D^beta in nats per token. N is the number of parameters of decoder, embeddings"
        " and head, D the number of training tokens. The 95 % intervals are from bootstrap draws of the runs. They do"
        " not cover the error of extrapolating the law."
    )
    for label, reason in scaling.refusals.items():
        note += f" No law for {label}: {reason}."
    without_floor = [label for label, law in scaling.laws.items() if not law.has_floor]
    if without_floor:
        note += (
            f" The runs cannot distinguish E of {' and '.join(without_floor)} from 0. At 1.6B parameters E is most of"
            " the loss, so the table shows no loss there. Larger models and more tokens are needed."
        )
    gap = extrapolated_gap(scaling)
    if gap is not None:
        note += f" PRISM minus dense at 1.6B parameters and 50B tokens: {gap} nats."
    return note


def extrapolated_gap(scaling: Scaling) -> str | None:
    """Return PRISM's extrapolated loss minus the dense model's with its interval; None if a law cannot give one."""
    if set(scaling.laws) != {"dense", "PRISM"}:
        return None
    dense, prism = scaling.laws["dense"], scaling.laws["PRISM"]
    if not (dense.has_floor and prism.has_floor):
        return None
    at = (PAPER_SIZE, PAPER_TOKENS)
    return _with_interval(prism.loss(*at) - dense.loss(*at), prism.loss_draws(*at) - dense.loss_draws(*at), "+.3f")


def _with_interval(value: float, draws: np.ndarray, form: str = ".3f") -> str:
    low, high = np.quantile(draws, [0.025, 0.975])
    return f"{value:{form}} ({low:{form}} to {high:{form}})"
