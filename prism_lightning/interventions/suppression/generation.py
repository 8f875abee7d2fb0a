"""Sampled continuations with a key-value cache, and noise that depends on the seed, the prompt and the step alone.

A token is the argmax of its logits plus Gumbel noise, which is a sample of their softmax (the Gumbel-max trick). The
noise is the same under all conditions, so a condition that does not change the logits does not change the token.

Shapes: B prompts, P tokens of a prompt, T new tokens, V vocabulary, D hidden size, c tokens of context, n rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from prism_lightning.models import PrismForCausalLM

NOISE_ROWS = 32  # rows of noise computed at once: at V 4,096 they stay in the processor's cache
MIN_ACTIVE_SHARE = 7 / 8  # share of unfinished rows, below which the cache drops the finished ones

# From hidden states [n, D], the context [n, c], the prompts' numbers [n] and the step to tokens [n].
Choose = Callable[[Tensor, Tensor, np.ndarray, int], Tensor]


class GumbelNoise:
    """Standard Gumbel noise of every prompt, step and token: each has its place in one stream of random numbers.

    Args:
        seed: Seed of the stream.
        steps: T, the number of steps of a prompt.
        vocabulary: V.
    """

    def __init__(self, seed: int, steps: int, vocabulary: int) -> None:
        self.bits = np.random.PCG64DXSM(seed)
        self.generator = np.random.Generator(self.bits)
        self.steps, self.vocabulary = steps, vocabulary
        self.place = 0  # in 64-bit draws, each of which gives two numbers

    def __call__(self, prompts_n: Sequence[int] | np.ndarray, steps_n: Sequence[int] | np.ndarray) -> Tensor:
        """Return noise [n, V] on the CPU, for n pairs of a prompt's number and a step."""
        draws = (self.vocabulary + 1) // 2
        noise_nV = np.empty((len(prompts_n), self.vocabulary), np.float32)
        for row, (prompt, step) in enumerate(zip(prompts_n, steps_n, strict=True)):
            start = (int(prompt) * self.steps + int(step)) * draws
            self.bits.advance((start - self.place) % 2**128)
            self.generator.random(out=noise_nV[row], dtype=np.float32)
            self.place = start + draws
        uniform = torch.from_numpy(noise_nV)
        for part in uniform.split(NOISE_ROWS):
            # -log(-log1p(-u)) in place: 15 microseconds for 4,096 tokens with the draw, torch's exponential_ takes 77.
            # Uniform numbers are multiples of 2^-24; half of one is added, since 0 would give infinite noise.
            part.add_(2**-25).neg_().log1p_().neg_().log_().neg_()
        return uniform


class BufferedLayer(DynamicLayer):
    """Keys and values of one layer in a buffer of full length; concatenation would copy all of them for every token."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length = length

    def update(self, key_states: Tensor, value_states: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        start = self.get_seq_length()
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.buffers = [
                states.new_empty(*states.shape[:2], self.length, states.shape[3])
                for states in (key_states, value_states)
            ]
        end = start + key_states.shape[2]
        for buffer, states in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[:, :, start:end] = states
        self.keys, self.values = (buffer[:, :, :end] for buffer in self.buffers)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        end = self.get_seq_length()
        self.buffers = [buffer[indices] for buffer in self.buffers]
        self.keys, self.values = (buffer[:, :, :end] for buffer in self.buffers)


def buffered_cache(model: PrismForCausalLM, length: int) -> DynamicCache:
    """Return a key-value cache for sequences of up to `length` tokens; only plain layers get a buffer."""
    cache = DynamicCache(config=model.backbone.config)
    cache.layers = [BufferedLayer(length) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


@torch.no_grad()
def sample_continuations(
    model: PrismForCausalLM,
    ids_BP: Tensor,
    prompts_B: np.ndarray,
    steps: range,
    choose: Choose,
    end: int | None,
    report: Callable[[int], None] = lambda _: None,
) -> tuple[Tensor, Tensor]:
    """Continue sequences of equal length by one token per step, up to the end of the text.

    Args:
        model: The model that computes hidden states.
        ids_BP: The sequences.
        prompts_B: Numbers of the prompts, for `choose`.
        steps: Steps of the new tokens.
        choose: Returns the token of each unfinished sequence.
        end: The token that ends a text.
        report: Receives the number of steps done.

    Returns:
        Tokens [B, T] with the one that ends the text, and -1 after it. Hidden states [B, T, D] that they were chosen
        from.
    """
    count, head = len(ids_BP), model.lm_head.weight
    cache = buffered_cache(model, ids_BP.shape[1] + len(steps))
    tokens_BT = torch.full((count, len(steps)), -1, dtype=torch.long, device=ids_BP.device)
    z_BTD = head.new_zeros(count, len(steps), head.shape[1])
    rows = torch.arange(count, device=ids_BP.device)
    unfinished = torch.ones(count, dtype=torch.bool, device=ids_BP.device)
    input_ids = context = ids_BP
    for number, step in enumerate(steps):
        outputs = model.backbone(input_ids=input_ids, past_key_values=cache, use_cache=True)
        z = outputs.last_hidden_state[:, -1].to(head.dtype)
        z_BTD[rows[unfinished], number] = z[unfinished]
        chosen = torch.full((len(rows),), end or 0, dtype=torch.long, device=ids_BP.device)
        chosen[unfinished] = choose(z[unfinished], context[unfinished], prompts_B[rows[unfinished].cpu().numpy()], step)
        tokens_BT[rows[unfinished], number] = chosen[unfinished]
        if end is not None:
            unfinished = unfinished & (chosen != end)
        report(number + 1)
        if not unfinished.any():
            break
        if unfinished.float().mean() < MIN_ACTIVE_SHARE:
            cache.batch_select_indices(unfinished.nonzero()[:, 0])
            rows, chosen, context = (tensor[unfinished] for tensor in (rows, chosen, context))
            unfinished = unfinished[unfinished]
        context = torch.cat([context[:, 1:], chosen[:, None]], 1)
        input_ids = chosen[:, None]
    return tokens_BT, z_BTD
