"""Tables of suppression and controllers from details files with known numbers."""

import json

import pytest
from support.report_runs import make_run
from support.runs import ROOT

from prism_lightning.interventions.intervention import FORMAT
from prism_lightning.reporting.intervention_tables import (
    format_best_gain,
    format_met_goals,
    intervention_tables,
    read_interventions,
)
from prism_lightning.reporting.runs import find_runs


def measured(rate, fall, rise, prototypes=0):
    counts = {"rate": rate, "interval": [rate - 0.01, rate + 0.01]}
    facts = {"fall": fall, "fall_interval": [fall - 0.02, fall], "rise": rise, "rise_interval": [rise, rise + 0.001]}
    return facts | {"counts": counts, "prototypes": prototypes, "name": "removed"}


def write(run, name, details):
    (run / "interventions").mkdir(exist_ok=True)
    (run / "interventions" / f"{name}.details.json").write_text(json.dumps({"format": FORMAT} | details))


def suppressed(fall, rise):
    facts = {"plain": measured(0.5, 0, 0), "biased": measured(0.02, 0.96, 0.0)}
    facts |= {"draws": [measured(0.49, 0.02, 0.004, 7), measured(0.51, -0.04, 0.004, 7)], "kept": 1}
    facts |= {"attempts": [{"fresh": measured(0.5, 0, 0, 1)}, {"fresh": measured(0.5 * (1 - fall), fall, rise, 7)}]}
    return facts | {"verb": "suppress", "behaviour": "sad", "plan": {"goal": {"fall": 0.8, "rise": 0.02}}}


def test_rows_hold_the_numbers_of_the_files(tmp_path):
    run = make_run(tmp_path, "prism", "PrismLM")
    write(run, "calm", suppressed(0.9, 0.01))
    write(run, "costly", suppressed(0.9, 0.05))
    gains = [
        {"name": n, "accuracy": a, "gain": g, "error": 0.01, "items": 300}
        for n, a, g in (("as it is", 0.4, 0), ("c", 0.45, 0.05), ("t", 0.4, 0), ("z", 0.42, 0.02))
    ]
    write(
        run,
        "steered",
        {
            "verb": "calibrate",
            "gains": {"piqa": gains},
            "permuted": [-0.01, 0.02],
            "controllers": {"theta": {"3": 0.5}},
        },
    )
    (run / "interventions" / "broken.details.json").write_text("{")
    write(run, "of_another_version", {"format": FORMAT + 1, "verb": "suppress"})
    runs, _ = find_runs([tmp_path])
    interventions, damaged = read_interventions(runs)
    assert len(damaged) == 1 and "broken.details.json is damaged" in damaged[0]
    suppression, controllers = intervention_tables(runs, interventions)
    assert [row[:2] for row in suppression.rows] == [
        [str(run), "calm"],
        [str(run), "costly"],
    ] and not suppression.missing
    assert suppression.rows[0][3:8] == [
        "7 removed",
        "50.0 (49.0 to 51.0)",
        "5.0 (4.0 to 6.0)",
        "90.0 (88.0 to 90.0)",
        "+1.0 (+1.0 to +1.1)",
    ]
    assert suppression.rows[0][-1] == "-1.0"
    assert controllers.rows[0][3:] == [
        "300",
        "1",
        "40.0",
        "+5.0 (+3.0 to +7.0)",
        "+0.0 (-2.0 to +2.0)",
        "+2.0 (+0.0 to +4.0)",
        "+0.5 (-1.0 to +2.0)",
    ]
    assert format_met_goals(interventions).startswith(
        "1 of 2 behaviours fell by 80 % or more, while perplexity on other texts rose by at most 2 %"
    )
    assert format_best_gain(interventions) == "+5.0 (+3.0 to +7.0) on piqa; the largest of 1"


def _without(key, details):
    return {name: value for name, value in details.items() if name != key}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: _without("plain", d), "plain is missing"),
        (lambda d: d | {"kept": 2}, "the attempt that it keeps does not exist"),
        (lambda d: d | {"kept": -1}, "kept is -1"),
        (lambda d: d | {"draws": 3}, "draws is 3, expected a list"),
        (lambda d: d | {"draws": [{"fall": "x"}]}, "draws[0].name is missing"),
        (lambda d: d | {"behaviour": ["sad"]}, "behaviour is ['sad']"),
        (lambda d: d | {"biased": d["biased"] | {"fall": float("nan")}}, "biased.fall is nan"),
        (lambda d: d | {"plan": {"goal": {"fall": "0.8", "rise": 0.02}}}, "plan.goal.fall is '0.8'"),
        (lambda d: d | {"verb": ["suppress"]}, "no details of suppress or calibrate"),
        (
            lambda d: {"verb": "calibrate", "gains": {"t": [{}]}, "permuted": [], "controllers": {"theta": {}}},
            "gains.t",
        ),
        (
            lambda d: {"verb": "calibrate", "gains": {"t": []}, "permuted": [], "controllers": {"theta": {}}},
            "has fewer than four gains",
        ),
        (lambda d: {"verb": "calibrate", "gains": {}, "permuted": 1, "controllers": {"theta": {}}}, "permuted is 1"),
    ],
)
def test_damaged_details_are_named_and_left_out(tmp_path, change, words):
    run = make_run(tmp_path, "prism", "PrismLM")
    write(run, "harmed", change(suppressed(0.9, 0.01)))
    write(run, "whole", suppressed(0.9, 0.01))
    runs, _ = find_runs([tmp_path])
    interventions, (line,) = read_interventions(runs)
    assert "harmed.details.json is damaged (" in line and words in line
    assert [row[1] for row in intervention_tables(runs, interventions)[0].rows] == ["whole"]


def test_a_number_that_could_not_be_computed_is_an_empty_cell(tmp_path):
    run = make_run(tmp_path, "prism", "PrismLM")
    details = suppressed(0.9, 0.01)
    details["attempts"][1]["fresh"] |= {"rise": None, "rise_interval": None}
    write(run, "calm", details)
    runs, _ = find_runs([tmp_path])
    interventions, damaged = read_interventions(runs)
    assert not damaged and intervention_tables(runs, interventions)[0].rows[0][7] == ""
    assert format_met_goals(interventions).startswith("0 of 1")


def test_what_is_missing_has_its_command(tmp_path):
    make_run(tmp_path, "prism", "PrismLM")
    make_run(tmp_path, "dense", "DenseLM")
    runs, _ = find_runs([tmp_path])
    interventions, _ = read_interventions(runs)
    tables = intervention_tables(runs, interventions)
    assert [table.rows for table in tables] == [[], []]
    assert all(f"--ckpt_path {tmp_path / 'prism'}" in table.missing[0] for table in tables)
    assert format_met_goals(interventions) is None and format_best_gain(interventions) is None
    assert intervention_tables([run for run in runs if not run.prototypes], interventions) == []
    assert (ROOT / "evals" / "continuation.yaml").is_file() and "evals/continuation.yaml" in tables[1].missing[0]
