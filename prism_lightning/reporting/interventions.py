"""Suppression and controllers, from what `suppress` and `calibrate` left in the run directories."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from prism_lightning.common.files import read_json
from prism_lightning.common.manifests import (
    Kind,
    listed,
    mapping,
    mapping_of,
    number,
    optional,
    pair,
    problem_in,
    text,
    whole,
)
from prism_lightning.evaluation.results import normal_interval
from prism_lightning.interventions.intervention import FORMAT
from prism_lightning.reporting.runs import Run
from prism_lightning.reporting.tables import Table
from prism_lightning.run.directory import RunPaths

COMMANDS = {
    "suppress": "python -m prism_lightning suppress --ckpt_path {} --words WORDS --name NAME",
    "calibrate": "python -m prism_lightning calibrate --ckpt_path {} --suite evals/continuation.yaml --name NAME",
}
Found = list[tuple[Run, str, dict[str, Any]]]  # a run, the intervention's name, its details

MEASURED = mapping(
    {
        "name": text(),
        "prototypes": whole(),
        "counts": mapping({"rate": number(), "interval": pair()}),
        "fall": number(),
        "rise": optional(number()),  # perplexity may overflow
        "fall_interval": optional(pair()),
        "rise_interval": optional(pair()),
    }
)
GAIN = mapping({"accuracy": number(), "gain": number(), "error": optional(number()), "items": whole()})
DETAILS: dict[str, dict[str, Kind]] = {
    "suppress": {
        "behaviour": text(),
        "plan": mapping({"goal": mapping({"fall": number(), "rise": number()})}),
        "plain": MEASURED,
        "biased": MEASURED,
        "draws": listed(MEASURED),
        "attempts": listed(mapping({"fresh": MEASURED})),
        "kept": whole(),
    },
    "calibrate": {
        "gains": mapping_of(listed(GAIN)),
        "permuted": listed(number()),
        "controllers": mapping({"theta": mapping({})}),
    },
}


def read_interventions(runs: list[Run]) -> tuple[dict[str, Found], list[str]]:
    """What interventions did, by verb, and a line for each file that is damaged; other versions' are passed over."""
    found: dict[str, Found] = {verb: [] for verb in COMMANDS}
    damaged = []
    for run in runs:
        for path in sorted(RunPaths(run.path).interventions.glob("*.details.json")):
            details = read_json(path) or {}
            if details and details.get("format") != FORMAT:
                continue
            problem = _problem(details)
            if problem:
                damaged.append(f"{path} is damaged ({problem}): make the intervention anew")
            else:
                found[details["verb"]].append((run, path.name.removesuffix(".details.json"), details))
    return found, damaged


def _problem(details: dict[str, Any]) -> str | None:
    """What is wrong with an intervention's details; None where a report can show them."""
    verb = details.get("verb")
    if not details or not isinstance(verb, str) or verb not in DETAILS:
        return "it holds no details of suppress or calibrate"
    problem = problem_in(details, DETAILS[verb])
    if problem is None and verb == "suppress" and details["kept"] >= len(details["attempts"]):
        return "it keeps an attempt that it does not have"
    if problem is None and verb == "calibrate" and any(len(gains) < 4 for gains in details["gains"].values()):
        return "a task of it lacks gains"
    return problem


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
                "run",
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
                "run",
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


def _percent(value: float | None, interval: Sequence[float] | None = None, sign: str = "") -> str:
    if value is None:  # it could not be computed
        return ""
    shown = f"{100 * value:{sign}.1f}"
    return shown + (f" ({100 * interval[0]:{sign}.1f} to {100 * interval[1]:{sign}.1f})" if interval else "")


def _gain(gain: dict[str, Any]) -> str:
    error = gain.get("error")  # one item has none
    return _percent(gain["gain"], None if error is None else normal_interval(gain["gain"], error), "+")


def _suppressed(run: Run, name: str, details: dict[str, Any]) -> list[str]:
    plain, biased, draws = details["plain"], details["biased"], details["draws"]
    ours = details["attempts"][details["kept"]]["fresh"]
    return [
        str(run.path),
        name,
        details["behaviour"],
        f"{ours['prototypes']} {ours['name']}",
        _percent(plain["counts"]["rate"], plain["counts"]["interval"]),
        _percent(ours["counts"]["rate"], ours["counts"]["interval"]),
        _percent(ours["fall"], ours.get("fall_interval")),
        _percent(ours.get("rise"), ours.get("rise_interval"), "+"),
        _percent(biased["fall"], biased.get("fall_interval")),
        _percent(biased.get("rise"), biased.get("rise_interval"), "+"),
        _percent(fmean(draw["fall"] for draw in draws), sign="+") if draws else "",
    ]


def _controlled(run: Run, name: str, details: dict[str, Any]) -> list[list[str]]:
    rows = []
    for task, gains in details["gains"].items():
        plain, *others = gains
        cells = [_gain(one) for one in others]
        permuted = details["permuted"] if task == list(details["gains"])[-1] else []
        rows.append(
            [
                str(run.path),
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
    return f"{_gain(best)} on {task}; the largest of {len(gains)}"


def _risen(measured: dict[str, Any]) -> float:
    rise = measured.get("rise")
    return math.inf if rise is None else rise


def met_goals(found: dict[str, Found]) -> str | None:
    """How many behaviours fell as far as was asked, at no more than that cost."""
    if not found["suppress"]:
        return None
    goals = [(d["plan"]["goal"], d["attempts"][d["kept"]]["fresh"]) for _, _, d in found["suppress"]]
    met = sum(ours["fall"] >= goal["fall"] and _risen(ours) <= goal["rise"] for goal, ours in goals)
    goal = goals[0][0]
    return (
        f"{met} of {len(goals)} behaviours fell by {100 * goal['fall']:.0f} % or more with at most"
        f" {100 * goal['rise']:.0f} % more perplexity elsewhere"
    )
