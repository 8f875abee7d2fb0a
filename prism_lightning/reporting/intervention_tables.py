"""Tables of suppression and controllers, from the files that `suppress` and `calibrate` leave in run directories."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from statistics import fmean
from typing import Any, NamedTuple

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
from prism_lightning.common.statistics import normal_interval
from prism_lightning.interventions.intervention import FORMAT
from prism_lightning.reporting.runs import Run
from prism_lightning.reporting.tables import Table
from prism_lightning.run.directory import RunPaths

COMMANDS = {
    "suppress": "python -m prism_lightning suppress --ckpt_path {} --words WORDS --name NAME",
    "calibrate": "python -m prism_lightning calibrate --ckpt_path {} --suite evals/continuation.yaml --name NAME",
}
SUPPRESSION_COLUMNS = [
    "run",
    "name",
    "behaviour",
    "prototypes",
    "rate, unchanged",
    "rate, suppressed",
    "fall",
    "perplexity rise",
    "fall, word bias",
    "perplexity rise, word bias",
    "fall, random prototypes",
]
CONTROLLER_COLUMNS = [
    "run",
    "name",
    "task",
    "items",
    "prototypes",
    "unchanged",
    "controllers",
    "temperature and bias",
    "logistic regression on z",
    "permuted labels",
]

# Types of the entries of details files; problem_in checks them.
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


class InterventionResult(NamedTuple):
    """One intervention of a run, with the content of its details file."""

    run: Run
    name: str
    details: dict[str, Any]


def read_interventions(runs: list[Run]) -> tuple[dict[str, list[InterventionResult]], list[str]]:
    """Return the interventions of runs by verb, and a message for each damaged file.

    Files of another format version are skipped without a message.
    """
    interventions: dict[str, list[InterventionResult]] = {verb: [] for verb in COMMANDS}
    damaged = []
    for run in runs:
        for path in sorted(RunPaths(run.path).interventions.glob("*.details.json")):
            details = read_json(path) or {}
            if details and details.get("format") != FORMAT:
                continue
            problem = _problem(details)
            if problem:
                damaged.append(f"{path} is damaged ({problem}): create the intervention again")
            else:
                name = path.name.removesuffix(".details.json")
                interventions[details["verb"]].append(InterventionResult(run, name, details))
    return interventions, damaged


def _problem(details: dict[str, Any]) -> str | None:
    """Return what is wrong with an intervention's details; None if a report can show them."""
    verb = details.get("verb")
    if not details or not isinstance(verb, str) or verb not in DETAILS:
        return "it holds no details of suppress or calibrate"
    problem = problem_in(details, DETAILS[verb])
    if problem is None and verb == "suppress" and details["kept"] >= len(details["attempts"]):
        return "the attempt that it keeps does not exist"
    if problem is None and verb == "calibrate" and any(len(gains) < 4 for gains in details["gains"].values()):
        return "a task has fewer than four gains"
    return problem


def intervention_tables(runs: list[Run], interventions: dict[str, list[InterventionResult]]) -> list[Table]:
    """Return the tables of suppression and of controllers; none if no run has prototypes."""
    prism_runs = [run for run in runs if run.prototypes]
    if not prism_runs:
        return []
    largest = max(prism_runs, key=lambda run: (run.parameters, run.tokens))
    missing = {
        verb: [] if interventions[verb] else [command.format(shlex.quote(str(largest.path)))]
        for verb, command in COMMANDS.items()
    }
    suppression_note = (
        "In percent with 95 % intervals, on prompts that were not used for any choice. Rate: share of continuations"
        " that show the behaviour. Fall: relative decrease of the rate. Perplexity rise: on texts without the"
        " behaviour. Word bias: a bias on the behaviour's words instead of prototypes. Random prototypes: mean over"
        " random choices of equally used prototypes."
    )
    controller_note = (
        "Accuracy in percent on items that were not used for fitting (unchanged model), and paired gains in points with"
        " 95 % intervals (other columns). Permuted labels: mean gain and range."
    )
    return [
        Table(
            "Suppression of behaviours",
            SUPPRESSION_COLUMNS,
            [_suppression_row(result) for result in interventions["suppress"]],
            suppression_note,
            missing["suppress"],
        ),
        Table(
            "Multiple-choice accuracy with controllers",
            CONTROLLER_COLUMNS,
            [row for result in interventions["calibrate"] for row in _controller_rows(result)],
            controller_note,
            missing["calibrate"],
        ),
    ]


def _percent(value: float | None, interval: Sequence[float] | None = None, sign: str = "") -> str:
    if value is None:  # it could not be computed
        return ""
    cell = f"{100 * value:{sign}.1f}"
    return cell + (f" ({100 * interval[0]:{sign}.1f} to {100 * interval[1]:{sign}.1f})" if interval else "")


def _gain(gain: dict[str, Any]) -> str:
    error = gain.get("error")  # None if there is only one item
    return _percent(gain["gain"], None if error is None else normal_interval(gain["gain"], error), "+")


def _suppression_row(result: InterventionResult) -> list[str]:
    details = result.details
    plain, biased, draws = details["plain"], details["biased"], details["draws"]
    suppressed = details["attempts"][details["kept"]]["fresh"]
    return [
        str(result.run.path),
        result.name,
        details["behaviour"],
        f"{suppressed['prototypes']} {suppressed['name']}",
        _percent(plain["counts"]["rate"], plain["counts"]["interval"]),
        _percent(suppressed["counts"]["rate"], suppressed["counts"]["interval"]),
        _percent(suppressed["fall"], suppressed.get("fall_interval")),
        _percent(suppressed.get("rise"), suppressed.get("rise_interval"), "+"),
        _percent(biased["fall"], biased.get("fall_interval")),
        _percent(biased.get("rise"), biased.get("rise_interval"), "+"),
        _percent(fmean(draw["fall"] for draw in draws), sign="+") if draws else "",
    ]


def _controller_rows(result: InterventionResult) -> list[list[str]]:
    details = result.details
    permuted = ""
    if details["permuted"]:
        lowest, mean, highest = (_percent(statistic(details["permuted"]), sign="+") for statistic in (min, fmean, max))
        permuted = f"{mean} ({lowest} to {highest})"
    rows = []
    for task, (plain, *others) in details["gains"].items():
        rows.append(
            [
                str(result.run.path),
                result.name,
                task,
                f"{plain['items']:,}",
                str(len(details["controllers"]["theta"])),
                _percent(plain["accuracy"]),
                *(_gain(gain) for gain in others),
                permuted if task == list(details["gains"])[-1] else "",  # labels of all tasks are permuted together
            ]
        )
    return rows


def format_best_gain(interventions: dict[str, list[InterventionResult]]) -> str | None:
    """Return the largest gain of controllers over all runs and tasks, and how many there are."""
    gains = [
        (gains[1], task) for result in interventions["calibrate"] for task, gains in result.details["gains"].items()
    ]
    if not gains:
        return None
    best, task = max(gains, key=lambda pair: pair[0]["gain"])
    return f"{_gain(best)} on {task}; the largest of {len(gains)}"


def _perplexity_rise(measured: dict[str, Any]) -> float:
    rise = measured.get("rise")
    return math.inf if rise is None else rise


def format_met_goals(interventions: dict[str, list[InterventionResult]]) -> str | None:
    """Return how many behaviours fell as far as their goal, at no more than the goal's rise of perplexity."""
    details = [result.details for result in interventions["suppress"]]
    if not details:
        return None
    outcomes = [(entry["plan"]["goal"], entry["attempts"][entry["kept"]]["fresh"]) for entry in details]
    met = sum(fresh["fall"] >= goal["fall"] and _perplexity_rise(fresh) <= goal["rise"] for goal, fresh in outcomes)
    goal = outcomes[0][0]
    return (
        f"{met} of {len(outcomes)} behaviours fell by {100 * goal['fall']:.0f} % or more, while perplexity on other"
        f" texts rose by at most {100 * goal['rise']:.0f} %"
    )
