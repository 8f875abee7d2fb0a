"""Suppression end to end: a planted behaviour falls, random prototypes do not do it, and wrong input is refused."""

import json
from dataclasses import replace

import pytest
import torch
from support.figures import kept_figures

from prism_lightning.common.errors import UserError
from prism_lightning.interventions.suppression.behaviours import WordBehaviour
from prism_lightning.interventions.suppression.continuation_stats import repetitions
from prism_lightning.interventions.suppression.continuations import prompts
from prism_lightning.interventions.suppression.experiment import SuppressionExperiment
from prism_lightning.interventions.suppression.measurements import ConditionMeasurements
from prism_lightning.interventions.suppression.selection import choose
from prism_lightning.interventions.suppression.settings import Goal, Sampling, SuppressionSettings
from prism_lightning.models.steering import Scaling
from prism_lightning.run.training_data import data_of

SMALL = ("--tokens", "30000", "--prompts", "40", "--new_tokens", "16", "--draws", "2")


@pytest.fixture(scope="module")
def measurements(loaded, run):
    model, tokenizer = loaded
    texts = data_of(run).train.texts(range(200))
    behaviour = WordBehaviour(["("], tokenizer)
    return ConditionMeasurements(model, tokenizer, behaviour, texts, 40, Sampling(new_tokens=16))


def test_a_factor_of_one_changes_nothing(measurements):
    measurement = measurements.scaled("one", Scaling({1: 1.0}))
    assert measurement.rate_reduction == 0 and measurement.perplexity_increase == 0
    assert measurement.perplexity_increase_interval == (0, 0)
    assert measurement.stats.as_dict() == measurements.plain.stats.as_dict()


def test_a_strong_bias_ends_the_behaviour(measurements):
    measurement, plain = measurements.biased("words", 100.0), measurements.plain
    assert plain.stats.rate > 0.1 and measurement.stats.rate == 0 and measurement.rate_reduction == 1
    assert measurement.rate_reduction_interval[0] < 1  # forty continuations without it do not prove that there is none
    assert measurement.perplexity_increase == pytest.approx(measurement.perplexity / plain.perplexity - 1)


def test_removing_everything_costs(measurements):
    measurement = measurements.scaled("all", Scaling(dict.fromkeys(range(64), 0.0)))
    assert measurement.perplexity_increase > 0.2 and measurement.perplexity_increase_interval[0] > 0


def test_the_first_that_surely_meets_the_goal_is_chosen(measurements):
    path = [
        replace(
            measurements.plain,
            name=str(number),
            rate_reduction=reduction,
            rate_reduction_interval=(reduction - 0.1, reduction + 0.1),
            perplexity_increase=increase,
        )
        for number, reduction, increase in ((1, 0.5, 0.0), (2, 0.85, 0.01), (3, 0.95, 0.01), (4, 1, 0.01))
    ]
    assert choose(path, Goal(0.8, 0.02)).name == "3"  # the reduction of 2 may as well be 0.75
    assert choose(path, Goal(0.8, 0.001)).name == "1"  # missed: the largest reduction that costs no more
    assert choose(path, Goal(0.95, 0.02)).name == "4"  # missed surely: the largest reduction


def test_repetitions_are_counted():
    assert repetitions([1, 2, 3, 4, 1, 2, 3, 4]) == (1, 5)
    assert repetitions([1, 2, 3]) == (0, 0)


def test_prompts_begin_texts_and_go_on_where_these_are_few(loaded):
    _, tokenizer = loaded
    texts, sampling = ["a = 1\n" * 60, "b = 2\n" * 4], Sampling(prompt_tokens=8, new_tokens=12)
    ids = [tokenizer(text)["input_ids"] for text in texts]
    starts = prompts(texts, tokenizer, sampling, 3)
    assert starts == [ids[0][:8], ids[1][:8], ids[0][20:28]]
    assert prompts(texts, tokenizer, sampling, 2) == starts[:2] and prompts([], tokenizer, sampling, 2) == []


def test_the_verb_writes_an_intervention_a_report_and_a_plot(run, cli, monkeypatch):
    figures = kept_figures(monkeypatch)
    out = run / "interventions" / "no_calls.json"
    output = cli("suppress", "--ckpt_path", run, "--words", "(", "--name", "no_calls", *SMALL, check=0).stdout
    assert "Suppression of (" in output and "goal " in output
    details = json.loads((out.parent / "no_calls.details.json").read_text())
    written, kept = json.loads(out.read_text()), details["attempts"][details["kept"]]
    assert written["factors"] == kept["factors"] and set(written["factors"].values()) == {0.0}
    assert written["tokens"] == kept["tokens"] and details["plain"]["name"] == "unchanged"
    first = kept["candidates"]["prototype"][: len(written["factors"])]
    assert sorted(map(int, written["factors"])) == sorted(first)
    assert len(details["draws"]) == 2
    for draw in details["draws"]:
        assert not set(draw["settings"]["factors"]) & set(written["factors"])
        assert draw["settings"]["tokens"] == kept["tokens"]
    for attempt, tokens in zip(details["attempts"], (None, list), strict=False):
        assert attempt["tokens"] is None if tokens is None else len(attempt["tokens"]) > 0
    report = (out.parent / "no_calls.md").read_text()
    assert all(f"### Prototype {number}:" in report for number in written["factors"])
    assert "](no_calls.png)" in report and (out.parent / "no_calls.png").is_file()
    (axes,) = figures["in memory"].axes
    measured = [details["plain"], details["biased"], *(attempt["fresh"] for attempt in details["attempts"])]
    plotted = [container.lines[0].get_xydata()[0] for container in axes.containers]
    assert plotted == [pytest.approx([100 * m["rise"], 100 * m["counts"]["rate"]]) for m in measured]
    (draws,) = axes.collections[:1]
    expected = [[100 * draw["rise"], 100 * draw["counts"]["rate"]] for draw in details["draws"]]
    assert draws.get_offsets().tolist() == [pytest.approx(point) for point in expected]
    output = cli(
        "generate",
        "--ckpt_path",
        run,
        "--prompt",
        "class A",
        "--max_new_tokens",
        "16",
        "--intervention",
        "no_calls",
        "--json",
        check=0,
    ).stdout
    assert json.loads(output)["continuation"]


def test_given_prototypes_are_suppressed_without_a_search(run, cli, tmp_path):
    details = json.loads(cli("prototypes", "--ckpt_path", run, "--json", check=0).stdout)
    ids = [card["prototype"] for card in details[:2]]
    out = run / "interventions" / "two.json"
    cli(
        "suppress",
        "--ckpt_path",
        run,
        "--id",
        *ids,
        "--words",
        "(",
        "--factor",
        "0.5",
        "--name",
        "two",
        *SMALL,
        "--fall",
        "0.5",
        "--max_perplexity_increase",
        "0.1",
        check=0,
    )
    goal = json.loads(out.with_name("two.details.json").read_text())["plan"]["goal"]
    assert goal == {"fall": 0.5, "rise": 0.1}
    assert "--min_rate_reduction 0.5" in json.loads(out.read_text())["origin"]["command"]
    assert json.loads(out.read_text())["factors"] == {str(i): 0.5 for i in ids}


def test_examples_tell_a_behaviour(run, cli, tmp_path):
    texts = data_of(run).train.texts(range(300))
    for name, with_it in (("calls", True), ("others", False)):
        chosen = [text for text in texts if ("(" in text) == with_it]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in chosen))
    options = ("--with_texts", tmp_path / "calls.jsonl", "--without_texts", tmp_path / "others.jsonl")
    cli("suppress", "--ckpt_path", run, *options, "--name", "examples", *SMALL, check=0)
    assert "of held-out examples" in (run / "interventions" / "examples.md").read_text()
    refused = cli("suppress", "--ckpt_path", run, *options, "--words", "x", "--name", "examples")
    assert refused.returncode == 2 and "without --words" in refused.stderr


def test_what_cannot_be_suppressed_is_refused(run, cli, tmp_path):
    def refused(*arguments):
        result = cli("suppress", "--ckpt_path", run, "--name", "x", *SMALL, *arguments)
        assert (
            result.returncode == 2
            and "Traceback" not in result.stderr
            and not (run / "interventions" / "x.json").exists()
        )
        return result.stderr

    assert "say what to suppress" in refused()
    assert "need --words" in refused("--id", "3")
    assert "together" in refused("--with_texts", tmp_path / "x")
    assert "20 are needed" in refused("--words", "zyxwv")
    assert "prototype 64 is not in the model" in refused("--id", "64", "--words", "self")
    assert "no prototype's label contains" in refused("--label", "zyxwv", "--words", "self")
    assert "empty word" in refused("--words", " ")
    assert "0.8 is 80 %" in refused("--words", "self", "--min_rate_reduction", "80")
    assert "--max_perplexity_increase must be at least 0" in refused("--words", "self", "--rise", "nan")
    assert "finite" in refused("--words", "self", "--factor", "nan")
    assert "--prompts must be a positive number" in refused("--words", "self", "--prompts", "0")
    assert "letters" in refused("--words", "self", "--name", "../x")


def test_a_dead_prototype_is_refused(loaded, run):
    model, tokenizer = loaded
    behaviour, texts = WordBehaviour(["("], tokenizer), data_of(run).train.texts(range(60))
    kept = model.prototypes.weight[5].clone()
    with torch.no_grad():  # as far from every token as from any
        model.prototypes.weight[5] = -model.prototypes.weight.sum(0)
    model.intervene()  # what was computed of the old weights is forgotten
    try:
        with pytest.raises(UserError, match="prototype 5 is dead"):
            SuppressionExperiment(
                model, tokenizer, behaviour, texts, texts, SuppressionSettings(new_tokens=8), prototypes=[5]
            ).run()
    finally:
        with torch.no_grad():
            model.prototypes.weight[5] = kept
        model.intervene()


def test_suites_are_scored_beside_it(run, cli, tmp_path):
    suite = tmp_path / "suite.yaml"
    suite.write_text(
        "tasks: {continuation: {kind: continuation, metric: acc, chance: 0.25, context: 12, continuation: 4}}"
    )
    ids = [c["prototype"] for c in json.loads(cli("prototypes", "--ckpt_path", run, "--json", check=0).stdout)]
    options = ("--id", *ids, "--words", "(", "--suite", suite, "--name", "scored")
    assert "suppressed" in cli("suppress", "--ckpt_path", run, *options, *SMALL, check=0).stdout
    (score,) = json.loads((run / "interventions" / "scored.details.json").read_text())["suites"]
    assert score["suppressed"] - score["plain"] == pytest.approx(score["difference"])
    assert "## Suites" in (run / "interventions" / "scored.md").read_text()
