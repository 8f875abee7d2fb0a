"""Settings of `calibrate`. The module imports nothing heavy: the command line is generated from it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ControllerSettings:
    """Settings of a fit of controllers.

    Attributes:
        items: Largest number of items of each task that controllers are fitted to.
        permutations: Number of fits to permuted labels.
        traced: Number of prototype cards in the report; all cards are in NAME.details.json.
        seed: Seed of the splits, folds and permutations.

    Raises:
        ValueError: a setting is out of its range.
    """

    items: int = 2000
    permutations: int = 20
    traced: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("items", "traced"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be a positive number")
        if self.permutations < 0:
            raise ValueError("--permutations must be at least 0")
