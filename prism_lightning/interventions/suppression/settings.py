"""Settings of a suppression experiment. The module imports nothing heavy: the command line is generated from it."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Goal:
    """What a suppression has to reach.

    Attributes:
        min_rate_reduction: Smallest relative reduction of the behaviour's rate.
        max_perplexity_increase: Largest relative increase of perplexity on texts without the behaviour.
    """

    min_rate_reduction: float
    max_perplexity_increase: float


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How prompts are continued.

    Attributes:
        prompt_tokens: Number of tokens of a prompt.
        new_tokens: Largest number of tokens of a continuation.
        temperature: Temperature of the sampling.
        seed: Seed of the sampling.
    """

    prompt_tokens: int = 16
    new_tokens: int
    temperature: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class BehaviourSource:
    """Where the behaviour is defined and, optionally, which prototypes to suppress for it.

    Attributes:
        words: Words that define the behaviour: a text shows it if it contains any of them.
        with_texts: File of example texts that show the behaviour; --without_texts is needed, too.
        without_texts: File of example texts that do not show the behaviour; --with_texts is needed, too.
        id: Numbers of prototypes to suppress instead of ranked ones; --words defines the behaviour to measure.
        label: Text in the labels of prototypes to suppress instead of ranked ones; --words defines the behaviour to
            measure.

    Raises:
        ValueError: the behaviour is not defined, or defined twice.
    """

    words: list[str] | None = None
    with_texts: Path | None = None
    without_texts: Path | None = None
    id: list[int] | None = None
    label: str | None = None

    def __post_init__(self) -> None:
        by_examples, by_hand = bool(self.with_texts or self.without_texts), bool(self.id or self.label)
        if by_examples and (by_hand or self.words or not (self.with_texts and self.without_texts)):
            raise ValueError("--with_texts and --without_texts go together, and without --words, --id and --label")
        if by_hand and not self.words:
            raise ValueError("--id and --label need --words: they define what to look for in the continuations")
        if not (by_examples or self.words):
            raise ValueError("say what to suppress: --words, --with_texts and --without_texts, --id or --label")


@dataclass(frozen=True)
class SuppressionSettings:
    """Settings of one suppression experiment, apart from the behaviour.

    Attributes:
        min_rate_reduction: Share of the behaviour's rate that the suppression must remove.
        max_perplexity_increase: Share by which perplexity of texts without the behaviour may increase.
        factor: Factor on the prototypes' terms in the logits; 0 removes them.
        tokens: Number of tokens of training documents that prototypes are ranked on.
        prompts: Number of prompts that are continued under each condition.
        new_tokens: Largest number of tokens of a continuation.
        draws: Largest number of random sets of prototypes to compare with; fewer are drawn once their mean is certain
            enough.
        seed: Seed of the continuations, of the division of held-out texts, and of the random sets.

    Raises:
        ValueError: a setting is out of its range.
    """

    min_rate_reduction: float = 0.8
    max_perplexity_increase: float = 0.02
    factor: float = 0.0
    tokens: int = 200_000
    prompts: int = 400
    new_tokens: int = 96
    draws: int = 20
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.min_rate_reduction <= 1:
            raise ValueError(
                "--min_rate_reduction must be above 0 and at most 1: it is a share of the behaviour's rate, 0.8 is 80 %"
            )
        for name in ("tokens", "prompts", "new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be a positive number")
        for name in ("draws", "max_perplexity_increase"):
            if not getattr(self, name) >= 0:  # nan is refused, too
                raise ValueError(f"--{name} must be at least 0")
        if not math.isfinite(self.factor):
            raise ValueError("--factor must be a finite number")

    @property
    def goal(self) -> Goal:
        """The goal that the number of prototypes is chosen by."""
        return Goal(self.min_rate_reduction, self.max_perplexity_increase)

    @property
    def sampling(self) -> Sampling:
        """How prompts are continued."""
        return Sampling(new_tokens=self.new_tokens, seed=self.seed)

    def as_dict(self) -> dict[str, Any]:
        """Return plain data for JSON, with the keys of the file format."""
        return {
            "goal": {"fall": self.min_rate_reduction, "rise": self.max_perplexity_increase},
            "factor": self.factor,
            "count": self.prompts,
            "draws": self.draws,
            "sampling": asdict(self.sampling),
        }
