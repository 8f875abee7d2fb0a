"""Measurements of conditions: the behaviour's rate in continuations, and perplexity on texts without it.

Shapes: B prompts, G texts without the behaviour.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from prism_lightning.common.errors import UserError
from prism_lightning.interventions.suppression.behaviours import Behaviour
from prism_lightning.interventions.suppression.conditions import BiasedWords, Condition, ScaledPrototypes, WordBias
from prism_lightning.interventions.suppression.continuation_stats import ContinuationStats, measure_continuations
from prism_lightning.interventions.suppression.continuations import Continuer, prompts
from prism_lightning.interventions.suppression.progress import MeasurementProgress, Progress, ShareProgress
from prism_lightning.interventions.suppression.reference_texts import ReferenceTexts
from prism_lightning.interventions.suppression.settings import Goal, Sampling
from prism_lightning.models import PrismForCausalLM
from prism_lightning.models.steering import Scaling

RESAMPLES = 2000  # of the bootstrap over prompts
REFERENCE_TEXTS = 500  # largest number of texts whose perplexity is measured
PLAIN_NAME = "unchanged"  # of the plain model's measurement


def quantity(count: int, noun: str) -> str:
    """Return a number with its noun, such as "1 prototype" and "3 prototypes"."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def logits_name(tokens: tuple[int, ...] | None) -> str:
    """Return the name of the logits that a scaling changes, such as "all logits"."""
    return "all logits" if tokens is None else f"the words' {quantity(len(tokens), 'logit')}"


@dataclass
class Measurement:
    """One condition, measured on one set of texts.

    Attributes:
        name: Name of the condition, for tables.
        prototypes: Number of scaled prototypes.
        stats: Statistics of its continuations.
        rate_reduction: 1 - the behaviour's rate / the plain model's rate.
        rate_reduction_interval: Its 95 % interval, from a bootstrap over prompts.
        perplexity_increase: Relative increase of perplexity on texts without the behaviour.
        perplexity_increase_interval: Its 95 % interval, normal over texts.
        perplexity: Perplexity of these texts.
        settings: The condition as plain data.
    """

    name: str
    prototypes: int
    stats: ContinuationStats
    rate_reduction: float
    rate_reduction_interval: tuple[float, float]
    perplexity_increase: float
    perplexity_increase_interval: tuple[float, float]
    perplexity: float
    settings: dict[str, Any] = field(default_factory=dict)

    def meets(self, goal: Goal) -> bool:
        """Return whether the estimates are within the goal."""
        return (
            self.rate_reduction >= goal.min_rate_reduction and self.perplexity_increase <= goal.max_perplexity_increase
        )

    def surely_meets(self, goal: Goal) -> bool:
        """Return whether the goal is met even at the lower end of the rate reduction's interval.

        A measurement that only just meets a goal here would miss it on other texts.
        """
        return (
            self.rate_reduction_interval[0] >= goal.min_rate_reduction
            and self.perplexity_increase <= goal.max_perplexity_increase
        )

    def as_dict(self) -> dict[str, Any]:
        """Return plain data for JSON, with the keys of the file format."""
        return {
            "name": self.name,
            "prototypes": self.prototypes,
            "counts": self.stats.as_dict(),
            "fall": self.rate_reduction,
            "fall_interval": self.rate_reduction_interval,
            "rise": self.perplexity_increase,
            "rise_interval": self.perplexity_increase_interval,
            "perplexity": self.perplexity,
            "settings": self.settings,
        }


class ConditionMeasurements:
    """Measures conditions of one model and behaviour on one set of held-out texts.

    The beginnings of the texts are the prompts; the texts without the behaviour give the perplexity.

    Args:
        model: A PRISM model.
        tokenizer: Its tokenizer.
        behaviour: The behaviour to be suppressed.
        texts: Held-out texts.
        prompt_count: Largest number of prompts.
        sampling: Settings of the continuations.
        progress: Receives the texts read and the prompts continued.

    Raises:
        UserError: there is nothing to measure on, or the plain model never shows the behaviour.
    """

    def __init__(
        self,
        model: PrismForCausalLM,
        tokenizer: PreTrainedTokenizerFast,
        behaviour: Behaviour,
        texts: list[str],
        prompt_count: int,
        sampling: Sampling,
        progress: Progress = lambda *_: None,
    ) -> None:
        self.model, self.tokenizer, self.behaviour = model, tokenizer, behaviour
        self.words = WordBias.of(behaviour.words, tokenizer, 0.0)
        self.prompts = prompts(texts, tokenizer, sampling, prompt_count)
        clean = [text for text, shows in zip(texts, behaviour.shown_by(texts), strict=True) if not shows]
        if not self.prompts or not clean:
            missing = f"longer than {sampling.prompt_tokens} tokens" if clean else "without the behaviour"
            raise UserError(
                f"none of {len(texts)} held-out texts is {missing}: nothing to measure on; choose narrower words"
            )
        self.reference = ReferenceTexts(model, tokenizer, clean[:REFERENCE_TEXTS], self.words, progress)
        continuing = MeasurementProgress(progress, "continuing prompts", len(self.prompts), 1)
        self.continuer = Continuer(model, self.prompts, sampling, continuing.next())
        stats = measure_continuations(self.continuer.plain, behaviour, tokenizer)
        self.plain_shows_B = np.array(stats.shows_behaviour, dtype=float)
        self.plain = self._measurement(PLAIN_NAME, stats, self.reference.losses_G, 0, {})
        if not stats.rate:
            raise UserError(
                f"the model never shows {behaviour.name!r} in {len(self.prompts)} continuations of"
                f" {sampling.new_tokens} tokens: there is nothing to suppress; try other words or --new_tokens"
            )

    def scaled(self, name: str, scaling: Scaling, report: ShareProgress = lambda _: None) -> Measurement:
        """Measure scaled prototypes."""
        settings = {"factors": {str(i): f for i, f in scaling.factors.items()}, "tokens": scaling.tokens}
        condition = ScaledPrototypes(self.model, scaling)
        return self._under(condition, name, len(scaling.factors), settings, report)

    def biased(self, name: str, strength: float, report: ShareProgress = lambda _: None) -> Measurement:
        """Measure the bias that lowers the logits of the behaviour's words by `strength`."""
        return self._under(self.bias(strength), name, 0, {"bias": -strength}, report)

    def bias(self, strength: float) -> Condition:
        """Return the condition that lowers the logits of the behaviour's words by `strength`."""
        return BiasedWords(self.model, replace(self.words, bias=-strength))

    def perplexity_increase(self, condition: Condition) -> float:
        """Return the relative increase of perplexity alone; it is much faster than continuing the prompts."""
        return self.reference.perplexity_increase(self.reference.losses(condition))

    def _under(
        self, condition: Condition, name: str, prototypes: int, settings: dict[str, Any], report: ShareProgress
    ) -> Measurement:
        continuations = self.continuer.under(condition, report)
        stats = measure_continuations(continuations, self.behaviour, self.tokenizer)
        return self._measurement(name, stats, self.reference.losses(condition), prototypes, settings)

    def _measurement(
        self, name: str, stats: ContinuationStats, losses_G: np.ndarray, prototypes: int, settings: dict[str, Any]
    ) -> Measurement:
        plain_rate = max(self.plain_shows_B.mean(), 1 / len(self.plain_shows_B))
        return Measurement(
            name=name,
            prototypes=prototypes,
            stats=stats,
            rate_reduction=float(1 - np.mean(np.array(stats.shows_behaviour, dtype=float)) / plain_rate),
            rate_reduction_interval=_rate_reduction_interval(stats, self.plain_shows_B),
            perplexity_increase=self.reference.perplexity_increase(losses_G),
            perplexity_increase_interval=self.reference.increase_interval(losses_G),
            perplexity=self.reference.perplexity(losses_G),
            settings=settings,
        )


def _rate_reduction_interval(stats: ContinuationStats, plain_B: np.ndarray) -> tuple[float, float]:
    """Return the 95 % interval of 1 - rate / plain rate, from a paired bootstrap over prompts."""
    shows_B = np.array(stats.shows_behaviour, dtype=float)
    count = len(shows_B)
    resampled = np.random.default_rng(0).integers(0, count, (RESAMPLES, count))
    rates, plain_rates = shows_B[resampled].mean(1), np.maximum(plain_B[resampled].mean(1), 1 / count)
    low, high = np.quantile(1 - rates / plain_rates, [0.025, 0.975])
    if not shows_B.any():  # every resample then has a reduction of 1, so Wilson's upper end of the rate bounds it
        low = min(low, 1 - stats.interval[1] / max(plain_B.mean(), 1 / count))
    return float(low), float(high)
