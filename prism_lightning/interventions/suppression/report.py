"""What `suppress` shows: a table in the terminal, a Markdown report with cards of the prototypes, and a plot."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.table import Table
from rich.text import Text

from prism_lightning.common.markdown import escaped, table
from prism_lightning.common.plot_style import (
    GOAL_LINE,
    PROTOTYPES,
    PROTOTYPES_ALTERNATIVE,
    RANDOM_CONTROL,
    RIVALS,
    UNCHANGED_MODEL,
    new_figure,
)
from prism_lightning.common.statistics import mean_interval
from prism_lightning.inspection.cards import PrototypeCard
from prism_lightning.inspection.tracing import as_markdown
from prism_lightning.interventions.suppression.measurements import PLAIN_NAME, Measurement, quantity
from prism_lightning.interventions.suppression.random_draws import DRAWS_PER_LOOK, planned_looks
from prism_lightning.interventions.suppression.results import Suppression

HEADERS = (
    "condition",
    "prototypes",
    "rate",
    "rate reduction",
    "perplexity elsewhere",
    "distinct 1 / 2 / 3",
    "repetition",
    "loss under the plain model",
)
TERMINAL_COLUMNS = 5  # the columns that matter most


def verdict(result: Suppression) -> str:
    """Return one line that says whether the goal is met on fresh prompts."""
    settings, fresh = result.settings, result.kept_attempt.fresh
    return (
        f"goal {'met' if fresh.meets(settings.goal) else 'missed'} on fresh prompts: the rate is reduced by"
        f" {_percent(fresh.rate_reduction)} (goal {_percent(settings.min_rate_reduction, '.0f')}), perplexity of texts"
        f" without the behaviour changes by {_percent(fresh.perplexity_increase, '+.2f')} (goal at most"
        f" {_percent(settings.max_perplexity_increase)}), with {quantity(fresh.prototypes, 'prototype')} {fresh.name}"
    )


def measurement_line(measurement: Measurement) -> str:
    """Return one line for the terminal about a measurement, as soon as it is made."""
    rate, increase = _percent(measurement.stats.rate), _percent(measurement.perplexity_increase, "+.2f")
    return f"{measurement.name}: rate {rate}, perplexity elsewhere {increase}"


def comparison_table(result: Suppression) -> Table:
    """Return the comparison for a terminal."""
    title = Text(f"Suppression of {result.behaviour}")
    comparison = Table(*HEADERS[:TERMINAL_COLUMNS], title=title, show_edge=False)
    for row in comparison_rows(result):
        comparison.add_row(*row[:TERMINAL_COLUMNS])
    return comparison


def comparison_rows(result: Suppression) -> list[list[str]]:
    """Return the rows of the comparison on fresh prompts; random draws are one row with their means."""
    measurements = (result.plain, *(attempt.fresh for attempt in result.attempts), result.biased)
    rows = [_comparison_row(measurement) for measurement in measurements]
    return [*rows, _draws_row(result.draws, result.settings.draws)] if result.draws else rows


def _comparison_row(measurement: Measurement) -> list[str]:
    stats, plain = measurement.stats, measurement.name == PLAIN_NAME
    increase = _with_interval(measurement.perplexity_increase, measurement.perplexity_increase_interval, "+.2f")
    return [
        measurement.name,
        f"{measurement.prototypes}",
        _with_interval(stats.rate, stats.interval),
        "" if plain else _with_interval(measurement.rate_reduction, measurement.rate_reduction_interval),
        f"{measurement.perplexity:.3f}" if plain else increase,
        " / ".join(f"{stats.distinct[size]:.3f}" for size in (1, 2, 3)),
        f"{stats.repetition:.3f}",
        f"{stats.plain_loss:.3f}",
    ]


def _draws_row(draws: list[Measurement], planned: int) -> list[str]:
    distinct = (float(np.mean([draw.stats.distinct[size] for draw in draws])) for size in (1, 2, 3))
    return [
        f"{len(draws)} random draws",
        f"{draws[0].prototypes}",
        _mean([draw.stats.rate for draw in draws], planned),
        _mean([draw.rate_reduction for draw in draws], planned),
        _mean([draw.perplexity_increase for draw in draws], planned, "+.2f"),
        " / ".join(f"{value:.3f}" for value in distinct),
        f"{np.mean([draw.stats.repetition for draw in draws]):.3f}",
        f"{np.mean([draw.stats.plain_loss for draw in draws]):.3f}",
    ]


def _mean(values: list[float], planned: int, form: str = ".1f") -> str:
    if len(values) < 2:
        return _percent(values[0], form)
    return _with_interval(float(np.mean(values)), mean_interval(values, planned_looks(planned)), form)


def _percent(value: float, form: str = ".1f") -> str:
    return f"{100 * value:{form}} %"


def _with_interval(value: float, interval: tuple[float, float], form: str = ".1f") -> str:
    low, high = interval
    return f"{_percent(value, form)} ({100 * low:{form}} to {100 * high:{form}})"


def markdown(
    result: Suppression, cards: list[PrototypeCard], scores: list[dict[str, Any]], command: str, plot: str
) -> str:
    """Return the whole report.

    Args:
        result: Result of the experiment.
        cards: Cards of the suppressed prototypes.
        scores: Scores of suites without and with the intervention.
        command: The command line.
        plot: File name of the plot.
    """
    lines = [f"# Suppression of {escaped(result.behaviour)}", "", f"`{command}`", "", verdict(result) + ".", ""]
    lines += [f"- {escaped(note)}" for note in result.notes]
    lines += [*_measurement_notes(result), "", table(HEADERS, comparison_rows(result)), ""]
    lines += [f"![rate against perplexity]({plot})", "", *_suites(scores), *_selection(result), *_cards(result, cards)]
    return "\n".join(lines)


def _measurement_notes(result: Suppression) -> list[str]:
    sampling, draws, settings = result.settings.sampling, len(result.draws), result.settings
    prompts = (
        f"- The comparison uses {len(result.plain.stats.shows_behaviour)} prompts of {sampling.prompt_tokens} tokens"
        " from held-out texts that nothing was chosen on. Each is continued by up to"
        f" {sampling.new_tokens} tokens at temperature {sampling.temperature:g}, seed {sampling.seed}."
    )
    columns = (
        "- Rate: share of continuations that show the behaviour, with Wilson's 95 % interval. Rate reduction: relative"
        " to the unchanged model, with a bootstrap interval over prompts. Perplexity elsewhere: of held-out texts"
        " without the behaviour, and its relative increase. Distinct: share of different runs of 1, 2 and 3 tokens."
        " Repetition: share of runs of four tokens that occurred before in the same continuation. Loss under the plain"
        " model: in nats per token, of the continuation and its prompt."
    )
    if not draws:
        return [prompts, columns]
    reason = f"the interval of their mean rate reduction is within ±{_percent(settings.min_rate_reduction / 10)}"
    stopped = f" Drawing stopped early because {reason}." if draws < settings.draws else ""
    return [
        prompts,
        columns,
        f"- Random draws: {draws} of at most {settings.draws} sets of other prototypes with equal usage.{stopped} The"
        " table has their mean and its 95 % interval over draws. It is Student's interval, looked at every"
        f" {DRAWS_PER_LOOK} draws, with the 5 % shared out among the {planned_looks(settings.draws)} planned looks, so"
        " that it stays valid when drawing stops early.",
    ]


def _suites(scores: list[dict[str, Any]]) -> list[str]:
    if not scores:
        return []
    rows = []
    for score in scores:
        low, high = score.get("interval", (0, 0))
        paired = f"{score['difference']:+.4f} ({low:+.4f} to {high:+.4f})" if "difference" in score else ""
        rows.append([score["task"], score["metric"], f"{score['plain']:.4f}", f"{score['suppressed']:.4f}", paired])
    columns = ("task", "metric", "unchanged", "suppressed", "paired difference (95 % interval)")
    return ["## Suites", "", table(columns, rows), ""]


def _selection(result: Suppression) -> list[str]:
    paths = [attempt.selection.path for attempt in result.attempts] + [result.bias_path]
    rows = [
        [m.name, _percent(m.stats.rate), _percent(m.rate_reduction), _percent(m.perplexity_increase, "+.2f")]
        for path in paths
        for m in path
    ]
    return [
        "## Number of prototypes",
        "",
        "The number was selected on the other half of the held-out texts. Among the numbers that keep perplexity within"
        " the goal, it is the smallest whose rate reduction meets the goal even at the lower end of its 95 % interval."
        " Without such a number, it is the smallest with the largest rate reduction. The search is a bisection from the"
        " largest number down, so not every number is measured. The bias on the words is selected in the same way.",
        "",
        table(("condition", "rate", "rate reduction", "perplexity increase"), rows),
        "",
    ]


def _cards(result: Suppression, cards: list[PrototypeCard]) -> list[str]:
    selection = result.kept_attempt.selection
    effects, candidates = selection.ranking.effects, selection.ranking.prototypes
    lines = [
        "## Prototypes",
        "",
        "Effect on the behaviour: rise of the loss of the behaviour's tokens when the prototype alone is removed, in"
        f" millinats per token, over {effects.behaviour_tokens:,} tokens. Effect elsewhere: the same over"
        f" {effects.other_tokens:,} tokens of texts without the behaviour. ± is a standard error over texts.",
        "",
    ]
    for card in cards:
        i = card.prototype
        place = f"number {candidates.index(i) + 1} of {len(candidates)} candidates"
        fact = (
            f"factor {selection.scaling.factors[i]:g}, {place};"
            f" effect on the behaviour {1e3 * effects.behaviour_effect_K[i]:.2f} ±"
            f" {1e3 * effects.behaviour_effect_error_K[i]:.2f}, effect elsewhere"
            f" {1e3 * effects.collateral_effect_K[i]:.3f} ± {1e3 * effects.collateral_effect_error_K[i]:.3f}"
        )
        lines.append(as_markdown(card, [fact]))
    return lines


def figure(result: Suppression) -> Figure:
    """Return a plot of the behaviour's rate against the increase of perplexity elsewhere."""
    plot = new_figure(7, 5)
    axes = plot.add_subplot()
    if result.draws:
        axes.scatter(
            [100 * draw.perplexity_increase for draw in result.draws],
            [100 * draw.stats.rate for draw in result.draws],
            color=RANDOM_CONTROL,
            s=18,
            zorder=3,  # above the unchanged model's point, where they usually are
            label="random prototypes of equal usage",
        )
    goal = result.settings.goal
    axes.axhline(100 * result.plain.stats.rate * (1 - goal.min_rate_reduction), color=GOAL_LINE, lw=1, ls=":")
    goal_label = "goal: below and left of these lines"
    axes.axvline(100 * goal.max_perplexity_increase, color=GOAL_LINE, lw=1, ls=":", label=goal_label)
    _plot(axes, result.plain, UNCHANGED_MODEL, PLAIN_NAME)
    _plot(axes, result.biased, RIVALS[0], result.biased.name)
    for attempt, colour in zip(result.attempts, (PROTOTYPES, PROTOTYPES_ALTERNATIVE), strict=False):
        _plot(axes, attempt.fresh, colour, f"{quantity(attempt.fresh.prototypes, 'prototype')} {attempt.fresh.name}")
    axes.set(
        xlabel="increase of perplexity on texts without the behaviour, %",
        ylabel="continuations that show the behaviour, %",
        title=f"Suppression of {result.behaviour}"[:70].replace("$", r"\$"),
    )
    axes.set_ylim(bottom=0)
    plot.legend(frameon=False, loc="outside lower center", ncols=2)  # over no interval, however wide these are
    return plot


def _plot(axes: Axes, measurement: Measurement, colour: str, label: str) -> None:
    x, y = measurement.perplexity_increase, measurement.stats.rate
    left, right = measurement.perplexity_increase_interval
    low, high = measurement.stats.interval
    axes.errorbar(
        100 * x,
        100 * y,
        # Wilson's bounds may differ from a rate of 0 or 1 by rounding.
        yerr=[[100 * max(0.0, y - low)], [100 * max(0.0, high - y)]],
        xerr=[[100 * (x - left)], [100 * (right - x)]],
        fmt="o",
        color=colour,
        capsize=3,
        label=label,
    )
