"""Prototype cards: usage, label, promoted tokens, and training tokens in which the prototype is active.

Shapes: n training tokens in which the prototype is active.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from prism_lightning.attribution.attributor import Attributor
from prism_lightning.attribution.index.base import Hits, Query
from prism_lightning.attribution.results import TrainingToken
from prism_lightning.common.errors import UserError
from prism_lightning.data.token_text import token_text
from prism_lightning.inspection.labels import Label, Labeller
from prism_lightning.models.faithfulness import FIGURES
from prism_lightning.run.directory import RunPaths

PROMOTED = 6


@dataclass
class PrototypeCard:
    """One prototype of an index. The `influence` of its examples is their activation.

    Attributes:
        usage, usage_share: number of training tokens in which it is active, and their share of the indexed tokens.
        indexed_tokens: number of tokens of the index.
        dead: whether it is never active.
        promotes, demotes: tokens with the largest and smallest entries of W p.
        label: the tokens that are typical of its neighbourhood, and how many examples have them.
        examples: training tokens by group: "top" (largest activation first), "middle" (around the median), "random".
        faithfulness: figures of all prototypes of the model together, where it has them from validation text.
    """

    prototype: int
    usage: int
    usage_share: float
    indexed_tokens: int
    dead: bool
    promotes: list[str]
    demotes: list[str]
    label: Label
    examples: dict[str, list[TrainingToken]]
    faithfulness: dict[str, float]

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self) | {"label": asdict(self.label) | {"text": str(self.label)}}


@torch.no_grad()
def inspect_prototypes(
    attributor: Attributor, prototypes: list[int] | None, top: int, faithfulness: dict[str, float] | None = None
) -> list[PrototypeCard]:
    """Return cards of the given prototypes, or of the `top` most used ones, with `top` tokens of each group.

    `faithfulness` are `measured_faithfulness` of the run, for cards of its model's own prototypes.

    Raises:
        UserError: a number that is not a prototype of the index.
    """
    index = attributor.index
    usage_K = index.usage_K()
    if prototypes is None:
        prototypes = np.argsort(-usage_K, kind="stable")[:top].tolist()
    unknown = [number for number in prototypes if not 0 <= number < len(usage_K)]
    if unknown:
        raise UserError(
            f"prototype {unknown[0]} is not in {index.folder}: its prototypes are 0 to {len(usage_K) - 1};"
            " give the index that has it by --index"
        )
    labeller = Labeller(attributor.describe.store)
    return [_card(attributor, labeller, number, int(usage_K[number]), top, faithfulness or {}) for number in prototypes]


def measured_faithfulness(run: Path) -> dict[str, float]:
    """Return the figures of a run's prototypes that `fit` or `retrofit` measured; those that are not known left out."""
    try:
        results = json.loads(RunPaths.of(run).results.read_text().splitlines()[-1])
    except (OSError, ValueError, IndexError):
        return {}
    if not isinstance(results, dict):
        return {}
    return {name: results[name] for name in FIGURES if isinstance(results.get(name), float)}


def _card(
    attributor: Attributor, labeller: Labeller, number: int, usage: int, top: int, faithfulness: dict[str, float]
) -> PrototypeCard:
    rows_n, activations_n = attributor.index.postings(number)
    order_n = np.argsort(-activations_n, kind="stable")
    rows_n, activations_n = rows_n[order_n].astype(np.int64), activations_n[order_n].astype(np.float32)
    middle = max(0, len(rows_n) // 2 - top // 2)
    random_places = np.random.default_rng(number).permutation(len(rows_n))[:top]
    places = {"top": np.arange(min(top, len(rows_n))), "middle": np.arange(len(rows_n))[middle : middle + top]}
    places["random"] = np.sort(random_places)
    no_query = Query(np.empty(0, np.int64), np.empty((0, 0), np.float32))
    logits_V = attributor.model.lm_head(attributor.dictionary.prototypes_KD[number])
    promoted, demoted = (logits_V.topk(PROMOTED, largest=largest).indices.tolist() for largest in (True, False))
    return PrototypeCard(
        prototype=number,
        usage=usage,
        usage_share=usage / attributor.index.targets,
        indexed_tokens=attributor.index.targets,
        dead=usage == 0,
        promotes=[token_text(attributor.tokenizer, [token]) for token in promoted],
        demotes=[token_text(attributor.tokenizer, [token]) for token in demoted],
        label=labeller.label(rows_n),
        examples={
            group: attributor.describe.tokens(Hits(rows_n[at], activations_n[at]), no_query, with_prototypes=False)
            for group, at in places.items()
        },
        faithfulness=faithfulness,
    )
