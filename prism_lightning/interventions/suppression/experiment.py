"""The work behind `suppress`: rank, choose on one half of the held-out texts, compare with rivals on the other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from prism_lightning.common.errors import UserError
from prism_lightning.interventions.suppression.behaviours import Behaviour, Passage, passages
from prism_lightning.interventions.suppression.conditions import ScaledPrototypes
from prism_lightning.interventions.suppression.continuations import Report, Sampling
from prism_lightning.interventions.suppression.ranking import Effects, removal_effects
from prism_lightning.interventions.suppression.selection import (
    BIASES,
    Goal,
    Measured,
    Progress,
    Stage,
    Trial,
    chosen,
    counts_up_to,
    fewest,
    narrow_enough,
    of_equal_usage,
)
from prism_lightning.models import PrismForCausalLM
from prism_lightning.models.continuation import check_length
from prism_lightning.models.steering import Scaling, check

LEAST_MARKED = 20  # tokens of the behaviour, for a ranking


@dataclass
class Plan:
    """What is done, beside the behaviour.

    Attributes:
        goal: that the number of prototypes is chosen by.
        factor: given to each.
        count: prompts on either half of the held-out texts.
        draws: of random prototypes of equal usage, at most.
        sampling: of continuations.
    """

    goal: Goal = field(default_factory=Goal)
    factor: float = 0.0
    count: int = 400
    draws: int = 20
    sampling: Sampling = field(default_factory=Sampling)


@dataclass
class Attempt:
    """Prototypes removed from the logits of all tokens, or of the behaviour's alone.

    Attributes:
        tokens: whose logits; None: all.
        effects: of removing each prototype alone, on the ranking's texts.
        ranked: candidates, best first; those given by hand, in their order.
        path: what was tried on the first half of the held-out texts.
        chosen: of the path.
        factors: of its prototypes.
        fresh: what they do on the second half.
    """

    tokens: tuple[int, ...] | None
    effects: Effects
    ranked: list[int]
    path: list[Measured]
    chosen: Measured
    factors: dict[int, float]
    fresh: Measured

    @property
    def scaling(self) -> Scaling:
        """Of the intervention."""
        return Scaling(self.factors, self.tokens)

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON; effects of the candidates alone."""
        columns = ("work_K", "work_error_K", "cost_K", "cost_error_K", "usage_K")
        effects = {name.removesuffix("_K"): getattr(self.effects, name)[self.ranked].tolist() for name in columns}
        return {
            "tokens": self.tokens,
            "candidates": {"prototype": self.ranked} | effects,
            "behaviour_tokens": self.effects.marked,
            "other_tokens": self.effects.others,
            "path": [measured.as_dict() for measured in self.path],
            "factors": {str(i): factor for i, factor in self.factors.items()},
            "fresh": self.fresh.as_dict(),
        }


@dataclass
class Suppression:
    """What was found.

    Attributes:
        behaviour, notes: its name, and what the reader should know of it.
        attempts: the last one tried is not always the one that is kept.
        kept: the attempt whose scaling is the intervention.
        biases: strengths of the words' bias tried on the first half of the held-out texts.
        plain, biased, draws: on the second half, beside the attempts' `fresh`: the model as it is, the words' bias
            chosen alike, and random prototypes in place of the kept ones.
        plan: what was asked.
    """

    behaviour: str
    notes: list[str]
    attempts: list[Attempt]
    kept: Attempt
    biases: list[Measured]
    plain: Measured
    biased: Measured
    draws: list[Measured]
    plan: Plan

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "behaviour": self.behaviour,
            "notes": self.notes,
            "plan": asdict(self.plan),
            "attempts": [attempt.as_dict() for attempt in self.attempts],
            "kept": self.attempts.index(self.kept),
            "biases": [measured.as_dict() for measured in self.biases],
            "plain": self.plain.as_dict(),
            "biased": self.biased.as_dict(),
            "draws": [measured.as_dict() for measured in self.draws],
        }


@dataclass
class Texts:
    """Texts to rank on, as passages with the behaviour's tokens marked.

    Attributes:
        passages: of all texts.
        shown: [G], whether each text shows the behaviour.
    """

    passages: list[Passage]
    shown: np.ndarray

    @classmethod
    def of(
        cls,
        texts: list[str],
        labels: list[bool] | None,
        behaviour: Behaviour,
        tokenizer: PreTrainedTokenizerFast,
        length: int,
    ) -> Texts:
        """Mark texts.

        Raises:
            UserError: too few of the behaviour's tokens, or no text without it.
        """
        shown = np.array([behaviour.present(text) for text in texts] if labels is None else labels)
        spans = [behaviour.spans(text) if present else [] for text, present in zip(texts, shown, strict=True)]
        pieces = passages(texts, spans, tokenizer, length)
        marked = sum(int(piece.marked_T.sum()) for piece in pieces)
        if marked < LEAST_MARKED:
            raise UserError(
                f"{behaviour.name!r} is {marked} tokens of {len(texts)} texts, {LEAST_MARKED} are needed to see what"
                " prototypes do for it: give other words, or more texts by --tokens"
            )
        if shown.all():
            raise UserError(
                f"all {len(texts)} texts show {behaviour.name!r}: there is none to keep; choose narrower words"
            )
        return cls(pieces, shown)


def suppress(
    model: PrismForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    behaviour: Behaviour,
    texts: list[str],
    held_out: list[str],
    plan: Plan,
    given: list[int] | None = None,
    labels: list[bool] | None = None,
    progress: Progress = lambda *_: None,
    report: Callable[[Measured], None] = lambda _: None,
) -> Suppression:
    """Find, choose, compare.

    Prototypes are removed from all logits; where that misses the goal, from those of the behaviour's words alone.

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
    check([Scaling(dict.fromkeys(given or [], plan.factor))], model.config.num_prototypes, model.config.vocab_size)
    check_length(model, plan.sampling.prompt_tokens + plan.sampling.new_tokens)
    if len(held_out) < 2:
        raise UserError(f"{len(held_out)} validation documents: at least two are needed, to choose on and to judge on")
    marked = Texts.of(texts, labels, behaviour, tokenizer, model.config.context_length)
    order = np.random.default_rng(plan.sampling.seed).permutation(len(held_out)).tolist()
    first, second = (
        Trial(model, tokenizer, behaviour, [held_out[number] for number in half], plan.count, plan.sampling, progress)
        for half in (order[: len(order) // 2], order[len(order) // 2 :])
    )
    tokens = first.words.first_tokens()
    effects = removal_effects(model, marked.passages, marked.shown, progress, tokens)
    work = Work(first, second, plan, progress, report)
    attempts = [work.attempt(None, effects[0], given)]
    if not attempts[0].chosen.meets(plan.goal):
        attempts.append(work.attempt(tokens, effects[1], given))
    kept = max(attempts, key=lambda attempt: (attempt.chosen.rise <= plan.goal.rise, attempt.chosen.fall))
    biases, biased = work.bias()
    return Suppression(
        behaviour.name, behaviour.notes, attempts, kept, biases, second.plain, biased, work.draws(kept), plan
    )


@dataclass
class Work:
    """The choice on one half of the held-out texts, and the comparison on the other."""

    first: Trial
    second: Trial
    plan: Plan
    progress: Progress
    report: Callable[[Measured], None]

    def attempt(self, tokens: tuple[int, ...] | None, effects: Effects, given: list[int] | None) -> Attempt:
        """Choose among ranked prototypes, or take those given, and judge.

        Raises:
            UserError: dead prototypes given, or none that surely works.
        """
        # Taken from some logits alone a prototype that does nothing costs nothing: doubtful ones are welcome there.
        ranked = effects.ranked(surely=tokens is None) if given is None else list(dict.fromkeys(given))
        dead = [number for number in ranked if not effects.usage_K[number]]
        if dead:
            raise UserError(f"prototype {dead[0]} is dead: no token of the ranking's texts uses it; leave it out")
        if not ranked:
            raise UserError(f"no prototype surely works for {self.first.behaviour.name!r}: give more texts by --tokens")
        factor, where = self.plan.factor, "" if tokens is None else f" in {len(tokens)} logits"

        def scaling(count: int) -> Scaling:
            return Scaling(dict.fromkeys(ranked[:count], factor), tokens)

        path = fewest(
            counts_up_to(len(ranked)) if given is None else [len(ranked)],
            lambda count: self.first.rise(ScaledPrototypes(self.first.model, scaling(count))),
            lambda count, share: self._told(self.first.scaled(f"{count} prototypes{where}", scaling(count), share)),
            self.plan.goal,
            self._stage(self.first, "choosing the number of prototypes"),
        )
        best = chosen(path, self.plan.goal)
        name = f"x {factor:g} in {'all' if tokens is None else len(tokens)} logits"
        share = self._stage(self.second, "judging on other prompts")(1).next()
        fresh = self._told(self.second.scaled(name, scaling(best.prototypes), share))
        return Attempt(tokens, effects, ranked, path, best, scaling(best.prototypes).factors, fresh)

    def bias(self) -> tuple[list[Measured], Measured]:
        """The words' bias, chosen alike: what was tried, and what it does on the other half."""

        def named(trial: Trial, strength: float, share: Report) -> Measured:
            return self._told(trial.biased(f"words biased by {-strength:g}", strength, share))

        path = fewest(
            BIASES,
            lambda strength: self.first.rise(self.first.bias(strength)),
            lambda strength, share: named(self.first, strength, share),
            self.plan.goal,
            self._stage(self.first, "choosing the words' bias"),
        )
        strength = -chosen(path, self.plan.goal).settings["bias"]
        return path, named(self.second, strength, self._stage(self.second, "judging on other prompts")(1).next())

    def draws(self, kept: Attempt) -> list[Measured]:
        """Random other prototypes, used as often, until the interval of their mean fall is narrow enough."""
        generator, draws = np.random.default_rng(self.plan.sampling.seed), []
        stage = self._stage(self.second, "scaling random prototypes")(self.plan.draws)
        for number in range(self.plan.draws):
            others = of_equal_usage(list(kept.factors), kept.effects.usage_K, generator)
            scaling = Scaling(dict.fromkeys(others, self.plan.factor), kept.tokens)
            draws.append(self._told(self.second.scaled(f"random {number + 1}", scaling, stage.next())))
            if narrow_enough(draws, self.plan.draws, self.plan.goal):
                break
        stage.finish()
        return draws

    def _told(self, measured: Measured) -> Measured:
        self.report(measured)
        return measured

    def _stage(self, trial: Trial, what: str) -> Callable[[int], Stage]:
        return lambda count: Stage(self.progress, what, len(trial.prompts), count)
