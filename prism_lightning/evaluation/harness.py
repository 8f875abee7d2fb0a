"""A PRISM or dense model as a model of the LM Evaluation Harness.

`lm_eval --model prism --model_args checkpoint=runs/quickstart` finds it once this module is imported. The harness's own
Hugging Face model computes the head at every padded position; this one computes it only where a continuation is scored.
It also counts the requests that it truncates.

Shapes: B rows of a batch, T tokens, n scored positions, D hidden size, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from prism_lightning.data.tokenizer import beginning_alone, beginning_ids
from prism_lightning.evaluation import BATCH_TOKENS
from prism_lightning.models import PrismForCausalLM
from prism_lightning.models.padded_batches import batches_by_length, right_padded
from prism_lightning.run.model_folder import load_exported

HEAD_ROWS = 2048  # scored positions whose logits are in memory at once
Request = tuple[Any, list[int], list[int]]  # the texts, token ids of the context, token ids of the continuation


@register_model("prism")
class PrismHarnessModel(HFLM):
    """The bridge to the harness: computes log-likelihoods; the harness's own class generates.

    Args:
        checkpoint: run directory of a finished fit, or its exported folder.
        model, tokenizer: a loaded model to use instead of a checkpoint; it stays on its device.
        batch_tokens: tokens in one forward pass, padding included.
        batch_size: number of windows of a text that are scored together, for rolling log-likelihoods.
        device: device that a checkpoint is loaded to, see `device_named`; by default CUDA if available.
        dtype: type of a checkpoint's decoder, fp32 or bf16.
        report: called after each forward pass with a phase, the steps done and the steps in all.
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
                device = "auto"  # The harness's command line passes cuda:0 on every machine.
            model, tokenizer = load_exported(Path(checkpoint), device, dtype)
        super().__init__(
            pretrained=model,
            tokenizer=beginning_alone(tokenizer),
            backend="causal",
            max_length=model.config.context_length,
            batch_size=batch_size,
            add_bos_token=bool(beginning_ids(tokenizer)),  # as in training
        )
        self.prism: PrismForCausalLM = model
        self.batch_tokens, self.report = batch_tokens, report
        self.cut = 0  # number of requests that did not fit into the context and lost their beginning
        self.model_seconds = 0.0

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, left_truncate_len: int | None = None, **kwargs: Any
    ) -> list[int]:
        """Return what the harness's method does; a text that spells the beginning is text, and gets the beginning."""
        add_special_tokens = self.add_bos_token if add_special_tokens is None else add_special_tokens
        return super().tok_encode(string, add_special_tokens, left_truncate_len, **kwargs)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return what the harness's method does, without its progress bars; `report` covers all requests."""
        return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return what the harness's method does, without its progress bars; long texts are scored in windows."""
        return super().loglikelihood_rolling(requests, disable_tqdm=True)

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """Return each continuation's summed log-probability, and whether greedy decoding would generate it.

        The results are in the order of the requests.
        """
        # Requests with the same input share a forward pass: " yes" and " no" after one context.
        groups: dict[tuple[int, ...], list[int]] = {}
        for number, (_, context, continuation) in enumerate(requests):
            ids = context + continuation
            self.cut += len(ids) > self.max_length + 1
            groups.setdefault(tuple(ids[-(self.max_length + 1) : -1]), []).append(number)
        answers: list[Any] = [None] * len(requests)
        done = 0
        rows = sorted(groups)
        for indices in batches_by_length(rows, self.batch_tokens):
            batch = [rows[index] for index in indices]
            row_requests = [(row, number) for row, row_ids in enumerate(batch) for number in groups[row_ids]]
            for (_, number), answer in zip(row_requests, self._answers(batch, row_requests, requests), strict=True):
                answers[number] = answer
            done += len(row_requests)
            self.report("log-likelihoods", done, len(requests))
        return answers

    def _answers(
        self, batch: list[tuple[int, ...]], row_requests: list[tuple[int, int]], requests: list[Request]
    ) -> list[Any]:
        """Return what `loglikelihood` returns for each row and request number in `row_requests`."""
        z_nD, targets_n, lengths = self.states(batch, row_requests, requests)
        started = time.perf_counter()
        scores_n, greedy_n = self._scored(z_nD, targets_n)
        self.model_seconds += time.perf_counter() - started
        sums = [part.sum().item() for part in scores_n.split(lengths)]
        return list(zip(sums, [bool(part.all()) for part in greedy_n.split(lengths)], strict=True))

    @torch.inference_mode()
    def states(
        self, batch: list[tuple[int, ...]], row_requests: list[tuple[int, int]], requests: list[Request]
    ) -> tuple[Tensor, Tensor, list[int]]:
        """Return hidden states [n, D] and targets [n] of the requested continuations, concatenated, and their lengths.

        Args:
            batch: token ids of each row.
            row_requests: the row and the number of each requested continuation.
            requests: all requests.
        """
        ids_BT = right_padded(batch, self.device)
        rows: list[int] = []
        positions: list[int] = []
        targets: list[int] = []
        lengths: list[int] = []
        for row, number in row_requests:
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
        """Return each target's log-probability, and whether it is the likeliest token, with interventions applied."""
        scores, greedy = [], []
        for z_CD, targets_C in zip(z_nD.split(HEAD_ROWS), targets_n.split(HEAD_ROWS), strict=True):
            logits_CV = self.prism.logits(z_CD).float()
            target_logits_C = logits_CV.gather(1, targets_C[:, None])[:, 0]
            scores.append(target_logits_C - logits_CV.logsumexp(-1))
            greedy.append(logits_CV.argmax(-1) == targets_C)
        return torch.cat(scores).cpu(), torch.cat(greedy).cpu()
