"""Tracing an intervention to training data: the card of every prototype that it changes, as Markdown."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerFast

from prism_lightning.attribution.attributor import Attributor
from prism_lightning.attribution.results import TrainingToken
from prism_lightning.common.errors import UserError, visible
from prism_lightning.inspection.cards import PrototypeCard
from prism_lightning.inspection.labels import Labeller
from prism_lightning.inspection.own_index import own_index
from prism_lightning.models import PrismForCausalLM
from prism_lightning.run.model_folder import load_exported


def own_attributor(
    run: Path,
    index: Path | None = None,
    verify: bool = True,
    loaded: tuple[PrismForCausalLM, PreTrainedTokenizerFast] | None = None,
) -> Attributor:
    """Open a run with the index of its own prototypes, which the first call builds, or with a given index.

    `loaded` is the model and tokenizer, where they are loaded already.

    Raises:
        UserError: as `own_index` and `Attributor.open`.
    """
    loaded = loaded or load_exported(run)
    if index is None and loaded[0].prototypes is not None:  # a dense model has no prototypes of its own
        index = own_index(run, loaded[0])
        try:
            return Attributor.open(run, index, verify=verify, loaded=loaded)
        except UserError as error:
            print(f"the index of the model's own prototypes is built again: {error}", file=sys.stderr)
            index = own_index(run, loaded[0], rebuild=True)
    return Attributor.open(run, index, verify=verify, loaded=loaded)


def prototypes_labelled(attributor: Attributor, text: str) -> list[int]:
    """Return the prototypes whose label contains a text.

    Raises:
        UserError: there is none.
    """
    index, labeller, prototypes = attributor.index, Labeller(attributor.describe.store), []
    for number in np.flatnonzero(index.usage_K()).tolist():
        rows_n, activations_n = index.postings(number)
        if text.lower() in str(labeller.label(rows_n[np.argsort(-activations_n, kind="stable")])).lower():
            prototypes.append(number)
    if not prototypes:
        raise UserError(f"no prototype's label contains {text!r}: `prototypes` prints labels")
    return prototypes


def as_markdown(card: PrototypeCard, facts: list[str]) -> str:
    """Return a card as a section of a report; `facts` are lines about the intervention on the prototype."""
    lines = [f"### Prototype {card.prototype}: {code(str(card.label))}", ""]
    lines += [f"- {fact}" for fact in facts]
    label = card.label
    lines += [
        f"- active in {card.usage:,} of {card.indexed_tokens:,} training tokens ({card.usage_share:.3%});"
        f" the label fits {label.says_share_top:.0%} of its tokens with the largest activations,"
        f" {label.says_share_middle:.0%} of the middle ones and {label.says_share_random:.0%} of random ones",
        f"- promotes {' '.join(map(code, card.promotes))}; demotes {' '.join(map(code, card.demotes))}",
        "",
        "| | activation | where | training token |",
        "|---|---|---|---|",
    ]
    for group, tokens in card.examples.items():
        lines += [f"| {group} | {token.influence:.3f} | {code(token.source)} | {_example(token)} |" for token in tokens]
    return "\n".join([*lines, ""])


def _example(token: TrainingToken) -> str:
    return f"{code(token.before)} **{code(token.token)}** {code(token.after)}"


def code(text: str) -> str:
    """Return a text of the data for a report: on one line, and escaped so that none of it is markup."""
    text = visible(text.replace("\n", "⏎").replace("`", "'").replace("|", "¦"))
    return f"`{text}`" if text else ""
