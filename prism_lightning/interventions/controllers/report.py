"""What `calibrate` shows: a table in the terminal, a Markdown report with cards of the prototypes, and a plot."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from rich.table import Table

from prism_lightning.common.markdown import table
from prism_lightning.common.plot_style import GOAL_LINE, PROTOTYPES, RANDOM_CONTROL, RIVALS, new_figure
from prism_lightning.inspection.cards import PrototypeCard
from prism_lightning.inspection.tracing import as_markdown, code
from prism_lightning.interventions.controllers.answers import Answers
from prism_lightning.interventions.controllers.fitting import PLAIN_NAME, Calibration, Gain, responsible_items
from prism_lightning.interventions.intervention import Intervention
from prism_lightning.interventions.report_files import write_report
from prism_lightning.models import PrismForCausalLM
from prism_lightning.models.steering import Scaling
from prism_lightning.run.fingerprints import model_fingerprint

QUOTED_ITEMS = 3  # items of a prototype that a report quotes
HEADERS = ("task", "method", "items", "accuracy", "gain", "95 % interval")
COLOURS = {
    "controllers": PROTOTYPES,
    "temperature and bias": RIVALS[0],
    "logistic regression on z": RIVALS[1],
}


@dataclass
class Trace:
    """A changed prototype, and the judged items whose outcome depends on it.

    Attributes:
        theta: Change of its factor.
        fixed: Items that are right with the controllers, and wrong again without this one.
        broken: Items that are wrong with the controllers, and right again without this one.
    """

    theta: float
    fixed: list[int]
    broken: list[int]


def trace_changes(model: PrismForCausalLM, result: Calibration) -> dict[int, Trace]:
    """Return every changed prototype, largest change first, with the items that it fixed and broke."""
    theta, factors = result.controllers.theta, result.controllers.factors
    prototypes = sorted(theta, key=lambda prototype: -abs(theta[prototype]))
    fixed = responsible_items(model, result.judged_items, result.fixed, factors, prototypes)
    broken = responsible_items(model, result.judged_items, result.broken, factors, prototypes)
    return {i: Trace(theta[i], fixed[i], broken[i]) for i in prototypes}


def write_controllers(
    path: Path,
    model: PrismForCausalLM,
    result: Calibration,
    traces: dict[int, Trace],
    cards: list[PrototypeCard],
    cards_in_report: int,
    tasks: list[str],
    command: str,
) -> None:
    """Write controllers as an intervention and, beside it, the report, the plot and all numbers.

    Args:
        path: File of the intervention.
        model: The model that the controllers were fitted for.
        result: Result of `calibrate`.
        traces: Result of `trace_changes`.
        cards: Cards of the changed prototypes, largest change first.
        cards_in_report: Number of cards in the report; the numbers have all of them.
        tasks: Names of the tasks.
        command: The command line, for the record.
    """
    penalty = list(result.controllers.penalty)
    origin = {"verb": "calibrate", "tasks": tasks, "command": command, "penalty": penalty}
    Intervention(model_fingerprint(model), Scaling(result.controllers.factors), origin).write(path)
    report = markdown(result, traces, cards[:cards_in_report], command, f"{path.stem}.png")
    write_report(path, details(result, traces, cards) | {"verb": "calibrate"}, report, figure(result))


def gain_rows(result: Calibration) -> list[list[str]]:
    """Return rows of task, method, items, accuracy, gain and its interval; permuted labels come last."""
    rows = [[task, *_gain_row(gain)] for task, gains in result.gains.items() for gain in gains]
    if result.permuted:
        gains = result.permuted
        deviation = np.std(gains, ddof=1) if len(gains) > 1 else np.nan
        method = f"{len(gains)} fits to permuted labels: mean ± standard deviation, and range"
        mean = f"{np.mean(gains):+.4f} ± {deviation:.4f}"
        rows.append(["all", method, "", "", mean, f"{min(gains):+.4f} to {max(gains):+.4f}"])
    return rows


def _gain_row(gain: Gain) -> list[str]:
    low, high = gain.interval
    paired = ["", ""] if gain.name == PLAIN_NAME else [f"{gain.gain:+.4f}", f"{low:+.4f} to {high:+.4f}"]
    return [gain.name, f"{gain.items:,}", f"{gain.accuracy:.4f}", *paired]


def gain_table(result: Calibration) -> Table:
    """Return the gains for a terminal."""
    changed = len(result.controllers.theta)
    gains = Table(*HEADERS, title=f"Controllers: {changed} prototypes scaled, judged on other items", show_edge=False)
    for row in gain_rows(result):
        gains.add_row(*row)
    return gains


def markdown(result: Calibration, traces: dict[int, Trace], cards: list[PrototypeCard], command: str, plot: str) -> str:
    """Return the whole report.

    Args:
        result: Result of `calibrate`.
        traces: Result of `trace_changes`.
        cards: Cards of the prototypes with the largest changes.
        command: The command line.
        plot: File name of the plot.
    """
    controllers = result.controllers
    kind, strength = controllers.penalty
    lines = [
        "# Controllers",
        "",
        f"`{command}`",
        "",
        f"- The controllers are fitted to {result.fit_items.items:,} items, judged on {result.judged_items.items:,}"
        " others. Gains are paired, item by item.",
        f"- {len(controllers.theta):,} prototypes are scaled. The penalty {kind} {strength:.2g} was chosen by five-fold"
        f" cross-validation. The share of the fitted theta that was kept is {controllers.step:g}.",
        "- The rivals are fitted to the same items: a temperature with a bias for each place of an answer, and a"
        " logistic regression on the mean hidden state of an answer's tokens together with its log-likelihood.",
        f"- {len(result.fixed)} items are right only with controllers, {len(result.broken)} only without them.",
        "",
        table(HEADERS, gain_rows(result)),
        "",
        f"![gains]({plot})",
        "",
        "## Largest changes",
        "",
    ]
    lines += [as_markdown(card, _trace_facts(result, traces[card.prototype])) for card in cards]
    return "\n".join(lines)


def _trace_facts(result: Calibration, trace: Trace) -> list[str]:
    facts = [
        f"theta {trace.theta:+.3f}; without this controller, {len(trace.fixed)} of the {len(result.fixed)} fixed items"
        f" are wrong again and {len(trace.broken)} of the {len(result.broken)} broken items are right again"
    ]
    for outcome, items in (("fixed", trace.fixed), ("broke", trace.broken)):
        for item in items[:QUOTED_ITEMS]:
            facts.append(f"{outcome} {result.judged_items.names[item]}: {_quoted(result.judged_items, item)}")
    return facts


def _quoted(answers: Answers, item: int) -> str:
    right = next(i for i in np.flatnonzero(answers.item_A == item) if answers.right_A[i])
    return f"{code('…' + answers.questions[item][-80:])} {code(answers.texts[right][:80])}"


def details(result: Calibration, traces: dict[int, Trace], cards: list[PrototypeCard]) -> dict[str, Any]:
    """Return every number as plain data for JSON, with the keys of the file format."""
    names, theta = result.judged_items.names, result.controllers.theta
    return {
        "fitted_to": result.fit_items.names,
        "judged_on": names,
        "controllers": asdict(result.controllers) | {"theta": {str(i): value for i, value in theta.items()}},
        "gains": {task: [asdict(gain) for gain in gains] for task, gains in result.gains.items()},
        "permuted": result.permuted,
        "fixed": [names[item] for item in result.fixed],
        "broken": [names[item] for item in result.broken],
        "traced": {str(prototype): asdict(trace) for prototype, trace in traces.items()},
        "cards": [card.as_dict() for card in cards],
    }


def figure(result: Calibration) -> Figure:
    """Return a plot of gains with their intervals, task by task, and of fits to permuted labels."""
    plot = new_figure(7, 2 + 0.9 * len(result.gains))
    axes = plot.add_subplot()
    axes.axvline(0, color=GOAL_LINE, lw=1)
    for row, gains in enumerate(result.gains.values()):
        for offset, gain in enumerate(gains[1:]):
            axes.errorbar(
                100 * gain.gain,
                row + 0.2 * (offset - 1),
                xerr=100 * (gain.interval[1] - gain.gain),
                fmt="o",
                color=COLOURS[gain.name],
                capsize=3,
                label=gain.name if row == 0 else None,
            )
    names = [*result.gains]
    if result.permuted:
        rows = np.full(len(result.permuted), len(names))
        label = "fits to permuted labels"
        axes.plot(100 * np.array(result.permuted), rows, "|", color=RANDOM_CONTROL, label=label)
        names.append("permuted labels")
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlabel("gain in accuracy on judged items, percentage points")
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return plot
