"""What `suppress` shows: a table in the terminal, a Markdown report with the traced prototypes, and a plot."""

from __future__ import annotations

from typing import Any

import numpy as np
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
from prism_lightning.inspection.cards import PrototypeCard
from prism_lightning.inspection.tracing import as_markdown
from prism_lightning.interventions.suppression.experiment import Suppression
from prism_lightning.interventions.suppression.selection import LOOK, Measured, looks, mean_interval

HEADERS = (
    "",
    "prototypes",
    "rate",
    "falls by",
    "perplexity elsewhere",
    "distinct 1 / 2 / 3",
    "repeated",
    "loss of its text",
)


def compared(found: Suppression) -> list[list[str]]:
    """Rows of the comparison on fresh prompts; the random draws as their mean and its interval over draws."""
    draws = found.draws
    rows = [_row(measured) for measured in (found.plain, *(a.fresh for a in found.attempts), found.biased)]
    if draws:
        distinct = (float(np.mean([d.counts.distinct[size] for d in draws])) for size in (1, 2, 3))
        rows.append(
            [
                f"{len(draws)} random draws",
                f"{draws[0].prototypes}",
                _mean([d.counts.rate for d in draws], found.plan.draws),
                _mean([d.fall for d in draws], found.plan.draws),
                _mean([d.rise for d in draws], found.plan.draws, "+.2f"),
                " / ".join(f"{value:.3f}" for value in distinct),
                f"{np.mean([d.counts.repetition for d in draws]):.3f}",
                f"{np.mean([d.counts.plain_loss for d in draws]):.3f}",
            ]
        )
    return rows


def _mean(values: list[float], planned: int, form: str = ".1f") -> str:
    if len(values) < 2:
        return f"{100 * values[0]:{form}} %"
    return _percent(float(np.mean(values)), mean_interval(values, planned), form)


def _percent(value: float, interval: tuple[float, float], form: str = ".1f") -> str:
    low, high = interval
    return f"{100 * value:{form}} % ({100 * low:{form}} to {100 * high:{form}})"


def _row(measured: Measured) -> list[str]:
    counts, plain = measured.counts, measured.name == "as it is"
    return [
        measured.name,
        f"{measured.prototypes}",
        _percent(counts.rate, counts.interval),
        "" if plain else _percent(measured.fall, measured.fall_interval),
        f"{measured.perplexity:.3f}" if plain else _percent(measured.rise, measured.rise_interval, "+.2f"),
        " / ".join(f"{counts.distinct[size]:.3f}" for size in (1, 2, 3)),
        f"{counts.repetition:.3f}",
        f"{counts.plain_loss:.3f}",
    ]


def verdict(found: Suppression) -> str:
    """One line: whether the goal is met on fresh prompts."""
    goal, measured = found.plan.goal, found.kept.fresh
    met = "met" if measured.meets(goal) else "missed"
    return (
        f"goal {met} on fresh prompts: the rate falls by {measured.fall:.1%} (goal {goal.fall:.0%}), perplexity of"
        f" texts without it rises by {measured.rise:+.2%} (goal at most {goal.rise:.1%}), with"
        f" {measured.prototypes} prototypes {measured.name}"
    )


def comparison_table(found: Suppression) -> Table:
    """The comparison, for a terminal: the columns that matter most."""
    shown = Table(*HEADERS[:5], title=Text(f"suppressing {found.behaviour}"), show_edge=False)
    for row in compared(found):
        shown.add_row(*row[:5])
    return shown


def markdown(
    found: Suppression, cards: list[PrototypeCard], scores: list[dict[str, Any]], command: str, plot: str
) -> str:
    """The whole report."""
    kept = found.kept
    place = {prototype: number for number, prototype in enumerate(kept.ranked)}
    sampling = found.plan.sampling
    tried = [*(measured for attempt in found.attempts for measured in attempt.path), *found.biases]
    lines = [f"# Suppressing {escaped(found.behaviour)}", "", f"`{command}`", "", verdict(found) + ".", ""]
    lines += [f"- {escaped(note)}" for note in found.notes]
    lines += [
        f"- {len(found.plain.counts.shown)} prompts of {sampling.prompt_tokens} tokens from held-out texts that"
        f" nothing was chosen on; up to {sampling.new_tokens} tokens each, temperature {sampling.temperature:g}, seed"
        f" {sampling.seed}. Rates: share of continuations that show the behaviour, Wilson's interval; falls: bootstrap"
        " over prompts. Perplexity elsewhere: of held-out texts without the behaviour, and its rise. Repeated: runs of"
        " four tokens that stood before in the same continuation. Loss of its text: nats a token under the model as it"
        " is.",
        *_drawn(found),
        "",
        table(HEADERS, compared(found)),
        "",
        f"![rate against perplexity]({plot})",
        "",
        *_suites(scores),
        "## How many prototypes",
        "",
        "On the other half of the held-out texts. Of those that keep perplexity within the goal, the fewest whose fall"
        " meets the goal at the lower end of its 95 % interval are taken, or else the fewest that fall most. They are"
        " found by bisection down from the most, so not every number is tried; the words' bias is chosen alike.",
        "",
        table(("", "rate", "falls by", "perplexity rises by"), map(_tried, tried)),
        "",
        "## The prototypes",
        "",
        f"Work: by how much the loss of the behaviour's tokens rises when the prototype alone is removed, in millinats"
        f" a token, over {kept.effects.marked:,} of them; cost: the same over {kept.effects.others:,} tokens of texts"
        " without it; ± standard errors over texts.",
        "",
    ]
    for card in cards:
        number, effects = card.prototype, kept.effects
        fact = (
            f"factor {kept.factors[number]:g}, number {place[number] + 1} of {len(place)} candidates: work"
            f" {1e3 * effects.work_K[number]:.2f} ± {1e3 * effects.work_error_K[number]:.2f}, cost"
            f" {1e3 * effects.cost_K[number]:.3f} ± {1e3 * effects.cost_error_K[number]:.3f}"
        )
        lines.append(as_markdown(card, [fact]))
    return "\n".join(lines)


def _drawn(found: Suppression) -> list[str]:
    if not found.draws:
        return []
    made, planned = len(found.draws), found.plan.draws
    why = f"no more, since the interval of their mean fall is within {found.plan.goal.fall / 10:.1%} to either side"
    return [
        f"- Random draws: {made} of at most {planned}, of other prototypes, used as often"
        f"{f'; {why}' if made < planned else ''}. Their mean, and its 95 % interval over draws: Student's t, looked at"
        f" every {LOOK} draws, the 5 % shared out among the {looks(planned)} looks that were planned, so that stopping"
        " early keeps its meaning."
    ]


def _tried(measured: Measured) -> list[str]:
    return [measured.name, f"{measured.counts.rate:.1%}", f"{measured.fall:.1%}", f"{measured.rise:+.2%}"]


def _suites(scores: list[dict[str, Any]]) -> list[str]:
    if not scores:
        return []
    rows = []
    for score in scores:
        low, high = score.get("interval", (0, 0))
        paired = f"{score['difference']:+.4f} ({low:+.4f} to {high:+.4f})" if "difference" in score else ""
        rows.append([score["task"], score["metric"], f"{score['plain']:.4f}", f"{score['suppressed']:.4f}", paired])
    columns = ("task", "metric", "as it is", "suppressed", "difference, item by item, 95 %")
    return ["## Suites", "", table(columns, rows), ""]


def figure(found: Suppression) -> Figure:
    """Rate of the behaviour against the rise of perplexity elsewhere."""
    drawn = new_figure(7, 5)
    axes = drawn.add_subplot()
    plain, draws = found.plain, found.draws
    if draws:
        axes.scatter(
            [100 * d.rise for d in draws],
            [100 * d.counts.rate for d in draws],
            color=RANDOM_CONTROL,
            s=18,
            label="random prototypes of equal usage",
        )
    goal = found.plan.goal
    axes.axhline(100 * plain.counts.rate * (1 - goal.fall), color=GOAL_LINE, lw=1, ls=":")
    axes.axvline(100 * goal.rise, color=GOAL_LINE, lw=1, ls=":", label="goal: below and left of these")
    for measured, colour, name in (
        (plain, UNCHANGED_MODEL, "as it is"),
        (found.biased, RIVALS[0], found.biased.name),
        *(
            (a.fresh, colour, f"{a.fresh.prototypes} prototypes {a.fresh.name}")
            for a, colour in zip(found.attempts, (PROTOTYPES, PROTOTYPES_ALTERNATIVE), strict=False)
        ),
    ):
        low, high = measured.counts.interval
        left, right = measured.rise_interval
        axes.errorbar(
            100 * measured.rise,
            100 * measured.counts.rate,
            yerr=[[100 * (measured.counts.rate - low)], [100 * (high - measured.counts.rate)]],
            xerr=[[100 * (measured.rise - left)], [100 * (right - measured.rise)]],
            fmt="o",
            color=colour,
            capsize=3,
            label=name,
        )
    axes.set(
        xlabel="rise of perplexity of texts without it, %",
        ylabel="continuations that show it, %",
        title=f"Suppressing {found.behaviour}"[:70].replace("$", r"\$"),
    )
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    return drawn
