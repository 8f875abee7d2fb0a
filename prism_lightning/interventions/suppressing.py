"""The work behind `suppress`: rank, choose on one half of the held-out texts, compare with rivals on the other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from prism_lightning.errors import UserError
from prism_lightning.explaining import check_length
from prism_lightning.interventions.behaviours import Behaviour, passages
from prism_lightning.interventions.continuing import Sampling, WordBias
from prism_lightning.interventions.intervention import composed
from prism_lightning.interventions.removal import Effects, removal_effects
from prism_lightning.interventions.suppression import (
    Goal,
    Measured,
    Trial,
    bias_path,
    chosen,
    of_equal_usage,
    prototype_path,
)
from prism_lightning.models import PrismForCausalLM

LEAST_MARKED = 20  # tokens of the behaviour, for a ranking


@dataclass
class Plan:
    """What is done, beside the behaviour.

    Attributes:
        goal: that the number of prototypes is chosen by.
        factor: given to each.
        count: prompts on either half of the held-out texts.
        draws: of random prototypes of equal usage.
        sampling: of continuations.
    """

    goal: Goal = field(default_factory=Goal)
    factor: float = 0.0
    count: int = 200
    draws: int = 20
    sampling: Sampling = field(default_factory=Sampling)


@dataclass
class Suppression:
    """What was found.

    Attributes:
        effects: of removing each prototype alone, on the ranking's texts.
        ranked: candidates, best first; those given by hand, in their order.
        path, biases: what was tried on the first half of the held-out texts.
        factors: chosen.
        fresh: on the second half: the model as it is, suppressed, with the words' bias chosen alike, and every draw of
            random prototypes.
    """

    behaviour: str
    notes: list[str]
    effects: Effects
    ranked: list[int]
    path: list[Measured]
    biases: list[Measured]
    factors: dict[int, float]
    fresh: list[Measured]
    plan: Plan

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON; effects of the candidates alone."""
        columns = ("work_K", "work_error_K", "cost_K", "cost_error_K", "usage_K")
        effects = {name.removesuffix("_K"): getattr(self.effects, name)[self.ranked].tolist() for name in columns}
        return {
            "behaviour": self.behaviour,
            "notes": self.notes,
            "plan": asdict(self.plan),
            "factors": {str(i): factor for i, factor in self.factors.items()},
            "candidates": {"prototype": self.ranked} | effects,
            "behaviour_tokens": self.effects.marked,
            "other_tokens": self.effects.others,
            "path": [measured.as_dict() for measured in self.path],
            "biases": [measured.as_dict() for measured in self.biases],
            "fresh": [measured.as_dict() for measured in self.fresh],
        }


def rank(
    model: PrismForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    behaviour: Behaviour,
    texts: list[str],
    labels: list[bool] | None,
    given: list[int] | None,
    report: Callable[[str, int, int], None],
) -> tuple[Effects, list[int]]:
    """What removing each prototype does on texts, and the candidates, best first; arguments as for `suppress`."""
    model.intervene(composed([model.factors, dict.fromkeys(given or [], 1.0)]))  # refuses ids it does not have
    shown = np.array([behaviour.present(text) for text in texts] if labels is None else labels)
    spans = [behaviour.spans(text) if present else [] for text, present in zip(texts, shown, strict=True)]
    pieces = passages(texts, spans, tokenizer, model.config.context_length)
    marked = sum(int(piece.marked_T.sum()) for piece in pieces)
    if marked < LEAST_MARKED:
        raise UserError(
            f"{behaviour.name!r} is {marked} tokens of {len(texts)} texts, {LEAST_MARKED} are needed to see what"
            " prototypes do for it: give other words, or more texts by --tokens"
        )
    if shown.all():
        raise UserError(f"all {len(texts)} texts show {behaviour.name!r}: there is none to keep; choose narrower words")
    effects = removal_effects(model, pieces, shown, report)
    ranked = effects.ranked() if given is None else list(dict.fromkeys(given))
    dead = [number for number in ranked if not effects.usage_K[number]]
    if dead:
        raise UserError(f"prototype {dead[0]} is dead: no token of {len(texts)} texts uses it; leave it out")
    if not ranked:
        raise UserError(f"no prototype surely works for {behaviour.name!r}: give more texts by --tokens")
    return effects, ranked


def suppress(
    model: PrismForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    behaviour: Behaviour,
    texts: list[str],
    held_out: list[str],
    plan: Plan,
    given: list[int] | None = None,
    labels: list[bool] | None = None,
    progress: Callable[[str, int, int], None] = lambda *_: None,
    report: Callable[[Measured], None] = lambda _: None,
) -> Suppression:
    """Find, choose, compare.

    Args:
        model, tokenizer: of a PRISM run.
        behaviour: to be suppressed.
        texts: that prototypes are ranked on.
        held_out: other texts; one half chooses how many prototypes, the other is for the comparison.
        plan: see there.
        given: prototypes in place of a ranking.
        labels: which of the texts show the behaviour, where that is known.
        progress, report: hear of the ranking and of everything measured.

    Raises:
        UserError: the behaviour absent from the texts, nothing to measure on, or dead prototypes.
    """
    check_length(model, plan.sampling.prompt_tokens + plan.sampling.new_tokens)
    if len(held_out) < 2:
        raise UserError(f"{len(held_out)} validation documents: at least two are needed, to choose on and to judge on")
    effects, ranked = rank(model, tokenizer, behaviour, texts, labels, given, progress)
    order = np.random.default_rng(plan.sampling.seed).permutation(len(held_out)).tolist()
    first, second = (
        Trial(model, tokenizer, behaviour, [held_out[number] for number in half], plan.count, plan.sampling)
        for half in (order[: len(order) // 2], order[len(order) // 2 :])
    )
    if given is None:
        path = prototype_path(first, ranked, plan.factor, plan.goal, report)
        ranked_first = ranked[: chosen(path, plan.goal).prototypes]
    else:
        ranked_first = ranked
        path = [first.scaled(f"{len(ranked)} prototypes", dict.fromkeys(ranked, plan.factor))]
        report(path[0])
    factors = dict.fromkeys(ranked_first, plan.factor)
    biases = bias_path(first, plan.goal, report)
    bias = chosen(biases, plan.goal).settings["bias"]
    fresh = [second.plain, second.scaled("suppressed", factors)]
    fresh.append(second.biased(f"words biased by {bias:g}", WordBias.of(behaviour.words, tokenizer, bias)))
    generator = np.random.default_rng(plan.sampling.seed)
    for number in range(plan.draws):
        others = of_equal_usage(ranked_first, effects.usage_K, generator)
        fresh.append(second.scaled(f"random {number + 1}", dict.fromkeys(others, plan.factor)))
        report(fresh[-1])
    return Suppression(behaviour.name, behaviour.notes, effects, ranked, path, biases, factors, fresh, plan)
