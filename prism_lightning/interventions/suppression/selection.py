"""Suppression: how many of the ranked prototypes, chosen on one set of texts, and what that does on another.

Shapes: G texts without the behaviour, K prototypes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import Any, TypeVar

import numpy as np
from scipy import stats
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from prism_lightning.common.errors import UserError
from prism_lightning.evaluation.results import normal_interval
from prism_lightning.interventions.hidden_states import batches
from prism_lightning.interventions.suppression.behaviours import Behaviour, Passage, passages
from prism_lightning.interventions.suppression.conditions import (
    BiasedWords,
    Condition,
    Reading,
    ScaledPrototypes,
    WordBias,
    read,
)
from prism_lightning.interventions.suppression.continuations import (
    Continuer,
    Counted,
    Report,
    Sampling,
    counted,
    prompts,
)
from prism_lightning.models import PrismForCausalLM
from prism_lightning.models.steering import Scaling

LADDER = [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512]
BIASES = [1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 100.0]
NEIGHBOURS = 20  # prototypes of nearest usage that a random one is drawn from
RESAMPLES = 2000  # of the bootstrap
CLEAN_TEXTS = 500  # whose perplexity is measured, at most
LOOK = 4  # random draws between two looks at the interval of their mean
Progress = Callable[[str, int, int], None]  # what is done, how much of it, of how much


@dataclass
class Goal:
    """Fall of the behaviour's rate and rise of perplexity elsewhere, both relative."""

    fall: float = 0.8
    rise: float = 0.02


@dataclass
class Measured:
    """One way of suppressing, on one set of texts.

    Attributes:
        name: for tables.
        prototypes: how many are scaled.
        counts: of its continuations.
        fall, fall_interval: 1 - its rate / the plain model's; 95 % from a bootstrap over prompts.
        rise, rise_interval: of the perplexity of texts without the behaviour; 95 %, normal over texts.
        perplexity: of these.
    """

    name: str
    prototypes: int
    counts: Counted
    fall: float
    fall_interval: tuple[float, float]
    rise: float
    rise_interval: tuple[float, float]
    perplexity: float
    settings: dict[str, Any] = field(default_factory=dict)

    def meets(self, goal: Goal) -> bool:
        """Whether both are as good as asked for."""
        return self.fall >= goal.fall and self.rise <= goal.rise

    def surely_meets(self, goal: Goal) -> bool:
        """Whether the fall is so at the lower end of its interval: what just meets a goal here misses it elsewhere."""
        return self.fall_interval[0] >= goal.fall and self.rise <= goal.rise

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return self.__dict__ | {"counts": self.counts.as_dict()}


@contextmanager
def scaled(model: PrismForCausalLM, scaling: Scaling) -> Iterator[None]:
    """The model with a scaling on top of its own, and afterwards with its own."""
    before = model.scalings
    model.intervene(*before, scaling)
    try:
        yield
    finally:
        model.intervene(*before)


class Stage:
    """Progress of several measurements in turn, in prompts.

    Args:
        progress: what is done, how much of it, of how much.
        what: is done.
        prompts: of each measurement.
        count: measurements at most.
    """

    def __init__(self, progress: Progress, what: str, prompts: int, count: int) -> None:
        self.progress, self.what, self.prompts, self.total = progress, what, prompts, prompts * count
        self.begun, self.done = -prompts, -1

    def next(self) -> Report:
        """What the next measurement reports its share to."""
        self.begun += self.prompts
        begun = self.begun
        return lambda share: self._show(min(begun + int(share * self.prompts), self.total))

    def finish(self) -> None:
        """There are no more, although there could have been."""
        self._show(self.total)

    def _show(self, done: int) -> None:
        if done > self.done:
            self.done = done
            self.progress(self.what, done, self.total)


class Trial:
    """A model, a behaviour and a set of texts: their beginnings are prompts, those without it measure the cost.

    Args:
        model, tokenizer: as exported.
        behaviour: to be suppressed.
        texts: held out.
        count: prompts at most.
        sampling: of the continuations.
        progress: hears of texts read and prompts continued.

    Raises:
        UserError: the plain model never shows the behaviour, or all texts show it.
    """

    def __init__(
        self,
        model: PrismForCausalLM,
        tokenizer: PreTrainedTokenizerFast,
        behaviour: Behaviour,
        texts: list[str],
        count: int,
        sampling: Sampling,
        progress: Progress = lambda *_: None,
    ) -> None:
        self.model, self.tokenizer, self.behaviour, self.sampling = model, tokenizer, behaviour, sampling
        self.words = WordBias.of(behaviour.words, tokenizer, 0.0)
        self.prompts = prompts(texts, tokenizer, sampling, count)
        shown = behaviour.shown_by(texts)
        clean = [text for text, present in zip(texts, shown, strict=True) if not present][:CLEAN_TEXTS]
        if not self.prompts or not clean:
            what = f"longer than {sampling.prompt_tokens} tokens" if clean else "without the behaviour"
            raise UserError(
                f"none of {len(texts)} held-out texts is {what}: nothing to measure on; choose narrower words"
            )
        pieces = passages(clean, [[] for _ in clean], tokenizer, model.config.context_length)
        self.clean = self._read(pieces, progress)
        self.losses_G = self._text_sums([reading.losses_N for reading in self.clean], len(clean))
        self.tokens_G = np.bincount(np.concatenate([r.states.text_N for r in self.clean]), minlength=len(clean))
        stage = Stage(progress, "continuing prompts", len(self.prompts), 1)
        self.continuer = Continuer(model, self.prompts, sampling, stage.next())
        counts = counted(self.continuer.plain, behaviour, tokenizer)
        self.plain_shown = np.array(counts.shown, dtype=float)
        self.plain = self._measured("as it is", counts, self.losses_G, 0, {})
        if not self.plain.counts.rate:
            raise UserError(
                f"the model never shows {behaviour.name!r} in {len(self.prompts)} continuations of"
                f" {sampling.new_tokens} tokens: there is nothing to suppress; try other words or --new_tokens"
            )

    def scaled(self, name: str, scaling: Scaling, report: Report = lambda _: None) -> Measured:
        """With prototypes scaled."""
        settings = {"factors": {str(i): f for i, f in scaling.factors.items()}, "tokens": scaling.tokens}
        condition = ScaledPrototypes(self.model, scaling)
        return self._under(condition, name, len(scaling.factors), settings, report)

    def biased(self, name: str, strength: float, report: Report = lambda _: None) -> Measured:
        """With the logits of the behaviour's words lowered by so much."""
        return self._under(self.bias(strength), name, 0, {"bias": -strength}, report)

    def bias(self, strength: float) -> Condition:
        """The behaviour's words lowered by so much."""
        return BiasedWords(self.model, replace(self.words, bias=-strength))

    def rise(self, condition: Condition) -> float:
        """By what share perplexity of texts without the behaviour rises; much faster than continuing the prompts."""
        return float(np.expm1((self._losses(condition) - self.losses_G).sum() / self.tokens_G.sum()))

    def _under(
        self, condition: Condition, name: str, prototypes: int, settings: dict[str, Any], report: Report
    ) -> Measured:
        counts = counted(self.continuer.under(condition, report), self.behaviour, self.tokenizer)
        return self._measured(name, counts, self._losses(condition), prototypes, settings)

    def _losses(self, condition: Condition) -> np.ndarray:
        return self._text_sums([condition.losses(reading) for reading in self.clean], len(self.losses_G))

    def _read(self, pieces: list[Passage], progress: Progress) -> list[Reading]:
        readings: list[Reading] = []
        done, total = 0, sum(len(piece.marked_T) for piece in pieces)
        for states in batches(self.model, pieces):
            readings.append(read(self.model, states, self.words))
            done += len(states.text_N)
            progress("reading held-out texts", done, total)
        return readings

    def _text_sums(self, parts: list[Tensor], texts: int) -> np.ndarray:
        sums_G = np.zeros(texts)
        for reading, losses_N in zip(self.clean, parts, strict=True):
            sums_G += np.bincount(reading.states.text_N, losses_N.cpu().numpy(), texts)
        return sums_G

    def _measured(
        self, name: str, counts: Counted, losses_G: np.ndarray, prototypes: int, settings: dict[str, Any]
    ) -> Measured:
        plain, shown = self.plain_shown, np.array(counts.shown, dtype=float)
        draws = np.random.default_rng(0).integers(0, len(shown), (RESAMPLES, len(shown)))
        rates, plain_rates = shown[draws].mean(1), np.maximum(plain[draws].mean(1), 1 / len(shown))
        low, high = np.quantile(1 - rates / plain_rates, [0.025, 0.975])
        if not shown.any():  # then every draw falls by everything: what the rate may be bounds it
            low = min(low, 1 - counts.interval[1] / max(plain.mean(), 1 / len(plain)))
        total = self.tokens_G.sum()
        per_token = (losses_G - self.losses_G).sum() / total
        error = math.sqrt(((losses_G - self.losses_G - per_token * self.tokens_G) ** 2).sum()) / total
        low_rise, high_rise = normal_interval(per_token, error)
        return Measured(
            name=name,
            prototypes=prototypes,
            counts=counts,
            fall=float(1 - shown.mean() / max(plain.mean(), 1 / len(plain))),
            fall_interval=(float(low), float(high)),
            rise=float(np.expm1(per_token)),
            rise_interval=(float(np.expm1(low_rise)), float(np.expm1(high_rise))),
            perplexity=float(np.exp(losses_G.sum() / total)),
            settings=settings,
        )


def chosen(path: list[Measured], goal: Goal) -> Measured:
    """The first that surely meets the goal; otherwise, of those that cost no more, the one with the largest fall."""
    sure = next((measured for measured in path if measured.surely_meets(goal)), None)
    affordable = [measured for measured in path if measured.rise <= goal.rise] or path[:1]
    return sure or max(affordable, key=lambda measured: measured.fall)


def counts_up_to(candidates: int) -> list[int]:
    """Numbers of prototypes to try."""
    return [*takewhile(lambda size: size < candidates, LADDER), candidates]


Level = TypeVar("Level", int, float)


def fewest(
    levels: list[Level],
    rise: Callable[[Level], float],
    measure: Callable[[Level, Report], Measured],
    goal: Goal,
    stage: Callable[[int], Stage],
) -> list[Measured]:
    """Measure some levels of a ladder: the highest whose cost is within the goal, and down from there by bisection.

    The cost of levels is looked up from the lowest on, up to the first beyond the goal, since that takes no
    continuations. Bisection looks for the lowest level that surely meets the goal or, if the highest one does not,
    that falls as much as it. It takes the fall to grow with the level; a level that is chosen was itself measured.

    Args:
        levels: ascending.
        rise: of perplexity elsewhere.
        measure: both.
        goal: for fall and rise.
        stage: of so many measurements at most.

    Returns:
        What was measured, in the order of levels.
    """
    within = list(takewhile(lambda level: rise(level) <= goal.rise, levels)) or levels[:1]
    low, high = -1, len(within) - 1  # `high` is as good as asked for, `low` is not
    steps = stage(1 + high.bit_length())
    top = measure(within[high], steps.next())
    measured = {high: top}
    while high - low > 1:
        middle = (low + high) // 2
        measured[middle] = measure(within[middle], steps.next())
        enough = measured[middle].surely_meets(goal) if top.surely_meets(goal) else measured[middle].fall >= top.fall
        low, high = (low, middle) if enough else (middle, high)
    steps.finish()
    return [measured[number] for number in sorted(measured)]


def looks(draws: int) -> int:
    """How often the interval of the mean is looked at, when so many draws are planned at most."""
    return max(1, math.ceil(draws / LOOK))


def mean_interval(values: list[float], draws: int) -> tuple[float, float]:
    """95 % of the mean over random draws, also when drawing stopped early because this interval was narrow.

    Student's t, with the 5 % shared out among all looks that were planned (Bonferroni): so all of them cover the mean
    at once in 95 % of cases, and the one that drawing stopped at is among them. One draw has no interval.
    """
    if len(values) < 2:
        return -math.inf, math.inf
    half = stats.t.isf(0.025 / looks(draws), len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values))
    return float(np.mean(values) - half), float(np.mean(values) + half)


def narrow_enough(draws: list[Measured], planned: int, goal: Goal) -> bool:
    """Whether the interval of the mean fall is within a tenth of the goal to either side, at one of the looks."""
    if len(draws) % LOOK:
        return False
    low, high = mean_interval([draw.fall for draw in draws], planned)
    return (high - low) / 2 <= goal.fall / 10


def of_equal_usage(prototypes: list[int], usage_K: np.ndarray, generator: np.random.Generator) -> list[int]:
    """Random other prototypes, each used about as often as the one it stands for; fewer where there are no more."""
    order = np.argsort(usage_K, kind="stable")
    place_K = np.argsort(order)
    free_K, drawn = np.ones(len(order), dtype=bool), []
    free_K[prototypes] = False
    for prototype in prototypes:
        others = order[free_K[order]]
        if not len(others):
            break
        distance = np.abs(place_K[others] - place_K[prototype])
        drawn.append(int(generator.choice(others[np.argsort(distance, kind="stable")[:NEIGHBOURS]])))
        free_K[drawn[-1]] = False
    return drawn
