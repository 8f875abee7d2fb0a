"""Results of a suppression experiment, from the ranking of prototypes to the comparison on fresh prompts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from prism_lightning.interventions.suppression.measurements import Measurement
from prism_lightning.interventions.suppression.ranking import Ranking
from prism_lightning.interventions.suppression.settings import SuppressionSettings
from prism_lightning.models.steering import Scaling


@dataclass
class PrototypeSelection:
    """The number of candidates that was selected on the first half of the held-out texts.

    Attributes:
        ranking: The candidates.
        path: All measurements of the search, by ascending number of prototypes.
        chosen: The measurement of the selected prototypes.
        scaling: Their factors.
    """

    ranking: Ranking
    path: list[Measurement]
    chosen: Measurement
    scaling: Scaling


@dataclass
class Selections:
    """Everything that was selected on the first half of the held-out texts.

    Attributes:
        attempts: Prototypes to remove from all logits and, where those miss the goal, from the words' logits.
        kept: Index of the attempt that becomes the intervention; it is not always the last.
        bias_path: Measurements of the bias on the behaviour's words, by ascending strength.
        bias: The strength that was chosen.
    """

    attempts: list[PrototypeSelection]
    kept: int
    bias_path: list[Measurement]
    bias: float


@dataclass
class Attempt:
    """Selected prototypes, and their measurement on the second half of the held-out texts."""

    selection: PrototypeSelection
    fresh: Measurement

    def as_dict(self) -> dict[str, Any]:
        """Return plain data for JSON, with the keys of the file format; effects are those of the candidates."""
        selection, ranking = self.selection, self.selection.ranking
        effects = {
            "work": ranking.effects.behaviour_effect_K,
            "work_error": ranking.effects.behaviour_effect_error_K,
            "cost": ranking.effects.collateral_effect_K,
            "cost_error": ranking.effects.collateral_effect_error_K,
            "usage": ranking.effects.usage_K,
        }
        candidates = {"prototype": ranking.prototypes}
        return {
            "tokens": ranking.tokens,
            "candidates": candidates | {name: all_K[ranking.prototypes].tolist() for name, all_K in effects.items()},
            "behaviour_tokens": ranking.effects.behaviour_tokens,
            "other_tokens": ranking.effects.other_tokens,
            "path": [measurement.as_dict() for measurement in selection.path],
            "factors": {str(prototype): factor for prototype, factor in selection.scaling.factors.items()},
            "fresh": self.fresh.as_dict(),
        }


@dataclass
class Suppression:
    """The result of a suppression experiment.

    Attributes:
        behaviour: Name of the behaviour.
        notes: Facts about the behaviour that a reader must know.
        settings: Settings of the experiment.
        attempts: One or two attempts, see `Selections`.
        kept: Index of the attempt whose scaling is the intervention.
        bias_path: Measurements of the bias on the behaviour's words on the first half of the held-out texts.
        plain: The unchanged model on the second half, like `biased`, `draws` and the attempts' `fresh`.
        biased: The chosen bias on the behaviour's words.
        draws: Random prototypes in place of the kept ones.
    """

    behaviour: str
    notes: list[str]
    settings: SuppressionSettings
    attempts: list[Attempt]
    kept: int
    bias_path: list[Measurement]
    plain: Measurement
    biased: Measurement
    draws: list[Measurement]

    @property
    def kept_attempt(self) -> Attempt:
        """The attempt whose scaling is the intervention."""
        return self.attempts[self.kept]

    def as_dict(self) -> dict[str, Any]:
        """Return plain data for JSON, with the keys of the file format."""
        return {
            "behaviour": self.behaviour,
            "notes": self.notes,
            "plan": self.settings.as_dict(),
            "attempts": [attempt.as_dict() for attempt in self.attempts],
            "kept": self.kept,
            "biases": [measurement.as_dict() for measurement in self.bias_path],
            "plain": self.plain.as_dict(),
            "biased": self.biased.as_dict(),
            "draws": [measurement.as_dict() for measurement in self.draws],
        }
