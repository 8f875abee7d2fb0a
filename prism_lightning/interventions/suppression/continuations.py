"""Continuations of many prompts under many conditions.

The plain model's continuations are sampled once. Under a condition, a continuation stays the same up to the first token
that the same noise samples differently from the condition's logits. From there on it is sampled again.

Shapes: B prompts, P tokens of a prompt, T new tokens at most, S = P + T, N tokens, C of them in a chunk, D hidden size,
V vocabulary, k active prototypes, c tokens of context.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from prism_lightning.attribution.curvature.records import chunk_size
from prism_lightning.data.tokenizer import encode_batch
from prism_lightning.interventions.hidden_states import token_losses
from prism_lightning.interventions.suppression.conditions import Condition
from prism_lightning.interventions.suppression.generation import GumbelNoise, sample_continuations
from prism_lightning.interventions.suppression.progress import ShareProgress
from prism_lightning.interventions.suppression.settings import Sampling
from prism_lightning.models import PrismForCausalLM

BATCH_PROMPTS = 128  # continued at once


def prompts(texts: list[str], tokenizer: PreTrainedTokenizerFast, sampling: Sampling, count: int) -> list[list[int]]:
    """Return the beginnings of texts as prompts; where there are fewer than `count`, later places in the texts follow.

    Places in a text are so far apart that no continuation reaches the next prompt.
    """
    encoded = [ids.tolist() for ids in encode_batch(tokenizer, texts)]
    size, stride = sampling.prompt_tokens, sampling.prompt_tokens + sampling.new_tokens
    places = [(start, text) for text, ids in enumerate(encoded) for start in range(0, len(ids) - size, stride)]
    return [encoded[text][start : start + size] for start, text in sorted(places)[:count]]


@dataclass
class Continuations:
    """New tokens of B prompts.

    Attributes:
        tokens_BT: New tokens with the one that ends the text; -1 follows it.
        end: The token that ends a text.
        losses_BT: Loss of every token in nats under the plain model; 0 follows the end.
        prompt_losses_BP: Losses of the prompts' tokens but the first; they are the same under all conditions.
    """

    tokens_BT: Tensor
    end: int | None
    losses_BT: Tensor
    prompt_losses_BP: Tensor

    @property
    def text_BT(self) -> Tensor:
        """Whether a token belongs to the text."""
        return (self.tokens_BT >= 0) & (self.tokens_BT != (-1 if self.end is None else self.end))

    def ids(self) -> list[list[int]]:
        """Return the text's tokens by prompt."""
        return [tokens[in_text].tolist() for tokens, in_text in zip(self.tokens_BT, self.text_BT, strict=True)]


class Continuer:
    """Continues the same prompts under conditions.

    Args:
        model: The plain model.
        prompt_ids: The prompts, of equal length.
        sampling: Settings of the sampling.
        report: Receives the share of the plain continuations that is done.

    Attributes:
        plain: Continuations of the plain model.
    """

    def __init__(
        self,
        model: PrismForCausalLM,
        prompt_ids: list[list[int]],
        sampling: Sampling,
        report: ShareProgress = lambda _: None,
    ) -> None:
        self.model, self.sampling = model, sampling
        self.end = model.generation_config.eos_token_id  # type: ignore[union-attr]
        self.prompts_BP = torch.tensor(prompt_ids, device=model.device)
        self.noise = GumbelNoise(sampling.seed, sampling.new_tokens, model.config.vocab_size)
        tokens, states = [], []
        for rows, batch_report in _batches(np.arange(len(prompt_ids)), report):
            tokens_BT, z_BTD = self._sample(rows, 0, lambda z_ND, _: model.logits(z_ND), batch_report)
            tokens.append(tokens_BT)
            states.append(z_BTD)
        self.z_BTD = torch.cat(states)
        tokens_BT = torch.cat(tokens)
        with torch.no_grad():
            prompt_z_BPD = model.hidden_states(self.prompts_BP)[:, :-1]
        prompt_losses_BP = self._losses(self.prompts_BP[:, 1:], prompt_z_BPD)
        self.plain = Continuations(tokens_BT, self.end, self._losses(tokens_BT, self.z_BTD), prompt_losses_BP)
        self.indices_BTk = torch.cat([model.scaled_terms().assign(z_TD)[0][None] for z_TD in self.z_BTD])

    def under(self, condition: Condition, report: ShareProgress = lambda _: None) -> Continuations:
        """Return the continuations under a condition."""
        first_B = self._first_changes(condition)
        # Rows are sorted by their first change, and a batch starts at the earliest one. Rows that change later sample
        # the tokens before their change once more, with the same result.
        changed = sorted(np.flatnonzero(first_B < self.sampling.new_tokens).tolist(), key=lambda row: first_B[row])
        tokens_BT, losses_BT = self.plain.tokens_BT.clone(), self.plain.losses_BT.clone()
        for rows, batch_report in _batches(np.array(changed, dtype=int), report):
            begin = int(first_B[rows[0]])
            new_BT, z_BTD = self._sample(rows, begin, condition.logits, batch_report)
            tokens_BT[rows, begin:], losses_BT[rows, begin:] = new_BT, self._losses(new_BT, z_BTD)
        report(1.0)
        return replace(self.plain, tokens_BT=tokens_BT, losses_BT=losses_BT)

    def _sample(
        self, rows_B: np.ndarray, begin: int, logits: Callable[[Tensor, Tensor], Tensor], report: ShareProgress
    ) -> tuple[Tensor, Tensor]:
        """Return new tokens of some prompts from step `begin` on, and the hidden states that they were sampled from."""
        ids_BP = self.prompts_BP[rows_B]
        if begin:
            ids_BP = torch.cat([ids_BP, self.plain.tokens_BT[rows_B, :begin]], 1)
        steps = range(begin, self.sampling.new_tokens)

        def choose(z_ND: Tensor, context_Nc: Tensor, prompts_N: np.ndarray, step: int) -> Tensor:
            return self._sampled_tokens(logits(z_ND, context_Nc), prompts_N, np.full(len(prompts_N), step))

        def report_steps(done: int) -> None:
            report(done / len(steps))

        return sample_continuations(self.model, ids_BP, rows_B, steps, choose, self.end, report_steps)

    def _sampled_tokens(self, logits_NV: Tensor, prompts_N: np.ndarray, steps_N: np.ndarray) -> Tensor:
        """Return tokens [N], sampled by the noise of their prompts and steps."""
        noise_NV = self.noise(prompts_N, steps_N).to(logits_NV.device)
        return noise_NV.add_(logits_NV, alpha=1 / self.sampling.temperature).argmax(-1)

    def _losses(self, tokens_BT: Tensor, z_BTD: Tensor) -> Tensor:
        losses_BT = torch.zeros(tokens_BT.shape)
        sampled_BT = tokens_BT >= 0
        losses_BT[sampled_BT.cpu()] = token_losses(self.model, z_BTD[sampled_BT], tokens_BT[sampled_BT])
        return losses_BT

    @torch.no_grad()
    def _first_changes(self, condition: Condition) -> np.ndarray:
        """Return the first step [B] at which the condition samples another token; T where there is none."""
        first_B = np.full(len(self.prompts_BP), self.sampling.new_tokens)
        tokens_BT = self.plain.tokens_BT
        row_N, step_N = (tokens_BT >= 0).nonzero(as_tuple=True)
        context_Nc = self._context(row_N, step_N)
        may_N = condition.may_redraw(self.indices_BTk[row_N, step_N], tokens_BT[row_N, step_N], context_Nc)
        row_N, step_N, context_Nc = row_N[may_N], step_N[may_N], context_Nc[may_N]
        size = chunk_size(self.model.lm_head.weight)
        for row_C, step_C, context_Cc in zip(*(t.split(size) for t in (row_N, step_N, context_Nc)), strict=True):
            logits_CV = condition.logits(self.z_BTD[row_C, step_C], context_Cc)
            rows, steps = row_C.cpu().numpy(), step_C.cpu().numpy()
            sampled_C = self._sampled_tokens(logits_CV, rows, steps)
            differs = (sampled_C != tokens_BT[row_C, step_C]).cpu().numpy()
            np.minimum.at(first_B, rows[differs], steps[differs])
        return first_B

    def _context(self, row_N: Tensor, step_N: Tensor) -> Tensor:
        """Return the P tokens [N, P] before each place."""
        ids_BS = torch.cat([self.prompts_BP, self.plain.tokens_BT], 1)
        offsets = torch.arange(self.prompts_BP.shape[1], device=ids_BS.device)
        return ids_BS[row_N[:, None], step_N[:, None] + offsets]


def _batches(rows: np.ndarray, report: ShareProgress) -> Iterator[tuple[np.ndarray, ShareProgress]]:
    """Yield batches of rows, each with a function that receives the share of the batch that is done."""
    for start in range(0, len(rows), BATCH_PROMPTS):
        batch = rows[start : start + BATCH_PROMPTS]

        def batch_report(share: float, start: int = start, size: int = len(batch)) -> None:
            report((start + share * size) / len(rows))

        yield batch, batch_report
