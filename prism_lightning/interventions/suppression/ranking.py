"""Rank prototypes by what their removal does to a behaviour and to all other text, exactly and with uncertainty.

Removing prototype i alone turns the logits of a token where it is active into W (z - a_i p_i). The rise of the loss of
the behaviour's tokens is the prototype's effect on the behaviour. The rise of the loss of tokens in texts without the
behaviour is its collateral effect.

Shapes: N tokens of a batch, C tokens of a part, D hidden size, V vocabulary, k active, K prototypes, G texts, u
different prototypes of a part, Y tokens of the words.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from scipy.stats import norm
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from prism_lightning.attribution.curvature.records import chunk_size
from prism_lightning.common.errors import UserError
from prism_lightning.interventions.hidden_states import States, batches
from prism_lightning.interventions.suppression.behaviours import Behaviour, MarkedPassage, marked_passages
from prism_lightning.interventions.suppression.progress import Progress
from prism_lightning.models import PrismForCausalLM

CHUNKS = 8  # chunks of the head in one part: the more tokens a part has, the more of them share a prototype's logits
CACHED = 8  # pieces of a chunk: the logits of one, 512 KB on a CPU, stay in the processor's cache
FALSE_ALARMS = 0.05  # probability that any prototype without an effect is taken for one with an effect
MIN_BEHAVIOUR_TOKENS = 20  # for a ranking


@dataclass
class RankingTexts:
    """Texts to rank on, as passages with the behaviour's tokens marked.

    Attributes:
        passages: Passages of all texts.
        shows_behaviour_G: Whether each text shows the behaviour.
    """

    passages: list[MarkedPassage]
    shows_behaviour_G: np.ndarray

    @classmethod
    def of(
        cls,
        texts: list[str],
        labels: list[bool] | None,
        behaviour: Behaviour,
        tokenizer: PreTrainedTokenizerFast,
        length: int,
    ) -> RankingTexts:
        """Mark the behaviour's tokens in passages of up to `length` targets.

        Raises:
            UserError: the behaviour has too few tokens, or every text shows it.
        """
        shows_G = np.array([behaviour.present(text) for text in texts] if labels is None else labels)
        spans = [behaviour.spans(text) if shows else [] for text, shows in zip(texts, shows_G, strict=True)]
        passages = marked_passages(texts, spans, tokenizer, length)
        marked = sum(int(passage.marked_T.sum()) for passage in passages)
        if marked < MIN_BEHAVIOUR_TOKENS:
            raise UserError(
                f"{behaviour.name!r} has {marked} tokens in {len(texts)} texts, {MIN_BEHAVIOUR_TOKENS} are needed to"
                " rank prototypes: give other words, or more texts by --tokens"
            )
        if shows_G.all():
            raise UserError(
                f"all {len(texts)} texts show {behaviour.name!r}: no text is left to preserve; choose narrower words"
            )
        return cls(passages, shows_G)


@dataclass
class Effects:
    """Effects of removing each prototype alone.

    Attributes:
        behaviour_effect_K: Mean rise of the loss over the behaviour's tokens, in nats.
        behaviour_effect_error_K: Its standard error over texts.
        collateral_effect_K: Mean rise of the loss over tokens of texts without the behaviour, in nats.
        collateral_effect_error_K: Its standard error over texts.
        usage_K: Number of tokens in which each prototype is active.
        behaviour_tokens: Number of the behaviour's tokens.
        other_tokens: Number of tokens of texts without the behaviour.
    """

    behaviour_effect_K: np.ndarray
    behaviour_effect_error_K: np.ndarray
    collateral_effect_K: np.ndarray
    collateral_effect_error_K: np.ndarray
    usage_K: np.ndarray
    behaviour_tokens: int
    other_tokens: int

    def ranked(self, surely: bool = True) -> list[int]:
        """Return prototypes with an effect on the behaviour, by the ratio of this effect to the collateral effect.

        The collateral effect counts with one standard error added, and as a thousandth of the largest one at least:
        prototypes that never occur elsewhere are then ordered by their effect on the behaviour.

        Args:
            surely: Reduce the effect by so many standard errors that, of K prototypes without any effect, one exceeds
                zero with a probability of 5 %. Otherwise take the estimate.
        """
        errors = norm.isf(FALSE_ALARMS / len(self.behaviour_effect_K)) if surely else 0.0
        behaviour_K = self.behaviour_effect_K - errors * self.behaviour_effect_error_K
        collateral_K = self.collateral_effect_K + self.collateral_effect_error_K
        collateral_K = np.maximum(collateral_K, max(collateral_K.max() / 1000, 1e-9))
        order = np.argsort(-behaviour_K / collateral_K, kind="stable")
        return [int(i) for i in order if behaviour_K[i] > 0]


@dataclass
class Ranking:
    """Candidate prototypes for a removal from one set of logits.

    Attributes:
        tokens: The tokens whose logits are changed; None means all.
        effects: Effects of removing each prototype alone, on the ranking's texts.
        prototypes: Candidates, best first; prototypes given by the user keep their order.
    """

    tokens: tuple[int, ...] | None
    effects: Effects
    prototypes: list[int]


@torch.no_grad()
def removal_effects(
    model: PrismForCausalLM, texts: RankingTexts, progress: Progress, tokens: tuple[int, ...]
) -> tuple[Effects, Effects]:
    """Return the effects of removing each prototype from all logits, and from the logits of some tokens alone.

    Args:
        model: A PRISM model.
        texts: G texts. Unmarked tokens of texts that show the behaviour count for neither effect.
        progress: Receives the number of tokens done.
        tokens: The tokens whose logits alone the second effects are about.
    """
    size, shows_G = model.config.num_prototypes, texts.shows_behaviour_G
    sums = [[_TextSums(len(shows_G), size) for _ in range(2)] for _ in range(2)]  # logits x (behaviour, others)
    usage_K = np.zeros(size, np.int64)
    total, done = sum(len(p.ids) - 1 for p in texts.passages), 0
    for states in batches(model, texts.passages):
        places, rises = [], []
        for indices_Ck, active_Ck, rises_2Ck in _removals(model, states, tokens):
            places.append(indices_Ck)
            usage_K += np.bincount(indices_Ck[active_Ck], minlength=size)
            rises.append(rises_2Ck)
            done += len(indices_Ck)
            progress("removing prototypes one by one", done, total)
        places_Nk, rises_2Nk = np.concatenate(places), np.concatenate(rises, 1)
        for group, selected_N in enumerate((states.marked_N, ~shows_G[states.text_N])):
            for logits, rises_Nk in enumerate(rises_2Nk):
                sums[logits][group].add(states.text_N[selected_N], places_Nk[selected_N], rises_Nk[selected_N])
    from_all, from_tokens = (
        Effects(*behaviour.means(), *others.means(), usage_K, *(int(s.tokens_G.sum()) for s in (behaviour, others)))
        for behaviour, others in sums
    )
    return from_all, from_tokens


def _removals(
    model: PrismForCausalLM, states: States, tokens: tuple[int, ...]
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yield active prototypes [C, k], whether their activation is positive, and rises of the loss [2, C, k]."""
    part = CHUNKS * chunk_size(model.lm_head.weight)
    for z_CD, targets_C in zip(states.z_ND.split(part), states.targets_N.split(part), strict=True):
        indices_Ck, activations_Ck = model.scaled_terms().assign(z_CD)
        rises_2Ck = _rises(model, z_CD, targets_C, indices_Ck, activations_Ck, tokens)
        yield indices_Ck.cpu().numpy(), activations_Ck.cpu().numpy() > 0, rises_2Ck.cpu().numpy()


def _rises(
    model: PrismForCausalLM,
    z_CD: Tensor,
    targets_C: Tensor,
    indices_Ck: Tensor,
    activations_Ck: Tensor,
    tokens: tuple[int, ...],
) -> Tensor:
    """Return the rise [2, C, k] of every token's loss without each of its prototypes: in all logits, and in some."""
    assert model.prototypes is not None
    # The model's own interventions may have scaled a term already; its removal takes away the rest.
    removed_Ck = activations_Ck * model.scaled_terms().factors(indices_Ck, targets_C)
    logits_CV = model.logits(z_CD).float()
    total_C = logits_CV.logsumexp(-1)
    # A prototype's logits W p serve all tokens of the part in which it is active.
    prototypes_u, which_Ck = indices_Ck.unique(return_inverse=True)
    terms_uV = model.prototypes.weight[prototypes_u] @ model.lm_head.weight.T
    target_Ck = terms_uV[which_Ck, targets_C[:, None]] * removed_Ck
    all_Ck, size = torch.empty_like(removed_Ck), max(1, chunk_size(model.lm_head.weight) // CACHED)
    for rows in torch.arange(len(z_CD), device=z_CD.device).split(size):
        for slot in range(removed_Ck.shape[1]):
            without_RV = terms_uV[which_Ck[rows, slot]].mul_(-removed_Ck[rows, slot, None]).add_(logits_CV[rows])
            all_Ck[rows, slot] = without_RV.logsumexp(-1)
    all_Ck += target_Ck - total_C[:, None]
    tokens_Y = torch.tensor(tokens, device=z_CD.device)
    words_CY = logits_CV[:, tokens_Y]
    logits_CV[:, tokens_Y] = -torch.inf
    without_CkY = words_CY[:, None] - removed_Ck[..., None] * terms_uV[:, tokens_Y][which_Ck]
    total_Ck = torch.logaddexp(logits_CV.logsumexp(-1)[:, None], without_CkY.logsumexp(-1))
    some_Ck = total_Ck + torch.where(torch.isin(targets_C, tokens_Y)[:, None], target_Ck, 0) - total_C[:, None]
    return torch.stack([all_Ck, some_Ck])


class _TextSums:
    """Sums over tokens by text and prototype, for means with standard errors over texts."""

    def __init__(self, texts: int, prototypes: int) -> None:
        self.prototypes, self.tokens_G = prototypes, np.zeros(texts, np.int64)
        self.keys: list[np.ndarray] = []
        self.values: list[np.ndarray] = []

    def add(self, text_n: np.ndarray, indices_nk: np.ndarray, values_nk: np.ndarray) -> None:
        """Add the values of n tokens."""
        self.tokens_G += np.bincount(text_n, minlength=len(self.tokens_G))
        keys, which = np.unique((text_n[:, None] * self.prototypes + indices_nk).ravel(), return_inverse=True)
        self.keys.append(keys)
        self.values.append(np.bincount(which, values_nk.ravel(), len(keys)))

    def means(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the mean over all tokens [K] and its standard error [K], that of a ratio of sums over texts."""
        keys, which = np.unique(np.concatenate(self.keys), return_inverse=True)
        sums = np.bincount(which, np.concatenate(self.values), len(keys))
        text, prototype = np.divmod(keys, self.prototypes)
        total = max(1, self.tokens_G.sum())
        mean_K = np.bincount(prototype, sums, self.prototypes) / total
        # Sum over texts of (s_g - mean n_g)^2; s_g is 0 in texts without the prototype.
        squares_K = np.bincount(prototype, sums**2, self.prototypes)
        cross_K = np.bincount(prototype, sums * self.tokens_G[text], self.prototypes)
        squares_K = squares_K + mean_K**2 * (self.tokens_G.astype(float) ** 2).sum() - 2 * mean_K * cross_K
        return mean_K, np.sqrt(np.maximum(squares_K, 0)) / total
