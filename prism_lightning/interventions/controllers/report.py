"""What `calibrate` shows: a table in the terminal, a Markdown report with the traced prototypes, and a plot."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from rich.table import Table

from prism_lightning.common.markdown import table
from prism_lightning.common.plot_style import GOAL_LINE, PROTOTYPES, RANDOM_CONTROL, RIVALS, new_figure
from prism_lightning.inspection.cards import PrototypeCard
from prism_lightning.inspection.tracing import as_markdown, code
from prism_lightning.interventions.controllers.answers import Answers
from prism_lightning.interventions.controllers.fitting import Calibration, Gain, responsible
from prism_lightning.models import PrismForCausalLM

SHOWN = 3  # items of a prototype that a report quotes
COLOURS = {
    "controllers": PROTOTYPES,
    "temperature and bias": RIVALS[0],
    "logistic regression on z": RIVALS[1],
}


@dataclass
class Traced:
    """One changed prototype: theta, and the held-out items whose outcome hangs on it."""

    theta: float
    fixed: list[int]
    broken: list[int]


def traces(model: PrismForCausalLM, held_out: Answers, found: Calibration) -> dict[int, Traced]:
    """Every changed prototype, largest change first, with the items that it fixed and broke."""
    theta = found.controllers.theta
    largest = sorted(theta, key=lambda prototype: -abs(theta[prototype]))
    by_kind = [
        responsible(model, held_out, items, found.controllers.factors, largest) for items in (found.fixed, found.broken)
    ]
    return {i: Traced(theta[i], by_kind[0][i], by_kind[1][i]) for i in largest}


def _row(gain: Gain) -> list[str]:
    plain = gain.name == "as it is"
    low, high = gain.interval
    return [
        gain.name,
        f"{gain.items:,}",
        f"{gain.accuracy:.4f}",
        "" if plain else f"{gain.gain:+.4f}",
        "" if plain else f"{low:+.4f} to {high:+.4f}",
    ]


def rows(found: Calibration) -> list[list[str]]:
    """Task, way, items, accuracy, gain and its interval; permuted labels last."""
    found_rows = [[task, *_row(gain)] for task, gains in found.gains.items() for gain in gains]
    if found.permuted:
        mean, spread = np.mean(found.permuted), np.std(found.permuted, ddof=1) if len(found.permuted) > 1 else np.nan
        low, high = min(found.permuted), max(found.permuted)
        what = f"{len(found.permuted)} fits to permuted labels, mean ± deviation, range"
        found_rows.append(["all", what, "", "", f"{mean:+.4f} ± {spread:.4f}", f"{low:+.4f} to {high:+.4f}"])
    return found_rows


HEADERS = ("task", "", "items", "accuracy", "gain", "95 %")


def gain_table(found: Calibration) -> Table:
    """For a terminal."""
    changed = len(found.controllers.theta)
    shown = Table(*HEADERS, title=f"{changed} prototypes scaled, judged on other items", show_edge=False)
    for row in rows(found):
        shown.add_row(*row)
    return shown


def markdown(
    found: Calibration,
    calibration: Answers,
    held_out: Answers,
    traced: dict[int, Traced],
    cards: list[PrototypeCard],
    command: str,
    plot: str,
) -> str:
    """The whole report."""
    controllers = found.controllers
    kind, strength = controllers.penalty
    lines = [
        "# Controllers",
        "",
        f"`{command}`",
        "",
        f"- fitted to {calibration.items:,} items, judged on {held_out.items:,} others; gains are paired, item by item",
        f"- {len(controllers.theta):,} prototypes are scaled; penalty {kind} {strength:.2g}, chosen by five-fold"
        f" cross-validation; {controllers.step:g} of the fitted theta kept",
        "- rivals have the same items: a temperature and a bias for each place, and a logistic regression on the mean"
        " hidden state of an answer's tokens beside its log-likelihood",
        f"- {len(found.fixed)} items right only with controllers, {len(found.broken)} only without",
        "",
        table(HEADERS, rows(found)),
        "",
        f"![gains]({plot})",
        "",
        "## The largest changes",
        "",
    ]
    for card in cards:
        trace = traced[card.prototype]
        facts = [
            f"theta {trace.theta:+.3f}; without it {len(trace.fixed)} of the {len(found.fixed)} fixed items are wrong"
            f" again and {len(trace.broken)} of the {len(found.broken)} broken ones right"
        ]
        for name, items in (("fixed", trace.fixed), ("broke", trace.broken)):
            facts += [f"{name} {held_out.names[item]}: {_quoted(held_out, item)}" for item in items[:SHOWN]]
        lines.append(as_markdown(card, facts))
    return "\n".join(lines)


def _quoted(answers: Answers, item: int) -> str:
    right = next(i for i in np.flatnonzero(answers.item_A == item) if answers.right_A[i])
    return f"{code('…' + answers.questions[item][-80:])} {code(answers.texts[right][:80])}"


def details(
    found: Calibration, calibration: Answers, held_out: Answers, traced: dict[int, Traced], cards: list[PrototypeCard]
) -> dict[str, Any]:
    """Every number, as plain data."""
    return {
        "fitted_to": calibration.names,
        "judged_on": held_out.names,
        "controllers": asdict(found.controllers) | {"theta": {str(i): t for i, t in found.controllers.theta.items()}},
        "gains": {task: [asdict(gain) for gain in gains] for task, gains in found.gains.items()},
        "permuted": found.permuted,
        "fixed": [held_out.names[item] for item in found.fixed],
        "broken": [held_out.names[item] for item in found.broken],
        "traced": {str(prototype): asdict(trace) for prototype, trace in traced.items()},
        "cards": [card.as_dict() for card in cards],
    }


def figure(found: Calibration) -> Figure:
    """Gains with their intervals, task by task, and of fits to permuted labels."""
    drawn = new_figure(7, 2 + 0.9 * len(found.gains))
    axes = drawn.add_subplot()
    axes.axvline(0, color=GOAL_LINE, lw=1)
    for place, gains in enumerate(found.gains.values()):
        for offset, gain in enumerate(gains[1:]):
            half = 100 * (gain.interval[1] - gain.gain)
            axes.errorbar(
                100 * gain.gain,
                place + 0.2 * (offset - 1),
                xerr=half,
                fmt="o",
                color=COLOURS[gain.name],
                capsize=3,
                label=gain.name if place == 0 else None,
            )
    if found.permuted:
        axes.plot(
            100 * np.array(found.permuted),
            np.full(len(found.permuted), len(found.gains)),
            "|",
            color=RANDOM_CONTROL,
            label="fits to permuted labels",
        )
    names = [*found.gains, *(["permuted labels"] if found.permuted else [])]
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlabel("gain in accuracy on held-out items, points")
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return drawn
