"""A PRISM or dense model as a model of the LM Evaluation Harness.

`lm_eval --model prism --model_args checkpoint=runs/quickstart` finds it once this module is imported. Unlike the
harness's own Hugging Face model it computes the head where a continuation is scored, not at every padded position, and
counts what it had to cut.

Shapes: B rows of a batch, T tokens, n scored positions, D hidden size, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from prism_lightning.evaluation import BATCH_TOKENS
from prism_lightning.models import PrismForCausalLM
from prism_lightning.run.model_folder import load_exported

HEAD_ROWS = 2048  # scored positions whose logits are held at once
Request = tuple[Any, list[int], list[int]]  # what was asked, ids of the context, ids of the continuation


@register_model("prism")
class PrismHarnessModel(HFLM):
    """The bridge. Generation is the harness's; log-likelihoods are computed here.

    Args:
        checkpoint: run directory of a finished fit, or its exported folder.
        model, tokenizer: in its place, loaded already; the model stays where it is.
        batch_tokens: in one forward pass, padding included.
        batch_size: windows of a text that are scored together, for rolling log-likelihoods.
        device: where to load a checkpoint to, see `device_named`; by default CUDA where there is one.
        dtype: of a checkpoint's decoder, fp32 or bf16.
        report: called as the work goes on with what is done, how much of it, and of how much.
    """

    def __init__(
        self,
        checkpoint: str | Path | None = None,
        model: PrismForCausalLM | None = None,
        tokenizer: PreTrainedTokenizerFast | None = None,
        batch_tokens: int = BATCH_TOKENS,
        device: str | None = None,
        dtype: str = "fp32",
        report: Callable[[str, int, int], None] = lambda *_: None,
        batch_size: int | str = 64,
        **ignored: Any,
    ) -> None:
        if model is None or tokenizer is None:
            assert checkpoint is not None, "checkpoint=RUN"
            if device is None or (device.startswith("cuda") and not torch.cuda.is_available()):
                device = "auto"  # the harness's command line asks for cuda:0 everywhere
            model, tokenizer = load_exported(Path(checkpoint), device, dtype)
        super().__init__(
            pretrained=model,
            tokenizer=tokenizer,
            backend="causal",
            max_length=model.config.context_length,
            batch_size=batch_size,
            add_bos_token=False,  # as in training: what stands before a text ends the one before it
        )
        self.prism: PrismForCausalLM = model
        self.batch_tokens, self.report = batch_tokens, report
        self.cut = 0  # requests that did not fit into the context
        self.model_seconds = 0.0

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """See the harness. Its bars are left out: `report` tells of the whole."""
        return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """See the harness: the whole of a text, in windows of the context's length."""
        return super().loglikelihood_rolling(requests, disable_tqdm=True)

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """Sum of a continuation's log-probabilities, and whether greedy decoding would give it, in the given order."""
        groups: dict[tuple[int, ...], list[int]] = {}  # requests that need the same forward pass: " yes" and " no"
        for number, (_, context, continuation) in enumerate(requests):
            whole = context + continuation
            self.cut += len(whole) > self.max_length + 1
            groups.setdefault(tuple(whole[-(self.max_length + 1) : -1]), []).append(number)
        found: list[Any] = [None] * len(requests)
        done = 0
        for batch in self._batches(sorted(groups, key=lambda ids: (-len(ids), ids))):
            asked = [(row, number) for row, ids in enumerate(batch) for number in groups[ids]]
            for (_, number), answer in zip(asked, self._answers(batch, asked, requests), strict=True):
                found[number] = answer
            done += len(asked)
            self.report("log-likelihoods", done, len(requests))
        return found

    def _batches(self, rows: list[tuple[int, ...]]) -> Iterator[list[tuple[int, ...]]]:
        """Rows of descending length, as many as fit at once."""
        first = 0
        while first < len(rows):
            count = max(1, self.batch_tokens // len(rows[first]))
            yield rows[first : first + count]
            first += count

    def _answers(
        self, batch: list[tuple[int, ...]], asked: list[tuple[int, int]], requests: list[Request]
    ) -> list[Any]:
        """For each row and number of a request in `asked`, what `loglikelihood` returns of it."""
        z_nD, targets_n, lengths = self.states(batch, asked, requests)
        started = time.perf_counter()
        scores_n, greedy_n = self._scored(z_nD, targets_n)
        self.model_seconds += time.perf_counter() - started
        sums = [part.sum().item() for part in scores_n.split(lengths)]
        return list(zip(sums, [bool(part.all()) for part in greedy_n.split(lengths)], strict=True))

    @torch.inference_mode()
    def states(
        self, batch: list[tuple[int, ...]], asked: list[tuple[int, int]], requests: list[Request]
    ) -> tuple[Tensor, Tensor, list[int]]:
        """Hidden states and targets of all continuations asked for, one behind the other, and the length of each."""
        longest = len(batch[0])
        # Causal attention never looks at what is padded on the right.
        ids_BT = torch.tensor([[*ids, *[0] * (longest - len(ids))] for ids in batch], device=self.device)
        rows: list[int] = []
        positions: list[int] = []
        targets: list[int] = []
        lengths: list[int] = []
        for row, number in asked:
            continuation = requests[number][2][-len(batch[row]) :]
            end = len(batch[row])
            rows += [row] * len(continuation)
            positions += range(end - len(continuation), end)
            targets += continuation
            lengths.append(len(continuation))
        started = time.perf_counter()
        z_nD = self.prism.hidden_states(ids_BT)[rows, positions]
        self.model_seconds += time.perf_counter() - started
        return z_nD, torch.tensor(targets, device=self.device), lengths

    @torch.inference_mode()
    def _scored(self, z_nD: Tensor, targets_n: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probability of each target, and whether it is the likeliest token, interventions applied."""
        scores, greedy = [], []
        for z_CD, targets_C in zip(z_nD.split(HEAD_ROWS), targets_n.split(HEAD_ROWS), strict=True):
            logits_CV = self.prism.logits(z_CD).float()
            own_C = logits_CV.gather(1, targets_C[:, None])[:, 0]
            scores.append(own_C - logits_CV.logsumexp(-1))
            greedy.append(logits_CV.argmax(-1) == targets_C)
        return torch.cat(scores).cpu(), torch.cat(greedy).cpu()
