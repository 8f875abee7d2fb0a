"""Attributions and prototype cards as tables in a terminal; control characters in texts are escaped."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from prism_lightning.attribution.results import Attribution, Passage, TrainingDocument, TrainingToken
from prism_lightning.common.console import console
from prism_lightning.common.errors import visible
from prism_lightning.inspection.cards import PrototypeCard

BAR_WIDTH, MAX_PROTOTYPES = 6, 3
NARROW = 100  # terminal columns; below, bars and prototypes would leave no room for texts


def print_attributions(attributions: list[Attribution]) -> None:
    """Print a table for each attribution, and the meaning of the numbers."""
    for note in attributions[0].notes if attributions else []:
        console.print(f"note: {visible(note)}", markup=False, style="yellow")
    for attribution in attributions:
        if attribution.tokens:
            console.print(attribution_table(attribution))
        else:
            console.print(Text.assemble(_title(attribution), "\n", nothing_found(attribution), no_wrap=False))
    if not any(attribution.tokens for attribution in attributions):
        return
    console.print(
        "influence: nats of the query's loss, to first order; positive = training on it lowered that loss",
        style="dim",
    )
    console.print(f"index over {visible(attributions[0].indexed)}", style="dim", markup=False)


def nothing_found(attribution: Attribution) -> str:
    """Return the reason why an attribution has no training tokens."""
    if attribution.touched:
        return f"  no opposing token: none of the {attribution.touched:,} training tokens touched raised the loss"
    return "  no training token was found: the prototypes of this query are active in none with the query's target"


def attribution_table(attribution: Attribution) -> Table:
    """Return a table of one attribution's training tokens, passages and documents, strongest first."""
    table = Table(title=_title(attribution), title_justify="left", expand=False, show_edge=False)
    table.add_column("", style="dim", no_wrap=True)
    table.add_column("influence", justify="right", no_wrap=True)
    wide = console.width >= NARROW
    if wide:
        table.add_column("", no_wrap=True)
        table.add_column("through", no_wrap=True)
    table.add_column("where", no_wrap=True)
    table.add_column("text")  # the only column that shrinks; its cells are cut, not wrapped
    largest = max((abs(t.influence) for t in attribution.tokens), default=0.0)
    for number, token in enumerate(attribution.tokens):
        middle = (_bar(token.influence, largest), _prototypes_of(token)) if wide else ()
        row = (f"{token.influence:+.3g}", *middle, _source(token.source))
        table.add_row("tokens" if number == 0 else "", *row, highlighted(token))
    groups: tuple[tuple[str, Sequence[Passage | TrainingDocument]], ...] = (
        ("passages", attribution.passages),
        ("documents", attribution.documents),
    )
    for name, parts in groups:
        table.add_section()
        largest = max((abs(part.influence) for part in parts), default=0.0)
        for number, part in enumerate(parts):
            text = Text(_without_indentation(getattr(part, "text", "")), style="dim", no_wrap=True, overflow="ellipsis")
            middle = (_bar(part.influence, largest), "") if wide else ()
            row = (f"{part.influence:+.3g}", *middle, _source(part.source))
            table.add_row(name if number == 0 else "", *row, text)
    return table


def _prototypes_of(token: TrainingToken) -> str:
    """The prototypes with most of a token's influence."""
    names = [str(prototype) for prototype, _ in token.prototypes]
    more = f" +{len(names) - MAX_PROTOTYPES}" if len(names) > MAX_PROTOTYPES else ""
    return " ".join(names[:MAX_PROTOTYPES]) + more


def highlighted(token: TrainingToken) -> Text:
    """Return a training token in its context, highlighted, and visible on narrow terminals too."""
    beside = min(32, max(10, (console.width - 84) // 2))
    return Text.assemble(
        (_without_indentation(token.before)[-beside:], "dim"),
        (_on_one_line(token.token), "bold reverse"),
        (_without_indentation(token.after)[:beside], "dim"),
        no_wrap=True,
        overflow="ellipsis",
    )


def print_cards(cards: list[PrototypeCard]) -> None:
    """Print a table of prototypes: label, promoted and demoted tokens, and examples of each group."""
    table = Table("prototype", "", "activation", "where", "training tokens", show_edge=False)
    for card in cards:
        table.add_section()
        if card.dead:
            table.add_row(str(card.prototype), "", "", "", Text("dead: never active in the training data", style="dim"))
            continue
        label = card.label
        shares = (label.says_share_top, label.says_share_middle, label.says_share_random)
        fit_shares = Text(
            f" fits {shares[0]:.0%} of the top, {shares[1]:.0%} middle, {shares[2]:.0%} random", style="dim"
        )
        label_text = Text(visible(str(label)), style="bold").append_text(fit_shares)
        table.add_row(str(card.prototype), "says", "", f"{card.usage:,} uses ({card.usage_share:.3%})", label_text)
        for name, words in (("promotes", card.promotes), ("demotes", card.demotes)):
            quoted = " ".join(f"“{visible(word)}”" for word in words)
            table.add_row("", name, "", "", Text(quoted, overflow="ellipsis", no_wrap=True))
        for group, tokens in card.examples.items():
            for number, token in enumerate(tokens):
                name = group if number == 0 else ""
                table.add_row("", name, f"{token.influence:.3f}", _source(token.source), highlighted(token))
    console.print(table)
    if cards and cards[0].faithfulness:
        figures = ", ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in cards[0].faithfulness.items())
        console.print(f"all prototypes together, on validation text: {figures}", style="dim")


def _title(attribution: Attribution) -> Text:
    context = Text(f"…{_on_one_line(attribution.context)[-40:]}", style="dim")
    if attribution.kind == "sequence":
        detail = Text(f"the whole text, loss {attribution.loss:.2f} nats", style="bold")
        title = Text.assemble("Σ ", detail)
    elif attribution.kind == "contrast":
        chosen, other = (_on_one_line(text) for text in (attribution.token, attribution.other or ""))
        detail = Text(f" log-odds {-attribution.loss:+.2f}")
        title = Text.assemble(context, (chosen, "bold reverse"), " and not ", (other, "reverse"), detail)
    else:
        title = Text.assemble(
            context, (_on_one_line(attribution.token), "bold reverse"), f" {math.exp(-attribution.loss):.1%}"
        )
    return title.append(f"   scored by {attribution.scored_by}, {attribution.touched:,} training tokens touched", "dim")


def _on_one_line(text: str) -> str:
    return visible(text.replace("\n", "⏎"))


def _without_indentation(text: str) -> str:
    """A text on one line, with indentation shortened to leave room for words."""
    return re.sub(" {2,}", " ", _on_one_line(text))


def _source(source: str) -> Text:
    """A source; of a long one the end is kept, which has the file and line."""
    source, width = visible(source), max(14, console.width // 4)
    return Text(source if len(source) <= width else "…" + source[1 - width :], no_wrap=True)


def _bar(value: float, largest: float) -> Text:
    cells = round(BAR_WIDTH * abs(value) / largest) if largest else 0
    return Text("█" * cells, style="green" if value >= 0 else "red")
