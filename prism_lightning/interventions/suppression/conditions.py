"""Conditions: changes of a model's logits, and the tokens for which a change can make a difference.

A condition changes few logits. Tokens that it cannot affect, by their active prototypes or by the sampled word, keep
their continuations and losses. All others are computed again, exactly.

Shapes: N tokens, C of them in a chunk, D hidden size, V vocabulary, k active prototypes, K prototypes, Y last tokens of
words, c tokens of context.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from prism_lightning.attribution.curvature.records import chunk_size
from prism_lightning.interventions.hidden_states import States
from prism_lightning.models import PrismForCausalLM
from prism_lightning.models.steering import ScaledTerms, Scaling, merged


@dataclass
class WordBias:
    """A bias on the logits of words, in all their spellings: a rival that needs no prototypes.

    Attributes:
        sequences: Token ids of every spelling.
        bias: Value that is added to the logit of a spelling's last token after all tokens before it.
    """

    sequences: list[tuple[int, ...]]
    bias: float

    @classmethod
    def of(cls, words: list[str], tokenizer: PreTrainedTokenizerFast, bias: float) -> WordBias:
        """Find the spellings of words: lower case, upper case and capitalised, with and without a blank before.

        A sign is spelled by every token of the vocabulary that contains it, since tokenizers join quotation marks with
        full stops and commas.
        """
        signs = [word for word in words if not re.search(r"\w", word)]
        forms = {form for word in words if word not in signs for form in (word, word.capitalize(), word.upper())}
        spellings = {before + form for form in forms for before in ("", " ")}
        sequences = {tuple(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in spellings}
        if signs:
            tokens = tokenizer.batch_decode([[token] for token in range(len(tokenizer))])
            sequences |= {(token,) for token, text in enumerate(tokens) if any(sign in text for sign in signs)}
        return cls(sorted(sequences), bias)

    def first_tokens(self) -> tuple[int, ...]:
        """Return the tokens that the words begin with."""
        return tuple(sorted({ids[0] for ids in self.sequences}))

    def last_tokens(self) -> list[int]:
        """Return the Y tokens that the words end with; their logits are biased."""
        return sorted({ids[-1] for ids in self.sequences})

    def endings(self, context_Nc: Tensor) -> Tensor:
        """Return how many spellings [N, Y] each of the last tokens would end after the context's tokens."""
        columns = {token: column for column, token in enumerate(self.last_tokens())}
        endings_NY = torch.zeros(len(context_Nc), len(columns), device=context_Nc.device)
        for *before, last in self.sequences:
            if len(before) <= context_Nc.shape[1]:
                read_Nb = context_Nc[:, context_Nc.shape[1] - len(before) :]
                endings_NY[:, columns[last]] += (read_Nb == torch.tensor(before, device=read_Nb.device)).all(-1)
        return endings_NY


class Reading(NamedTuple):
    """A batch of texts as the plain model reads it.

    Attributes:
        states: Hidden states and targets.
        losses_N: Losses of the targets in nats.
        indices_Nk: Active prototypes.
        words_NY: Log-probabilities of the words' last tokens.
        others_N: Log-probability of all other tokens together.
    """

    states: States
    losses_N: Tensor
    indices_Nk: Tensor
    words_NY: Tensor
    others_N: Tensor


@torch.no_grad()
def read(model: PrismForCausalLM, states: States, words: WordBias) -> Reading:
    """Return everything about a batch of texts that conditions need."""
    size, last = chunk_size(model.lm_head.weight), words.last_tokens()
    losses, indices, word_columns, others = [], [], [], []
    for z_CD, targets_C in zip(states.z_ND.split(size), states.targets_N.split(size), strict=True):
        logits_CV = model.logits(z_CD).float()
        total_C = logits_CV.logsumexp(-1)
        losses.append(total_C - logits_CV.gather(-1, targets_C[:, None])[:, 0])
        word_columns.append(logits_CV[:, last] - total_C[:, None])
        logits_CV[:, last] = -torch.inf
        others.append(logits_CV.logsumexp(-1) - total_C)
        indices.append(model.scaled_terms().assign(z_CD)[0])
    return Reading(states, torch.cat(losses), torch.cat(indices), torch.cat(word_columns), torch.cat(others))


class Condition(ABC):
    """A change of the plain model's logits."""

    @abstractmethod
    def logits(self, z_ND: Tensor, context_Nc: Tensor) -> Tensor:
        """Return logits [N, V] of hidden states after the context's tokens."""

    @abstractmethod
    def may_redraw(self, indices_Nk: Tensor, tokens_N: Tensor, context_Nc: Tensor) -> Tensor:
        """Return whether the same noise may sample another token [N].

        Args:
            indices_Nk: Active prototypes.
            tokens_N: Tokens that the plain model sampled.
            context_Nc: Tokens before them.
        """

    @abstractmethod
    def losses(self, reading: Reading) -> Tensor:
        """Return the loss [N] of a batch of texts, in nats."""


class ScaledPrototypes(Condition):
    """Factors on prototypes' terms, on top of the model's own.

    Args:
        model: A PRISM model.
        scaling: The factors.
    """

    def __init__(self, model: PrismForCausalLM, scaling: Scaling) -> None:
        assert model.prototypes is not None
        self.head = model.lm_head
        self.terms = ScaledTerms(model.prototypes, merged([*model.scalings, scaling]), model.lm_head.weight)
        self.changed_K = torch.zeros(model.config.num_prototypes, dtype=torch.bool, device=model.device)
        self.changed_K[[prototype for prototype, factor in scaling.factors.items() if factor != 1]] = True

    def logits(self, z_ND: Tensor, context_Nc: Tensor) -> Tensor:
        return self.terms.logits(z_ND, self.head)

    def may_redraw(self, indices_Nk: Tensor, tokens_N: Tensor, context_Nc: Tensor) -> Tensor:
        return self.changed_K[indices_Nk].any(-1)

    @torch.no_grad()
    def losses(self, reading: Reading) -> Tensor:
        losses_N = reading.losses_N.clone()
        changed_rows = self.changed_K[reading.indices_Nk].any(-1).nonzero()[:, 0]
        for rows in changed_rows.split(chunk_size(self.head.weight)):
            logits_CV = self.terms.logits(reading.states.z_ND[rows], self.head).float()
            losses_N[rows] = F.cross_entropy(logits_CV, reading.states.targets_N[rows], reduction="none")
        return losses_N


class BiasedWords(Condition):
    """Lowered logits of words.

    Args:
        model: The plain model.
        words: The words and their bias, 0 or less.
    """

    def __init__(self, model: PrismForCausalLM, words: WordBias) -> None:
        assert words.bias <= 0, "with a raised logit, a word could be sampled anywhere"
        self.model, self.words = model, words
        self.last = torch.tensor(words.last_tokens(), device=model.device)

    def logits(self, z_ND: Tensor, context_Nc: Tensor) -> Tensor:
        logits_NV = self.model.logits(z_ND)
        logits_NV[:, self.last] += self.words.bias * self.words.endings(context_Nc)
        return logits_NV

    def may_redraw(self, indices_Nk: Tensor, tokens_N: Tensor, context_Nc: Tensor) -> Tensor:
        # A token whose own logit stays is still the largest when only others are lowered.
        return ((tokens_N[:, None] == self.last) & (self.words.endings(context_Nc) > 0)).any(-1)

    def losses(self, reading: Reading) -> Tensor:
        states = reading.states
        added_NY = self.words.bias * self.words.endings(states.context_Nc)
        total_N = torch.cat([reading.others_N[:, None], reading.words_NY + added_NY], -1).logsumexp(-1)
        return reading.losses_N - (added_NY * (states.targets_N[:, None] == self.last)).sum(-1) + total_N
