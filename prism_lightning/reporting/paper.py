"""What the paper reports beside what the runs found. Reported figures stand in paper.yaml with their source."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from prism_lightning.evaluation.results import average
from prism_lightning.reporting.attribution import COMMAND, speed_up
from prism_lightning.reporting.interventions import Found, best_gain, met_goals
from prism_lightning.reporting.runs import Run, twins
from prism_lightning.reporting.tables import Suites, Table, accuracies, difference, points, speed_ratio

REPORTED = Path(__file__).with_name("paper.yaml")


def paper_table(
    runs: list[Run], suites: Suites, benchmarks: list[dict[str, Any]], interventions: dict[str, Found]
) -> Table:
    """One row for each figure that the paper reports."""
    facts = yaml.safe_load(REPORTED.read_text())
    ours: dict[str, Callable[[], str | None]] = {
        "downstream": lambda: _downstream(runs, suites),
        "throughput": lambda: _throughput(runs),
        "attribution": lambda: speed_up(benchmarks),
        "controllers": lambda: best_gain(interventions),
        "suppression": lambda: met_goals(interventions),
    }
    missing = {"attribution": COMMAND.format("quickstart")}
    rows, commands = [], []
    for one in facts["reported"]:
        found = ours[one["key"]]()
        rows.append([one["what"], one["reported"], found or "not measured"])
        if not found and one["key"] in missing:
            commands.append(missing[one["key"]])
    note = f"Reported: {facts['source']}. Ours: the largest models here, on other data and machines than the paper's."
    return Table("Beside the paper", ["what", "reported", "measured here"], rows, note, commands)


def _largest(runs: list[Run]) -> list[tuple[Run, Run]]:
    pairs = twins(runs)
    return max(pairs.values(), key=lambda found: (found[0][0].parameters, found[0][0].tokens), default=[])


def _downstream(runs: list[Run], suites: Suites) -> str | None:
    """Average over the accuracies of the suites that the largest twins were both evaluated on."""
    pairs = _largest(runs)
    tasks = accuracies(suites)
    found = [d for name, task in tasks.items() if pairs and (d := difference(pairs, name, task.metric)) is not None]
    if not found:
        return None
    return f"{points(average(found))} at {pairs[0][0].size} on {', '.join(one.task for one in found)}"


def _throughput(runs: list[Run]) -> str | None:
    pairs = _largest(runs)
    ratios = [ratio for pair in pairs if (ratio := speed_ratio(pair)) is not None]
    return f"{100 * np.mean(ratios):.1f} % at {pairs[0][0].size}" if ratios else None
