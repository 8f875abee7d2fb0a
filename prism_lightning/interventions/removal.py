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
import torch.nn.functional as F
from scipy.stats import norm
from torch import Tensor

from prism_lightning.attribution.records import chunk_size
from prism_lightning.interventions.behaviours import Passage
from prism_lightning.interventions.states import States, batches
from prism_lightning.models import PrismForCausalLM

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
    tokens: tuple[int, ...] | None = None,
) -> Effects:
    """Remove every prototype, one at a time, from every token.

    Args:
        model: a PRISM model.
        passages: of G texts, with the behaviour's tokens marked.
        shown: [G], whether each text shows the behaviour. Unmarked tokens of those that do count for neither side.
        report: hears of it.
        tokens: whose logits the prototypes are removed from; None: all.
    """
    assert model.prototypes is not None
    terms = model.scaled_terms()
    size = model.config.num_prototypes
    work, cost = _Sums(len(shown), size), _Sums(len(shown), size)
    usage_K = np.zeros(size, np.int64)
    total, done = sum(len(p.ids) - 1 for p in passages), 0
    for states in batches(model, passages):
        indices_Nk, activations_Nk = terms.assign(states.z_ND)
        rises_Nk = _rises(model, states, indices_Nk, activations_Nk, tokens)
        places_Nk = indices_Nk.cpu().numpy()
        usage_K += np.bincount(places_Nk[activations_Nk.cpu().numpy() > 0], minlength=size)
        for sums, counted_N in ((work, states.marked_N), (cost, ~shown[states.text_N])):
            sums.add(states.text_N[counted_N], places_Nk[counted_N], rises_Nk[counted_N])
        done += len(states.text_N)
        report("removing prototypes one by one", done, total)
    return Effects(*work.means(), *cost.means(), usage_K, int(work.tokens_G.sum()), int(cost.tokens_G.sum()))


def _rises(
    model: PrismForCausalLM,
    states: States,
    indices_Nk: Tensor,
    activations_Nk: Tensor,
    tokens: tuple[int, ...] | None,
) -> np.ndarray:
    """By how much the loss of every token rises without each of its prototypes [N, k]."""
    assert model.prototypes is not None
    weight_KD, head_VD, rises = model.prototypes.weight, model.lm_head.weight, []
    meant = slice(None) if tokens is None else torch.tensor(tokens, device=head_VD.device)
    size = chunk_size(head_VD)
    parts = [tensor.split(size) for tensor in (states.z_ND, states.targets_N, indices_Nk, activations_Nk)]
    for z_CD, targets_C, indices_Ck, activations_Ck in zip(*parts, strict=True):
        logits_CV = model.logits(z_CD).float()
        whole_C = F.cross_entropy(logits_CV, targets_C, reduction="none")
        # What the model's own interventions left of a term is what removing it takes away.
        left_Ck = activations_Ck * model.scaled_terms().factors(indices_Ck, targets_C)
        columns = []
        for index_C, left_C in zip(indices_Ck.unbind(-1), left_Ck.unbind(-1), strict=True):
            without_CV = logits_CV.clone()
            without_CV[:, meant] -= (left_C[:, None] * weight_KD[index_C]) @ head_VD[meant].T
            columns.append(F.cross_entropy(without_CV, targets_C, reduction="none") - whole_C)
        rises.append(torch.stack(columns, -1).cpu().numpy())
    return np.concatenate(rises)


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
