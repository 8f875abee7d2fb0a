"""What each prototype does for a behaviour and for all other text: the loss without it, exactly, with its uncertainty.

Removing prototype i alone turns the logits of a token where it is active into W (z - a_i p_i). By how much that raises
the loss of the behaviour's tokens is what the prototype does for the behaviour; by how much it raises that of tokens in
texts without the behaviour is what its removal costs.

Shapes: N tokens of a batch, D hidden size, V vocabulary, k active, K prototypes, G texts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from scipy.stats import norm
from torch import Tensor

from prism_lightning.attribution.curvature.records import chunk_size
from prism_lightning.interventions.hidden_states import batches
from prism_lightning.interventions.suppression.behaviours import Passage
from prism_lightning.models import PrismForCausalLM

CHUNKS = 8  # of tokens at once: the more, the more of them share a prototype's logits
CACHED = 8  # parts of a chunk: the logits of one, 512 KB on a CPU, stay in the processor's cache
FALSE_ALARMS = 0.05  # chance that any prototype without work is taken for one that works


@dataclass
class Effects:
    """Of removing each prototype alone.

    Attributes:
        work_K, work_error_K: mean rise of the loss over the behaviour's tokens, in nats, and its standard error over
            texts.
        cost_K, cost_error_K: the same over tokens of texts without the behaviour.
        usage_K: tokens in which each is active.
        marked, others: tokens of the two kinds.
    """

    work_K: np.ndarray
    work_error_K: np.ndarray
    cost_K: np.ndarray
    cost_error_K: np.ndarray
    usage_K: np.ndarray
    marked: int
    others: int

    def ranked(self, surely: bool = True) -> list[int]:
        """Prototypes that work for the behaviour, by what they do for it over what their removal may cost.

        Surely: what they do counts so many standard errors down that of K prototypes without any work one would pass by
        chance once in twenty times; otherwise as it was measured. Of the cost one standard error more counts, and at
        least a thousandth of the largest, so that those never met elsewhere go by their work.
        """
        errors = norm.isf(FALSE_ALARMS / len(self.work_K)) if surely else 0.0
        work_K = self.work_K - errors * self.work_error_K
        cost_K = self.cost_K + self.cost_error_K
        cost_K = np.maximum(cost_K, max(cost_K.max() / 1000, 1e-9))
        order = np.argsort(-work_K / cost_K, kind="stable")
        return [int(i) for i in order if work_K[i] > 0]


@torch.no_grad()
def removal_effects(
    model: PrismForCausalLM,
    passages: list[Passage],
    shown: np.ndarray,
    report: Callable[[str, int, int], None],
    tokens: tuple[int, ...],
) -> tuple[Effects, Effects]:
    """Remove every prototype, one at a time, from every token: from all logits, and from those of some tokens alone.

    Args:
        model: a PRISM model.
        passages: of G texts, with the behaviour's tokens marked.
        shown: [G], whether each text shows the behaviour. Unmarked tokens of those that do count for neither side.
        report: hears of it.
        tokens: whose logits alone the second effects are of.
    """
    assert model.prototypes is not None
    size = model.config.num_prototypes
    sums = [_Sums(len(shown), size) for _ in range(4)]  # work and cost, from all logits and from some
    usage_K, part = np.zeros(size, np.int64), CHUNKS * chunk_size(model.lm_head.weight)
    total, done = sum(len(p.ids) - 1 for p in passages), 0
    for states in batches(model, passages):
        places, rises = [], []
        parts = zip(states.z_ND.split(part), states.targets_N.split(part), strict=True)
        for z_CD, targets_C in parts:
            indices_Ck, activations_Ck = model.scaled_terms().assign(z_CD)
            places.append(indices_Ck.cpu().numpy())
            usage_K += np.bincount(places[-1][activations_Ck.cpu().numpy() > 0], minlength=size)
            rises.append(_rises(model, z_CD, targets_C, indices_Ck, activations_Ck, tokens).cpu().numpy())
            done += len(z_CD)
            report("removing prototypes one by one", done, total)
        places_Nk, rises_2Nk = np.concatenate(places), np.concatenate(rises, 1)
        for number, counted_N in enumerate((states.marked_N, ~shown[states.text_N])):
            for way, rises_Nk in enumerate(rises_2Nk):
                kept = (states.text_N[counted_N], places_Nk[counted_N], rises_Nk[counted_N])
                sums[2 * way + number].add(*kept)
    marked, others = (int(s.tokens_G.sum()) for s in sums[:2])
    whole, some = (
        Effects(*work.means(), *cost.means(), usage_K, marked, others) for work, cost in (sums[:2], sums[2:])
    )
    return whole, some


def _rises(
    model: PrismForCausalLM,
    z_CD: Tensor,
    targets_C: Tensor,
    indices_Ck: Tensor,
    activations_Ck: Tensor,
    tokens: tuple[int, ...],
) -> Tensor:
    """By how much the loss of every token rises without each of its prototypes, in all logits and in some [2, C, k]."""
    assert model.prototypes is not None
    # What the model's own interventions left of a term is what removing it takes away.
    left_Ck = activations_Ck * model.scaled_terms().factors(indices_Ck, targets_C)
    logits_CV = model.logits(z_CD).float()
    whole_C = logits_CV.logsumexp(-1)
    # A prototype's logits W p serve all tokens of the part in which it is active.
    prototypes_u, which_Ck = indices_Ck.unique(return_inverse=True)
    terms_uV = model.prototypes.weight[prototypes_u] @ model.lm_head.weight.T
    target_Ck = terms_uV[which_Ck, targets_C[:, None]] * left_Ck
    rises_Ck, size = torch.empty_like(left_Ck), max(1, chunk_size(model.lm_head.weight) // CACHED)
    for rows in torch.arange(len(z_CD), device=z_CD.device).split(size):
        for slot in range(left_Ck.shape[1]):
            removed_RV = terms_uV[which_Ck[rows, slot]].mul_(-left_Ck[rows, slot, None]).add_(logits_CV[rows])
            rises_Ck[rows, slot] = removed_RV.logsumexp(-1)
    rises_Ck += target_Ck - whole_C[:, None]
    meant_Y = torch.tensor(tokens, device=z_CD.device)
    some_CY = logits_CV[:, meant_Y]
    logits_CV[:, meant_Y] = -torch.inf
    removed_CkY = some_CY[:, None] - left_Ck[..., None] * terms_uV[:, meant_Y][which_Ck]
    whole_Ck = torch.logaddexp(logits_CV.logsumexp(-1)[:, None], removed_CkY.logsumexp(-1))
    some_Ck = whole_Ck + torch.where(torch.isin(targets_C, meant_Y)[:, None], target_Ck, 0) - whole_C[:, None]
    return torch.stack([rises_Ck, some_Ck])


class _Sums:
    """Sums over tokens by text and prototype, for means with errors over texts."""

    def __init__(self, texts: int, prototypes: int) -> None:
        self.prototypes, self.tokens_G = prototypes, np.zeros(texts, np.int64)
        self.keys: list[np.ndarray] = []
        self.values: list[np.ndarray] = []

    def add(self, text_n: np.ndarray, indices_nk: np.ndarray, values_nk: np.ndarray) -> None:
        self.tokens_G += np.bincount(text_n, minlength=len(self.tokens_G))
        keys, which = np.unique((text_n[:, None] * self.prototypes + indices_nk).ravel(), return_inverse=True)
        self.keys.append(keys)
        self.values.append(np.bincount(which, values_nk.ravel(), len(keys)))

    def means(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean over all tokens [K], and its standard error [K]: that of a ratio of sums over texts."""
        keys, which = np.unique(np.concatenate(self.keys), return_inverse=True)
        sums = np.bincount(which, np.concatenate(self.values), len(keys))
        text, prototype = np.divmod(keys, self.prototypes)
        total = max(1, self.tokens_G.sum())
        mean_K = np.bincount(prototype, sums, self.prototypes) / total
        # Sum over texts of (s_g - mean n_g)^2; of texts without the prototype s_g is 0.
        squares_K = np.bincount(prototype, sums**2, self.prototypes)
        cross_K = np.bincount(prototype, sums * self.tokens_G[text], self.prototypes)
        squares_K = squares_K + mean_K**2 * (self.tokens_G.astype(float) ** 2).sum() - 2 * mean_K * cross_K
        return mean_K, np.sqrt(np.maximum(squares_K, 0)) / total
