"""The settings of an index."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from prism_lightning.errors import UserError

DICTIONARIES = ("fitted", "model")


@dataclass
class IndexSettings:
    """What an index keeps of every training token, and how it weighs it (docs/attribution.md has the choices' table).

    Args:
        dir: the index's folder; by default RUN/index.
        dictionary: "fitted" fits prototypes of the index's own to the frozen decoder, "model" takes the model's.
        prototypes: K of a fitted dictionary; by default the largest power of two up to one per 32 training
            tokens, at most 1,048,576.
        active: k of a fitted dictionary.
        fit_steps: Adam steps that fit the dictionary; 0 leaves it at hidden states drawn from the corpus.
        fit_tokens: training tokens whose hidden states the dictionary is fitted to; by default 4 per prototype.
        rank: m, coordinates kept of a record; by default all D of them.
        precision: type of the coordinates: fp32, fp16 or int8.
        hidden_rank: coordinates kept of the hidden state, for re-ranking by the head's K-FAC; 0 leaves them out.
        activation_path: records with the gradient through the activations too; k vectors per token in place of one.
        objective: "cross_entropy", or "training" for the gradient of w_rec L_rec as well.
        curvature: "separable" A_ii S, or "eigenvalues" of each prototype's own Gauss-Newton block.
        damping: added to the curvature, as a share of its mean.
        shard_tokens: training tokens in one shard, rounded to whole blocks.
        batch_tokens: training tokens in one forward pass.
        seed: of the dictionary.
    """

    dir: str | None = None
    dictionary: Literal["fitted", "model"] = "fitted"
    prototypes: int | None = None
    active: int = 3
    fit_steps: int = 150
    fit_tokens: int | None = None
    rank: int | None = None
    precision: Literal["fp32", "fp16", "int8"] = "int8"
    hidden_rank: int = 0
    activation_path: bool = False
    objective: Literal["cross_entropy", "training"] = "cross_entropy"
    curvature: Literal["separable", "eigenvalues"] = "separable"
    damping: float = 1e-3
    shard_tokens: int = 2_097_152
    batch_tokens: int = 8192
    seed: int = 0

    def __post_init__(self) -> None:
        counts = ("active", "shard_tokens", "batch_tokens")
        problems = [f"index.{n} is {getattr(self, n)}: give a positive number" for n in counts if getattr(self, n) < 1]
        for name in ("prototypes", "rank", "fit_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                problems.append(f"index.{name} is {value}: give a positive number, or null for the default")
        for name in ("hidden_rank", "fit_steps", "damping"):
            if getattr(self, name) < 0:
                problems.append(f"index.{name} is {getattr(self, name)}: give 0 or a positive number")
        plain = self.curvature == "separable" and self.objective == "cross_entropy" and not self.activation_path
        if self.hidden_rank and not plain:
            problems.append("index.hidden_rank needs separable curvature, cross_entropy and no index.activation_path")
        if problems:
            raise UserError(problems)
