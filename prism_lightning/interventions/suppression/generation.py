"""Sampled continuations with a key-value cache and noise that depends on the seed, the prompt and the place alone.

A token is the argmax of its logits plus Gumbel noise, which is a sample of their softmax (the Gumbel-max trick). The
noise is the same under all conditions, so where a condition leaves the logits as they are the token stays as it is.

Shapes: B prompts, P tokens of a prompt, T new tokens, V vocabulary, D hidden size, c tokens of context.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from prism_lightning.models import PrismForCausalLM

NOISE_ROWS = 32  # rows of noise made at once: at V 4,096 they stay in the processor's cache
KEPT = 7 / 8  # share of rows that still continue, below which the cache drops the others

# Hidden states [n, D] and the context [n, c] before the token, numbers of the prompts and the step in; tokens [n] out.
Choose = Callable[[Tensor, Tensor, np.ndarray, int], Tensor]


class GumbelNoise:
    """Standard Gumbel noise of every prompt, step and token: a jump into one stream of random numbers.

    Args:
        seed: of the stream.
        steps, vocabulary: T and V.
    """

    def __init__(self, seed: int, steps: int, vocabulary: int) -> None:
        self.bits = np.random.PCG64DXSM(seed)
        self.generator = np.random.Generator(self.bits)
        self.steps, self.vocabulary = steps, vocabulary
        self.place = 0  # in 64-bit draws; each gives two numbers

    def __call__(self, prompts_n: Sequence[int] | np.ndarray, steps_n: Sequence[int] | np.ndarray) -> Tensor:
        """[n, V] on the CPU, for n pairs of a prompt's number and a step."""
        draws = (self.vocabulary + 1) // 2
        noise_nV = np.empty((len(prompts_n), self.vocabulary), np.float32)
        for row, (prompt, step) in enumerate(zip(prompts_n, steps_n, strict=True)):
            start = (int(prompt) * self.steps + int(step)) * draws
            self.bits.advance((start - self.place) % 2**128)
            self.generator.random(out=noise_nV[row], dtype=np.float32)
            self.place = start + draws
        uniform = torch.from_numpy(noise_nV)
        for part in uniform.split(NOISE_ROWS):
            # Multiples of 2^-24 moved by half of one: 0 would be infinite noise and win. -log(-log1p(-u)), in place:
            # torch's own exponential_ takes 77 microseconds for 4,096 tokens, the draw and this 15.
            part.add_(2**-25).neg_().log1p_().neg_().log_().neg_()
        return uniform


class BufferedLayer(DynamicLayer):
    """Keys and values of one layer in a buffer of full length: concatenating copies all of them for every token."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length = length

    def update(self, key_states: Tensor, value_states: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        before = self.get_seq_length()
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.buffers = [
                states.new_empty(*states.shape[:2], self.length, states.shape[3])
                for states in (key_states, value_states)
            ]
        end = before + key_states.shape[2]
        for buffer, states in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[:, :, before:end] = states
        self.keys, self.values = (buffer[:, :, :end] for buffer in self.buffers)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        end = self.get_seq_length()
        self.buffers = [buffer[indices] for buffer in self.buffers]
        self.keys, self.values = (buffer[:, :, :end] for buffer in self.buffers)


def buffered_cache(model: PrismForCausalLM, length: int) -> DynamicCache:
    """A key-value cache for sequences of up to `length` tokens; layers of other kinds than plain ones stay theirs."""
    cache = DynamicCache(config=model.backbone.config)
    cache.layers = [BufferedLayer(length) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


@torch.no_grad()
def continued(
    model: PrismForCausalLM,
    ids_BP: Tensor,
    prompts_B: np.ndarray,
    steps: range,
    choose: Choose,
    end: int | None,
    report: Callable[[int], None] = lambda _: None,
) -> tuple[Tensor, Tensor]:
    """Continue sequences of equal length, one token a step, up to the end of the text.

    Args:
        model: whose hidden states are computed.
        ids_BP: what is continued.
        prompts_B: numbers of the prompts, for `choose`.
        steps: of the new tokens.
        choose: gives the tokens.
        end: the token that ends a text.
        report: hears of the number of steps done.

    Returns:
        Tokens [B, len(steps)], the end's included and -1 behind it, and the hidden states [B, len(steps), D] that
        they were chosen by.
    """
    count, head = len(ids_BP), model.lm_head.weight
    cache = buffered_cache(model, ids_BP.shape[1] + len(steps))
    tokens_BT = torch.full((count, len(steps)), -1, dtype=torch.long, device=ids_BP.device)
    z_BTD = head.new_zeros(count, len(steps), head.shape[1])
    rows, going = torch.arange(count, device=ids_BP.device), torch.ones(count, dtype=torch.bool, device=ids_BP.device)
    fed = context = ids_BP
    for number, step in enumerate(steps):
        outputs = model.backbone(input_ids=fed, past_key_values=cache, use_cache=True)
        z = outputs.last_hidden_state[:, -1].to(head.dtype)
        z_BTD[rows[going], number] = z[going]
        chosen = torch.full((len(rows),), end or 0, dtype=torch.long, device=ids_BP.device)
        chosen[going] = choose(z[going], context[going], prompts_B[rows[going].cpu().numpy()], step)
        tokens_BT[rows[going], number] = chosen[going]
        if end is not None:
            going = going & (chosen != end)
        report(number + 1)
        if not going.any():
            break
        if going.float().mean() < KEPT:
            cache.batch_select_indices(going.nonzero()[:, 0])
            rows, chosen, context, going = rows[going], chosen[going], context[going], going[going]
        context = torch.cat([context[:, 1:], chosen[:, None]], 1)
        fed = chosen[:, None]
    return tokens_BT, z_BTD
