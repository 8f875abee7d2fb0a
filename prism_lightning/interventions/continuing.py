"""Continuations of many prompts, and what is counted in them: behaviours, variety, repetition, likelihood.

Shapes: B prompts of equal length, T tokens.
"""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from transformers import LogitsProcessorList, PreTrainedTokenizerFast, SequenceBiasLogitsProcessor

from prism_lightning.data.tokenizer import encode_batch
from prism_lightning.evaluation.results import Z95
from prism_lightning.interventions.behaviours import Behaviour, Passage
from prism_lightning.interventions.states import batches, text_losses
from prism_lightning.models import PrismForCausalLM

BATCH = 128  # prompts continued at once
REPEATED = 4  # tokens of a repetition


@dataclass
class Sampling:
    """How prompts are continued: `prompt_tokens` of texts, by `new_tokens` at most."""

    prompt_tokens: int = 16
    new_tokens: int = 96
    temperature: float = 1.0
    top_k: int = 0  # 0: all tokens
    seed: int = 0


def prompts(texts: list[str], tokenizer: PreTrainedTokenizerFast, sampling: Sampling, count: int) -> list[list[int]]:
    """Beginnings of texts, as many as there are or as asked for; where texts are few, places further on in them too."""
    encoded = [ids.tolist() for ids in encode_batch(tokenizer, texts)]
    size, apart = sampling.prompt_tokens, sampling.prompt_tokens + sampling.new_tokens
    places = [(at, number) for number, ids in enumerate(encoded) for at in range(0, len(ids) - size, apart)]
    return [encoded[number][at : at + size] for at, number in sorted(places)[:count]]


def continuations_of(
    model: PrismForCausalLM, starts: list[list[int]], sampling: Sampling, bias: WordBias | None = None
) -> list[list[int]]:
    """New tokens of every prompt, up to the end of the text; the same seed for all conditions."""
    found: list[list[int]] = []
    processors = LogitsProcessorList([bias.processor()] if bias else [])
    end = model.generation_config.eos_token_id  # type: ignore[union-attr]
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(sampling.seed)
        for first in range(0, len(starts), BATCH):
            ids_BT = torch.tensor(starts[first : first + BATCH], device=model.device)
            out_BT = model.generate(  # type: ignore[misc]
                ids_BT,
                attention_mask=torch.ones_like(ids_BT),
                do_sample=True,
                temperature=sampling.temperature,
                top_k=sampling.top_k,
                max_new_tokens=sampling.new_tokens,
                pad_token_id=end,
                logits_processor=processors,
            )
            for row in out_BT[:, ids_BT.shape[1] :].tolist():
                found.append(row[: row.index(end)] if end in row else row)
    return found


@dataclass
class WordBias:
    """The cheap rival: so much added to the logits of words, in all their spellings.

    Attributes:
        sequences: token ids of every spelling.
        bias: added to the last token's logit where those before it stand already.
    """

    sequences: list[tuple[int, ...]]
    bias: float

    @classmethod
    def of(cls, words: list[str], tokenizer: PreTrainedTokenizerFast, bias: float) -> WordBias:
        """Spellings: in lower case, upper case and capitalised, with and without a blank before.

        Of a sign, every token of the vocabulary that has it: quotation marks stick to full stops and commas.
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
        """The tokens that the words begin with."""
        return tuple(sorted({ids[0] for ids in self.sequences}))

    def processor(self) -> SequenceBiasLogitsProcessor:
        """For `generate` and `text_losses`."""
        return SequenceBiasLogitsProcessor([[list(ids), self.bias] for ids in self.sequences])


@dataclass
class Counted:
    """What was found in a set of continuations.

    Attributes:
        shown: of each continuation, whether it shows the behaviour.
        distinct: share of different ones among all runs of 1, 2 and 3 tokens.
        repetition: share of runs of four tokens that stood in the same continuation before.
        plain_loss: nats a token, prompts included, under the model as it was given.
        tokens: mean length.
    """

    shown: list[bool]
    distinct: dict[int, float]
    repetition: float
    plain_loss: float
    tokens: float

    @property
    def rate(self) -> float:
        """Share of continuations that show the behaviour."""
        return float(np.mean(self.shown))

    @property
    def interval(self) -> tuple[float, float]:
        """95 % of the rate, by Wilson's score."""
        count, rate = len(self.shown), self.rate
        centre = (rate + Z95**2 / (2 * count)) / (1 + Z95**2 / count)
        half = Z95 / (1 + Z95**2 / count) * math.sqrt(rate * (1 - rate) / count + Z95**2 / (4 * count**2))
        return max(0.0, min(rate, centre - half)), min(1.0, max(rate, centre + half))

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self) | {"rate": self.rate, "interval": self.interval}


def counted(
    plain: PrismForCausalLM,
    starts: list[list[int]],
    new: list[list[int]],
    behaviour: Behaviour,
    tokenizer: PreTrainedTokenizerFast,
) -> Counted:
    """Count in continuations.

    Args:
        plain: the model that says how likely they are.
        starts, new: tokens of prompts and what was added to them.
        behaviour: what is looked for, in the new text alone.
        tokenizer: turns tokens into text.
    """
    texts = [str(text) for text in tokenizer.batch_decode(new)]
    runs = {
        size: [tuple(ids[at : at + size]) for ids in new for at in range(len(ids) - size + 1)] for size in (1, 2, 3)
    }
    repeated = [repetitions(ids) for ids in new]
    whole = [
        Passage(number, [*start, *ids], np.zeros(len(start) + len(ids) - 1, dtype=bool))
        for number, (start, ids) in enumerate(zip(starts, new, strict=True))
    ]
    # Of prompt and continuation; the prompts are the same in all conditions.
    losses, tokens = text_losses(plain, batches(plain, whole), len(whole))
    return Counted(
        shown=[behaviour.present(text) for text in texts],
        distinct={size: len(set(found)) / max(1, len(found)) for size, found in runs.items()},
        repetition=sum(again for again, _ in repeated) / max(1, sum(all_runs for _, all_runs in repeated)),
        plain_loss=float(losses.sum() / tokens.sum()),
        tokens=float(np.mean([len(ids) for ids in new])),
    )


def repetitions(ids: list[int]) -> tuple[int, int]:
    """Runs of four tokens that stood before, and all of them."""
    runs = [tuple(ids[at : at + REPEATED]) for at in range(len(ids) - REPEATED + 1)]
    return len(runs) - len(set(runs)), len(runs)
