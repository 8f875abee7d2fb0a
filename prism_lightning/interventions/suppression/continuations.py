"""Continuations of many prompts under many conditions.

The plain model's continuations are sampled once. Under a condition a continuation is the same up to the first token
that the same noise draws differently from the condition's logits; from there on it is sampled anew.

Shapes: B prompts, P tokens of a prompt, T new tokens at most, D hidden size, k active prototypes, c tokens of context.
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
from prism_lightning.interventions.suppression.generation import GumbelNoise, continued
from prism_lightning.interventions.suppression.progress import ShareProgress
from prism_lightning.interventions.suppression.settings import Sampling
from prism_lightning.models import PrismForCausalLM

BATCH = 128  # prompts continued at once


def prompts(texts: list[str], tokenizer: PreTrainedTokenizerFast, sampling: Sampling, count: int) -> list[list[int]]:
    """Beginnings of texts, as many as there are or as asked for; where texts are few, places further on in them too."""
    encoded = [ids.tolist() for ids in encode_batch(tokenizer, texts)]
    size, apart = sampling.prompt_tokens, sampling.prompt_tokens + sampling.new_tokens
    places = [(at, number) for number, ids in enumerate(encoded) for at in range(0, len(ids) - size, apart)]
    return [encoded[number][at : at + size] for at, number in sorted(places)[:count]]


@dataclass
class Continuations:
    """New tokens of B prompts.

    Attributes:
        tokens_BT: the end of the text included, -1 behind it.
        end: the token that ends a text.
        losses_BT: nats of every token under the plain model, 0 behind the end.
        prompts_BP: losses of the prompts' tokens but the first, the same under all conditions.
    """

    tokens_BT: Tensor
    end: int | None
    losses_BT: Tensor
    prompts_BP: Tensor

    @property
    def text_BT(self) -> Tensor:
        """Which tokens belong to the text."""
        return (self.tokens_BT >= 0) & (self.tokens_BT != (-1 if self.end is None else self.end))

    def ids(self) -> list[list[int]]:
        """The text's tokens by prompt."""
        return [ids[kept].tolist() for ids, kept in zip(self.tokens_BT, self.text_BT, strict=True)]


class Continuer:
    """Continues the same prompts under conditions.

    Args:
        model: the plain model.
        starts: the prompts.
        sampling: temperature, number of new tokens, seed.
        report: hears how far the plain continuations are.
    """

    def __init__(
        self,
        model: PrismForCausalLM,
        starts: list[list[int]],
        sampling: Sampling,
        report: ShareProgress = lambda _: None,
    ) -> None:
        self.model, self.sampling = model, sampling
        self.end = model.generation_config.eos_token_id  # type: ignore[union-attr]
        self.starts_BP = torch.tensor(starts, device=model.device)
        self.noise = GumbelNoise(sampling.seed, sampling.new_tokens, model.config.vocab_size)
        tokens, z = [], []
        for rows, part in _batches(np.arange(len(starts)), report):
            tokens_BT, z_BTD = self._sampled(rows, 0, lambda z_ND, _: model.logits(z_ND), part)
            tokens.append(tokens_BT)
            z.append(z_BTD)
        self.z_BTD = torch.cat(z)
        tokens_BT = torch.cat(tokens)
        with torch.no_grad():
            read_BPD, targets_BP = model.hidden_states(self.starts_BP)[:, :-1], self.starts_BP[:, 1:]
        prompts_BP = self._losses(targets_BP, read_BPD)
        self.plain = Continuations(tokens_BT, self.end, self._losses(tokens_BT, self.z_BTD), prompts_BP)
        self.indices_BTk = torch.cat([model.scaled_terms().assign(z_TD)[0][None] for z_TD in self.z_BTD])

    def under(self, condition: Condition, report: ShareProgress = lambda _: None) -> Continuations:
        """Continuations under a condition."""
        first_B = self._first_changes(condition)
        # Rows sorted by where they change go on together from the first such place among them: those that change later
        # draw the tokens that they have once more.
        changed = sorted(np.flatnonzero(first_B < self.sampling.new_tokens).tolist(), key=lambda row: first_B[row])
        tokens_BT, losses_BT = self.plain.tokens_BT.clone(), self.plain.losses_BT.clone()
        for rows, part in _batches(np.array(changed, dtype=int), report):
            begin = int(first_B[rows[0]])
            new_BT, z_BTD = self._sampled(rows, begin, condition.logits, part)
            tokens_BT[rows, begin:], losses_BT[rows, begin:] = new_BT, self._losses(new_BT, z_BTD)
        report(1.0)
        return replace(self.plain, tokens_BT=tokens_BT, losses_BT=losses_BT)

    def _sampled(
        self, rows_B: np.ndarray, begin: int, logits: Callable[[Tensor, Tensor], Tensor], report: ShareProgress
    ) -> tuple[Tensor, Tensor]:
        ids_BP = self.starts_BP[rows_B]
        if begin:
            ids_BP = torch.cat([ids_BP, self.plain.tokens_BT[rows_B, :begin]], 1)
        steps = range(begin, self.sampling.new_tokens)

        def choose(z_ND: Tensor, context_Nc: Tensor, prompts_N: np.ndarray, step: int) -> Tensor:
            return self._drawn(logits(z_ND, context_Nc), prompts_N, np.full(len(prompts_N), step))

        return continued(self.model, ids_BP, rows_B, steps, choose, self.end, lambda n: report(n / len(steps)))

    def _drawn(self, logits_NV: Tensor, prompts_N: np.ndarray, steps_N: np.ndarray) -> Tensor:
        """Tokens [N], by the noise of their prompts and steps."""
        noise_NV = self.noise(prompts_N, steps_N).to(logits_NV.device)
        return noise_NV.add_(logits_NV, alpha=1 / self.sampling.temperature).argmax(-1)

    def _losses(self, tokens_BT: Tensor, z_BTD: Tensor) -> Tensor:
        losses_BT = torch.zeros(tokens_BT.shape)
        drawn_BT = tokens_BT >= 0
        losses_BT[drawn_BT.cpu()] = token_losses(self.model, z_BTD[drawn_BT], tokens_BT[drawn_BT])
        return losses_BT

    @torch.no_grad()
    def _first_changes(self, condition: Condition) -> np.ndarray:
        """The first step [B] at which another token is drawn; T where there is none."""
        first_B = np.full(len(self.starts_BP), self.sampling.new_tokens)
        tokens_BT = self.plain.tokens_BT
        row_N, step_N = (tokens_BT >= 0).nonzero(as_tuple=True)
        context_Nc = self._context(row_N, step_N)
        may_N = condition.may_redraw(self.indices_BTk[row_N, step_N], tokens_BT[row_N, step_N], context_Nc)
        row_N, step_N, context_Nc = row_N[may_N], step_N[may_N], context_Nc[may_N]
        size = chunk_size(self.model.lm_head.weight)
        for row_C, step_C, context_Cc in zip(*(t.split(size) for t in (row_N, step_N, context_Nc)), strict=True):
            logits_CV = condition.logits(self.z_BTD[row_C, step_C], context_Cc)
            rows, steps = row_C.cpu().numpy(), step_C.cpu().numpy()
            other = (self._drawn(logits_CV, rows, steps) != tokens_BT[row_C, step_C]).cpu().numpy()
            np.minimum.at(first_B, rows[other], steps[other])
        return first_B

    def _context(self, row_N: Tensor, step_N: Tensor) -> Tensor:
        """The P tokens [N, P] before each place."""
        ids_BS = torch.cat([self.starts_BP, self.plain.tokens_BT], 1)
        offsets = torch.arange(self.starts_BP.shape[1], device=ids_BS.device)
        return ids_BS[row_N[:, None], step_N[:, None] + offsets]


def _batches(rows: np.ndarray, report: ShareProgress) -> Iterator[tuple[np.ndarray, ShareProgress]]:
    """Rows a batch at a time, and what hears of each batch's progress."""
    for start in range(0, len(rows), BATCH):
        batch = rows[start : start + BATCH]

        def part(share: float, start: int = start, size: int = len(batch)) -> None:
            report((start + share * size) / len(rows))

        yield batch, part
