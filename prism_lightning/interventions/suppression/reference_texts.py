"""Held-out texts without the behaviour: their perplexity shows what a condition costs elsewhere.

Shapes: G texts, N tokens of a batch.
"""

from __future__ import annotations

import math

import numpy as np
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from prism_lightning.common.statistics import normal_interval
from prism_lightning.interventions.hidden_states import batches
from prism_lightning.interventions.suppression.behaviours import marked_passages
from prism_lightning.interventions.suppression.conditions import Condition, WordBias, read
from prism_lightning.interventions.suppression.progress import Progress
from prism_lightning.models import PrismForCausalLM


class ReferenceTexts:
    """Texts as the plain model reads them, and their losses under conditions.

    Args:
        model: The plain model.
        tokenizer: Its tokenizer.
        texts: G texts without the behaviour.
        words: The behaviour's words; conditions that bias them need their probabilities.
        progress: Receives the number of tokens read.

    Attributes:
        losses_G: Summed loss of every text under the plain model, in nats.
        tokens_G: Number of predicted tokens of every text.
    """

    def __init__(
        self,
        model: PrismForCausalLM,
        tokenizer: PreTrainedTokenizerFast,
        texts: list[str],
        words: WordBias,
        progress: Progress,
    ) -> None:
        passages = marked_passages(texts, [[] for _ in texts], tokenizer, model.config.context_length)
        done, total = 0, sum(len(passage.marked_T) for passage in passages)
        self.texts, self.readings = len(texts), []
        for states in batches(model, passages):
            self.readings.append(read(model, states, words))
            done += len(states.text_N)
            progress("reading held-out texts", done, total)
        self.losses_G = self._text_sums([reading.losses_N for reading in self.readings])
        self.tokens_G = np.bincount(np.concatenate([r.states.text_N for r in self.readings]), minlength=self.texts)

    def losses(self, condition: Condition) -> np.ndarray:
        """Return the summed loss [G] of every text under a condition, in nats."""
        return self._text_sums([condition.losses(reading) for reading in self.readings])

    def perplexity(self, losses_G: np.ndarray) -> float:
        """Return the perplexity of all texts together."""
        return float(np.exp(losses_G.sum() / self.tokens_G.sum()))

    def perplexity_increase(self, losses_G: np.ndarray) -> float:
        """Return the relative increase of perplexity over the plain model's."""
        return float(np.expm1((losses_G - self.losses_G).sum() / self.tokens_G.sum()))

    def increase_interval(self, losses_G: np.ndarray) -> tuple[float, float]:
        """Return the 95 % interval of the perplexity increase, normal over texts in the mean loss."""
        total, differences_G = self.tokens_G.sum(), losses_G - self.losses_G
        per_token = differences_G.sum() / total
        error = math.sqrt(((differences_G - per_token * self.tokens_G) ** 2).sum()) / total
        low, high = normal_interval(per_token, error)
        return float(np.expm1(low)), float(np.expm1(high))

    def _text_sums(self, losses: list[Tensor]) -> np.ndarray:
        sums_G = np.zeros(self.texts)
        for reading, losses_N in zip(self.readings, losses, strict=True):
            sums_G += np.bincount(reading.states.text_N, losses_N.cpu().numpy(), self.texts)
        return sums_G
