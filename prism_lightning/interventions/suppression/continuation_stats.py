"""Statistics of continuations: the behaviour's rate, variety, repetition, and their loss under the plain model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from prism_lightning.common.statistics import rate_interval
from prism_lightning.interventions.suppression.behaviours import Behaviour
from prism_lightning.interventions.suppression.continuations import Continuations

REPEATED_TOKENS = 4  # tokens of a run whose repetition is measured


@dataclass
class ContinuationStats:
    """Statistics of a set of continuations.

    Attributes:
        shows_behaviour: Whether each continuation shows the behaviour.
        distinct: Share of different runs among all runs of 1, 2 and 3 tokens.
        repetition: Share of runs of four tokens that occurred before in the same continuation.
        plain_loss: Mean loss of a token in nats under the plain model, prompts included.
        tokens: Mean number of tokens of a continuation.
    """

    shows_behaviour: list[bool]
    distinct: dict[int, float]
    repetition: float
    plain_loss: float
    tokens: float

    @property
    def rate(self) -> float:
        """Share of continuations that show the behaviour."""
        return float(np.mean(self.shows_behaviour))

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval of the rate."""
        return rate_interval(sum(self.shows_behaviour), len(self.shows_behaviour))

    def as_dict(self) -> dict[str, Any]:
        """Return plain data for JSON, with the keys of the file format."""
        return {
            "shown": self.shows_behaviour,
            "distinct": self.distinct,
            "repetition": self.repetition,
            "plain_loss": self.plain_loss,
            "tokens": self.tokens,
            "rate": self.rate,
            "interval": self.interval,
        }


def measure_continuations(
    continuations: Continuations, behaviour: Behaviour, tokenizer: PreTrainedTokenizerFast
) -> ContinuationStats:
    """Return the statistics of the new text; the prompts count for the loss only."""
    ids = continuations.ids()
    runs = {size: [run for row in ids for run in runs_of(row, size)] for size in (1, 2, 3)}
    repetition_counts = [repetitions(row) for row in ids]
    all_runs = sum(total for _, total in repetition_counts)
    losses = torch.cat([continuations.prompt_losses_BP.flatten(), continuations.losses_BT[continuations.text_BT.cpu()]])
    return ContinuationStats(
        shows_behaviour=behaviour.shown_by([str(text) for text in tokenizer.batch_decode(ids)]),
        distinct={size: len(set(all_of_size)) / max(1, len(all_of_size)) for size, all_of_size in runs.items()},
        repetition=sum(repeated for repeated, _ in repetition_counts) / max(1, all_runs),
        plain_loss=float(losses.double().mean()),
        tokens=float(np.mean([len(row) for row in ids])),
    )


def runs_of(ids: list[int], size: int) -> list[tuple[int, ...]]:
    """Return all runs of `size` consecutive tokens."""
    return list(zip(*(ids[start:] for start in range(size)), strict=False))


def repetitions(ids: list[int]) -> tuple[int, int]:
    """Return the number of runs of four tokens that occurred before, and the number of all such runs."""
    runs = runs_of(ids, REPEATED_TOKENS)
    return len(runs) - len(set(runs)), len(runs)
