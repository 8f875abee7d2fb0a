"""Suppression: how many of the ranked prototypes, chosen on one set of texts, and what that does on another.

Shapes: G texts without the behaviour, K prototypes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice, takewhile
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from prism_lightning.errors import UserError
from prism_lightning.evaluation.results import normal_interval
from prism_lightning.interventions.behaviours import Behaviour, passages
from prism_lightning.interventions.continuing import (
    Counted,
    Sampling,
    WordBias,
    continuations_of,
    counted,
    prompts,
)
from prism_lightning.interventions.states import batches, text_losses
from prism_lightning.models import PrismForCausalLM
from prism_lightning.models.steering import Scaling

LADDER = [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512]
BIASES = [1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 100.0]
NEIGHBOURS = 20  # prototypes of nearest usage that a random one is drawn from
DRAWS = 2000  # of the bootstrap
CLEAN_TEXTS = 500  # whose perplexity is measured, at most


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


class Trial:
    """A model, a behaviour and a set of texts: their beginnings are prompts, those without it measure the cost.

    Args:
        model, tokenizer: as exported.
        behaviour: to be suppressed.
        texts: held out.
        count: prompts at most.
        sampling: of the continuations.

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
    ) -> None:
        self.model, self.tokenizer, self.behaviour, self.sampling = model, tokenizer, behaviour, sampling
        self.prompts = prompts(texts, tokenizer, sampling, count)
        clean = list(islice((text for text in texts if not behaviour.present(text)), CLEAN_TEXTS))
        if not self.prompts or not clean:
            what = f"longer than {sampling.prompt_tokens} tokens" if clean else "without the behaviour"
            raise UserError(
                f"none of {len(texts)} held-out texts is {what}: nothing to measure on; choose narrower words"
            )
        self.texts = len(clean)
        pieces = passages(clean, [[] for _ in clean], tokenizer, model.config.context_length)
        self.clean = list(batches(model, pieces))  # hidden states: they are the same whatever is scaled
        self.losses_G, self.tokens_G = text_losses(model, self.clean, self.texts)
        counts = self._counted(self._continued())
        self.plain_shown = np.array(counts.shown, dtype=float)
        self.plain = self._measured("as it is", counts, self.losses_G, 0, {})
        if not self.plain.counts.rate:
            raise UserError(
                f"the model never shows {behaviour.name!r} in {len(self.prompts)} continuations of"
                f" {sampling.new_tokens} tokens: there is nothing to suppress; try other words or --new_tokens"
            )

    def scaled(self, name: str, scaling: Scaling) -> Measured:
        """With prototypes scaled."""
        with scaled(self.model, scaling):
            new = self._continued()
            losses_G, _ = text_losses(self.model, self.clean, self.texts)
        settings = {"factors": {str(i): f for i, f in scaling.factors.items()}, "tokens": scaling.tokens}
        return self._measured(name, self._counted(new), losses_G, len(scaling.factors), settings)

    def biased(self, name: str, bias: WordBias) -> Measured:
        """With the logits of words biased."""
        losses_G, _ = text_losses(self.model, self.clean, self.texts, bias.processor())
        return self._measured(name, self._counted(self._continued(bias)), losses_G, 0, {"bias": bias.bias})

    def _continued(self, bias: WordBias | None = None) -> list[list[int]]:
        return continuations_of(self.model, self.prompts, self.sampling, bias)

    def _counted(self, new: list[list[int]]) -> Counted:
        return counted(self.model, self.prompts, new, self.behaviour, self.tokenizer)

    def _measured(
        self, name: str, counts: Counted, losses_G: np.ndarray, prototypes: int, settings: dict[str, Any]
    ) -> Measured:
        plain, shown = self.plain_shown, np.array(counts.shown, dtype=float)
        draws = np.random.default_rng(0).integers(0, len(shown), (DRAWS, len(shown)))
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


def prototype_path(
    trial: Trial,
    ranked: list[int],
    counts: list[int],
    factor: float,
    tokens: tuple[int, ...] | None,
    goal: Goal,
    report: Callable[[Measured], None],
) -> list[Measured]:
    """More and more of the ranked prototypes, until the goal is surely met or the cost is far over it."""
    path: list[Measured] = []
    where = "" if tokens is None else f" in {len(tokens)} logits"
    for count in counts:
        scaling = Scaling(dict.fromkeys(ranked[:count], factor), tokens)
        path.append(trial.scaled(f"{count} prototypes{where}", scaling))
        report(path[-1])
        if path[-1].surely_meets(goal) or path[-1].rise > 3 * goal.rise:
            break
    return path


def bias_path(trial: Trial, words: WordBias, goal: Goal, report: Callable[[Measured], None]) -> list[Measured]:
    """Stronger and stronger biases against the behaviour's words, until the goal is surely met."""
    path: list[Measured] = []
    for strength in BIASES:
        path.append(trial.biased(f"words biased by {-strength:g}", replace(words, bias=-strength)))
        report(path[-1])
        if path[-1].surely_meets(goal):
            break
    return path


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
