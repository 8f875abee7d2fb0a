"""Suppression and controllers, from what `suppress` and `calibrate` left in the run directories."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from prism_lightning.common.files import read_json
from prism_lightning.evaluation.results import normal_interval
from prism_lightning.interventions.intervention import FORMAT
from prism_lightning.reporting.runs import Run
from prism_lightning.reporting.tables import Table

COMMANDS = {
    "suppress": "python -m prism_lightning suppress --ckpt_path {} --words WORDS --name NAME",
    "calibrate": "python -m prism_lightning calibrate --ckpt_path {} --suite evals/continuation.yaml --name NAME",
}
Found = list[tuple[Run, str, dict[str, Any]]]  # a run, the intervention's name, its details


def read_interventions(runs: list[Run]) -> dict[str, Found]:
    """By verb; files that are damaged or of another version are passed over, as if they had not been made."""
    found: dict[str, Found] = {verb: [] for verb in COMMANDS}
    for run in runs:
        for path in sorted((run.path / "interventions").glob("*.details.json")):
            details = read_json(path)
            if details is not None and details.get("format") == FORMAT and details.get("verb") in found:
                found[details["verb"]].append((run, path.name.removesuffix(".details.json"), details))
    return found


def intervention_tables(runs: list[Run], found: dict[str, Found]) -> list[Table]:
    """One of suppressed behaviours, one of controllers; where there are prototypes at all."""
    prism = [run for run in runs if run.prototypes]
    if not prism:
        return []
    largest = max(prism, key=lambda run: (run.parameters, run.tokens))
    missing = {
        verb: [] if found[verb] else [command.format(shlex.quote(str(largest.path)))]
        for verb, command in COMMANDS.items()
    }
    suppressed = [_suppressed(run, name, details) for run, name, details in found["suppress"]]
    controlled = [row for run, name, details in found["calibrate"] for row in _controlled(run, name, details)]
    return [
        Table(
            "Suppression",
            [
                "model",
                "name",
                "behaviour",
                "prototypes",
                "rate",
                "suppressed",
                "falls by",
                "perplexity elsewhere",
                "biased words fall by",
                "perplexity elsewhere",
                "random prototypes fall by",
            ],
            suppressed,
            "On fresh prompts, in percent, with 95 % intervals. Perplexity elsewhere: its rise on texts without the"
            " behaviour. Random: mean over draws of equal usage.",
            missing["suppress"],
        ),
        Table(
            "Controllers",
            [
                "model",
                "name",
                "task",
                "items",
                "prototypes",
                "as it is",
                "controllers",
                "temperature and bias",
                "logistic regression on z",
                "permuted labels",
            ],
            controlled,
            "Accuracy on items that nothing was fitted to, in percent, and paired gains in points with 95 % intervals.",
            missing["calibrate"],
        ),
    ]


def _percent(value: float, interval: Sequence[float] | None = None, sign: str = "") -> str:
    shown = f"{100 * value:{sign}.1f}"
    return shown + (f" ({100 * interval[0]:{sign}.1f} to {100 * interval[1]:{sign}.1f})" if interval else "")


def _suppressed(run: Run, name: str, details: dict[str, Any]) -> list[str]:
    plain, biased, draws = details["plain"], details["biased"], details["draws"]
    ours = details["attempts"][details["kept"]]["fresh"]
    return [
        run.size,
        name,
        details["behaviour"],
        f"{ours['prototypes']} {ours['name']}",
        _percent(plain["counts"]["rate"], plain["counts"]["interval"]),
        _percent(ours["counts"]["rate"], ours["counts"]["interval"]),
        _percent(ours["fall"], ours["fall_interval"]),
        _percent(ours["rise"], ours["rise_interval"], "+"),
        _percent(biased["fall"], biased["fall_interval"]),
        _percent(biased["rise"], biased["rise_interval"], "+"),
        _percent(fmean(draw["fall"] for draw in draws), sign="+") if draws else "",
    ]


def _controlled(run: Run, name: str, details: dict[str, Any]) -> list[list[str]]:
    rows = []
    for task, gains in details["gains"].items():
        plain, *others = gains
        cells = [_percent(one["gain"], normal_interval(one["gain"], one["error"]), "+") for one in others]
        permuted = details["permuted"] if task == list(details["gains"])[-1] else []
        rows.append(
            [
                run.size,
                name,
                task,
                f"{plain['items']:,}",
                str(len(details["controllers"]["theta"])),
                _percent(plain["accuracy"]),
                *cells,
                f"{_percent(fmean(permuted), sign='+')} ({_percent(min(permuted), sign='+')} to"
                f" {_percent(max(permuted), sign='+')})"
                if permuted
                else "",
            ]
        )
    return rows


def best_gain(found: dict[str, Found]) -> str | None:
    """Of controllers, over all runs and tasks that were tried."""
    gains = [
        (g, task) for _, _, d in found["calibrate"] for task, all_gains in d["gains"].items() for g in all_gains[1:2]
    ]
    if not gains:
        return None
    best, task = max(gains, key=lambda pair: pair[0]["gain"])
    shown = _percent(best["gain"], normal_interval(best["gain"], best["error"]), "+")
    return f"{shown} on {task}; the largest of {len(gains)}"


def met_goals(found: dict[str, Found]) -> str | None:
    """How many behaviours fell as far as was asked, at no more than that cost."""
    if not found["suppress"]:
        return None
    goals = [(d["plan"]["goal"], d["attempts"][d["kept"]]["fresh"]) for _, _, d in found["suppress"]]
    met = sum(ours["fall"] >= goal["fall"] and ours["rise"] <= goal["rise"] for goal, ours in goals)
    goal = goals[0][0]
    return (
        f"{met} of {len(goals)} behaviours fell by {100 * goal['fall']:.0f} % or more with at most"
        f" {100 * goal['rise']:.0f} % more perplexity elsewhere"
    )
