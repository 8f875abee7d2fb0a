"""Settings of an index."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from prism_lightning.common.errors import UserError
from prism_lightning.common.retired import RETIRED_INDEX_SETTINGS

# By space: k, training tokens per prototype of the default K, damping.
DEFAULTS = {"logits": (16, 128, 0.05), "hidden": (3, 32, 1e-3)}
HIDDEN_ONLY = ("rank", "precision", "hidden_rank")


@dataclass
class IndexSettings:
    """What an index stores of every training token, and how queries weight it.

    docs/attribution.md has the measurements behind the defaults.

    Args:
        dir: Folder of the index (default RUN/index).
        space: Space of the stored gradients: "logits" (lists by prototype and target) or "hidden" (vectors).
        dictionary: Prototypes of the index: "fitted" to the frozen decoder, or those of the "model".
        prototypes: Number K of prototypes of a fitted dictionary (default: the largest power of two up to one per 128
            training tokens, 32 in space hidden; at most 1,048,576).
        active: Number k of active prototypes per token of a fitted dictionary (default 16; 3 in space hidden).
        fit_steps: Number of Adam steps that fit the dictionary; 0 keeps hidden states drawn from the corpus.
        fit_tokens: Number of training tokens whose hidden states the dictionary is fitted to (default 4 per prototype,
            at least 131,072).
        rank: Space hidden: number m of coordinates stored of a record (default: all D).
        precision: Space hidden: type of the stored coordinates: fp32, fp16 or int8.
        hidden_rank: Space hidden: number of coordinates stored of a hidden state, for `attribute --rerank`; 0 stores
            none.
        damping: Share of the curvature's mean that is added to it (default 0.05; 0.001 in space hidden).
        shard_tokens: Number of training tokens in one shard, rounded to whole blocks.
        batch_tokens: Number of training tokens in one forward pass.
        seed: Seed of the dictionary.
    """

    dir: str | None = None
    space: Literal["logits", "hidden"] = "logits"
    dictionary: Literal["fitted", "model"] = "fitted"
    prototypes: int | None = None
    active: int | None = None
    fit_steps: int = 150
    fit_tokens: int | None = None
    rank: int | None = None
    precision: Literal["fp32", "fp16", "int8"] = "int8"
    hidden_rank: int = 0
    damping: float | None = None
    shard_tokens: int = 2_097_152
    batch_tokens: int = 8192
    seed: int = 0

    def __post_init__(self) -> None:
        counts = ("shard_tokens", "batch_tokens")
        problems = [f"index.{n} is {getattr(self, n)}: give a positive number" for n in counts if getattr(self, n) < 1]
        for name in ("active", "prototypes", "rank", "fit_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                problems.append(f"index.{name} is {value}: give a positive number, or null for the default")
        for name in ("hidden_rank", "fit_steps", "damping"):
            if (getattr(self, name) or 0) < 0:
                problems.append(f"index.{name} is {getattr(self, name)}: give 0 or a positive number")
        if self.shard_tokens * self.active_per_token >= 2**32:
            problems.append(f"index.shard_tokens is {self.shard_tokens}: its lists would hold 2^32 entries, lower it")
        if self.space == "logits":
            changed = [f.name for f in fields(self) if f.name in HIDDEN_ONLY and getattr(self, f.name) != f.default]
            problems += [
                f"index.{name} is a setting of --index.space hidden: add that, or leave it out" for name in changed
            ]
        if problems:
            raise UserError(problems)

    def recorded(self) -> dict[str, Any]:
        """Return what the files of an index record: all settings but `dir`.

        Retired settings keep their place and their only value, so that indexes of earlier versions stay the same.
        """
        values = [(name, value) for name, value in asdict(self).items() if name != "dir"]
        place = [name for name, _ in values].index("damping")
        return dict([*values[:place], *RETIRED_INDEX_SETTINGS.items(), *values[place:]])

    @property
    def active_per_token(self) -> int:
        """Number k of active prototypes per token."""
        return DEFAULTS[self.space][0] if self.active is None else self.active

    @property
    def tokens_per_prototype(self) -> int:
        """Number of training tokens per prototype of the default K."""
        return DEFAULTS[self.space][1]

    @property
    def damping_share(self) -> float:
        """Share d of the mean curvature that is added to it."""
        return DEFAULTS[self.space][2] if self.damping is None else self.damping
