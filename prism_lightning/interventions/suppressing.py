"""The work behind `suppress`: rank, choose on one half of the held-out texts, compare with rivals on the other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from prism_lightning.errors import UserError
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
from prism_lightning.progress import Progressing

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


def suppress(
    model: PrismForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    behaviour: Behaviour,
    examples: list[str],
    held_out: list[str],
    given: list[int] | None,
    plan: Plan,
    progress: Progressing,
    report: Callable[[Measured], None] = lambda _: None,
) -> Suppression:
    """Find, choose, compare.

    Args:
        model, tokenizer: as exported.
        behaviour: to be suppressed.
        examples: texts that prototypes are ranked on.
        held_out: other texts; the first half chooses how many, the second is for the comparison.
        given: prototypes in place of a ranking.
        plan: see there.
        progress, report: hear of the ranking and of everything measured.

    Raises:
        UserError: a dense model, the behaviour absent from the texts, nothing to measure on, or dead prototypes.
    """
    if model.prototypes is None:
        raise UserError("this model is dense: it has no prototypes to suppress; give a PRISM model")
    model.intervene(composed([model.factors, dict.fromkeys(given or [], 1.0)]))  # refuses ids it does not have
    shown = np.array([behaviour.present(text) for text in examples])
    spans = [behaviour.spans(text) if present else [] for text, present in zip(examples, shown, strict=True)]
    pieces = passages(examples, spans, tokenizer, model.config.context_length)
    marked = sum(int(piece.marked_T.sum()) for piece in pieces)
    if marked < LEAST_MARKED and given is None:
        raise UserError(
            f"{behaviour.name!r} is {marked} tokens of {len(examples)} texts, {LEAST_MARKED} are needed to find its"
            " prototypes: give other words, or more texts by --documents"
        )
    if shown.all():
        raise UserError(
            f"all {len(examples)} texts show {behaviour.name!r}: there is none to keep; choose narrower words"
        )
    effects = removal_effects(model, pieces, shown, progress)
    ranked = effects.ranked() if given is None else given
    dead = [number for number in ranked if not effects.usage_K[number]]
    if dead:
        raise UserError(
            f"prototype {dead[0]} is dead: it is active in none of {effects.usage_K.sum():,} places; leave it out"
        )
    if not ranked:
        raise UserError(f"no prototype works for {behaviour.name!r} beyond doubt: give more texts by --documents")
    half = len(held_out) // 2
    first, second = (
        Trial(model, tokenizer, behaviour, texts, plan.count, plan.sampling)
        for texts in (held_out[:half], held_out[half:])
    )
    if given is None:
        path = prototype_path(first, ranked, plan.factor, plan.goal, report)
        best = chosen(path, plan.goal)
        factors = dict.fromkeys(ranked[: best.prototypes], plan.factor)
    else:
        factors = dict.fromkeys(given, plan.factor)
        path = [first.scaled(f"{len(given)} prototypes", factors)]
        report(path[0])
    biases = bias_path(first, plan.goal, report)
    fresh = [second.plain, second.scaled("suppressed", factors)]
    bias = chosen(biases, plan.goal).settings["bias"]
    fresh.append(second.biased(f"words biased by {bias:g}", WordBias.of(behaviour.words, tokenizer, bias)))
    generator = np.random.default_rng(plan.sampling.seed)
    for number in range(plan.draws):
        others = of_equal_usage(list(factors), effects.usage_K, generator)
        fresh.append(second.scaled(f"random {number + 1}", dict.fromkeys(others, plan.factor)))
        report(fresh[-1])
    return Suppression(behaviour.name, behaviour.notes, effects, ranked, path, biases, factors, fresh, plan)
