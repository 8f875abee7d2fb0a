"""A prototype's card: how often it is used, what it promotes, and its nearest training tokens."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from prism_lightning.attribution.attributor import Attributor
from prism_lightning.attribution.index import Hits, Query
from prism_lightning.attribution.results import TrainingToken
from prism_lightning.errors import UserError

PROMOTED = 6


@dataclass
class PrototypeCard:
    """One prototype of an index. `influence` of its nearest tokens is their activation, the cosine to the prototype."""

    prototype: int
    usage: int
    usage_share: float
    promotes: list[str]
    nearest: list[TrainingToken]

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


@torch.no_grad()
def inspect_prototypes(attributor: Attributor, prototypes: list[int] | None, top: int) -> list[PrototypeCard]:
    """Cards of the given prototypes, or of the `top` most used.

    Raises:
        UserError: a number that is no prototype of the index.
    """
    index = attributor.index
    usage_K = index.usage_K()
    if prototypes is None:
        prototypes = np.argsort(-usage_K, kind="stable")[:top].tolist()
    stray = [number for number in prototypes if not 0 <= number < len(usage_K)]
    if stray:
        raise UserError(f"prototype {stray[0]} is not in the index: its prototypes are 0 to {len(usage_K) - 1}")
    nothing = Query(np.empty(0, np.int64), np.empty((0, 0), np.float32))
    cards = []
    for number in prototypes:
        tokens, activations = index.postings(number)
        nearest = Hits(tokens.astype(np.int64), activations.astype(np.float32)).strongest(top)
        head_V = attributor.model.lm_head(attributor.dictionary.prototypes_KD[number])
        cards.append(
            PrototypeCard(
                prototype=number,
                usage=int(usage_K[number]),
                usage_share=float(usage_K[number] / index.tokens),
                promotes=[str(attributor.tokenizer.decode([t])) for t in head_V.topk(PROMOTED).indices.tolist()],
                nearest=attributor.describe.tokens(nearest, nothing, carried=False),
            )
        )
    return cards
