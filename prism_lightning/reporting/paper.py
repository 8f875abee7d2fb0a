"""Compare the paper's figures with measurements of the runs. paper.yaml holds the former with their source."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from prism_lightning.evaluation.results import average
from prism_lightning.reporting.attribution_tables import COMMAND, format_speed_ups
from prism_lightning.reporting.intervention_tables import InterventionResult, format_best_gain, format_met_goals
from prism_lightning.reporting.runs import Run, twin_pairs
from prism_lightning.reporting.tables import (
    Suites,
    Table,
    accuracy_tasks,
    format_points,
    paired_difference,
    speed_ratio,
)

REPORTED = Path(__file__).with_name("paper.yaml")


def paper_table(
    runs: list[Run],
    suites: Suites,
    benchmarks: list[dict[str, Any]],
    interventions: dict[str, list[InterventionResult]],
) -> Table:
    """Return a table with one row for each figure that the paper reports."""
    facts = yaml.safe_load(REPORTED.read_text())
    measurements: dict[str, Callable[[], str | None]] = {
        "downstream": lambda: _downstream(runs, suites),
        "throughput": lambda: _throughput(runs),
        "attribution": lambda: format_speed_ups(benchmarks),
        "controllers": lambda: format_best_gain(interventions),
        "suppression": lambda: format_met_goals(interventions),
    }
    command_by_key = {"attribution": COMMAND.format("quickstart")}
    rows, missing = [], []
    for figure in facts["reported"]:
        measured = measurements[figure["key"]]()
        rows.append([figure["quantity"], figure["reported"], measured or "not measured"])
        if not measured and figure["key"] in command_by_key:
            missing.append(command_by_key[figure["key"]])
    note = (
        f"The paper's figures are from {facts['source']}. Ours are of the largest models in this report. The paper used"
        " other data and machines."
    )
    return Table("Comparison with the paper", ["quantity", "paper", "measured here"], rows, note, missing)


def _largest_pairs(runs: list[Run]) -> list[tuple[Run, Run]]:
    """Return the twin pairs of the largest model, one for each seed."""
    pairs = twin_pairs(runs).values()
    return max(pairs, key=lambda seeds: (seeds[0][0].parameters, seeds[0][0].tokens), default=[])


def _downstream(runs: list[Run], suites: Suites) -> str | None:
    """Return the average difference in accuracy over the tasks that both of the largest twins were evaluated on."""
    pairs = _largest_pairs(runs)
    if not pairs:
        return None
    differences = [paired_difference(pairs, name, task.metric) for name, task in accuracy_tasks(suites).items()]
    measured = [difference for difference in differences if difference is not None]
    if not measured:
        return None
    tasks = ", ".join(difference.task for difference in measured)
    return f"{format_points(average(measured))} at {pairs[0][0].size} on {tasks}"


def _throughput(runs: list[Run]) -> str | None:
    pairs = _largest_pairs(runs)
    ratios = [ratio for pair in pairs if (ratio := speed_ratio(pair)) is not None]
    return f"{100 * np.mean(ratios):.1f} % at {pairs[0][0].size}" if ratios else None
