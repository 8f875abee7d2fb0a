"""Evaluate a loaded model on a suite and keep the results in its run directory."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from prism_lightning.evaluation import BATCH_TOKENS
from prism_lightning.evaluation.evaluator import run_suite
from prism_lightning.evaluation.harness import PrismHarnessModel
from prism_lightning.evaluation.results import TaskResult
from prism_lightning.evaluation.suites import SuiteTask
from prism_lightning.evaluation.tasks import build_tasks, why_fewer
from prism_lightning.models import PrismForCausalLM
from prism_lightning.run.directory import RunPaths
from prism_lightning.run.fingerprints import model_fingerprint
from prism_lightning.run.training_data import data_of


def evaluate_run(
    model: PrismForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    run: Path,
    folder: Path,
    suite: dict[str, SuiteTask],
    *,
    data_dir: Path | None = None,
    limit: int | None = None,
    batch_tokens: int = BATCH_TOKENS,
    dtype: str = "fp32",
    report_result: Callable[[TaskResult, str | None], None] = lambda *_: None,
    report_progress: Callable[[str, int, int], None] = lambda *_: None,
) -> list[TaskResult]:
    """Return the results of a suite on a model, one for each task; finished tasks are read from their files.

    Args:
        model: a loaded model, with its interventions applied. It computes on the device where it is.
        tokenizer: of the model.
        run: run directory of the model. Tasks made from validation documents take these from its data.
        folder: where results are kept, see `results.results_folder`.
        suite: tasks by name, from `load_suites`.
        data_dir: folder with TASK/SPLIT.jsonl for tasks of the harness; None for the Hugging Face hub.
        limit: maximum number of documents of each task.
        batch_tokens: tokens in one forward pass, padding included.
        dtype: type that the decoder was loaded in, "fp32" or "bf16"; results of another type are not reused.
        report_result: called after each task with its result and `shortfall_note` of it.
        report_progress: called with a phase, the steps done and the steps in all.

    Raises:
        UserError: as `build_tasks`, or the run's data are missing or damaged.
    """

    @cache
    def validation_texts() -> list[str]:
        return data_of(RunPaths.of(run).root).validation.texts()

    identity: dict[str, Any] = {"model": model_fingerprint(model), "data_dir": str(data_dir) if data_dir else None}
    identity |= {"scalings": model.config.scalings} if model.scalings else {}
    identity |= {"dtype": dtype} if dtype != "fp32" else {}
    tasks = build_tasks(suite, data_dir, validation_texts)

    def report(result: TaskResult) -> None:
        report_result(result, shortfall_note(result, suite[result.task], limit, validation_texts))

    bridge = PrismHarnessModel(model=model, tokenizer=tokenizer, batch_tokens=batch_tokens, report=report_progress)
    return run_suite(bridge, suite, tasks, folder, identity, limit, report)


def shortfall_note(
    result: TaskResult, settings: SuiteTask, limit: int | None, texts: Callable[[], list[str]]
) -> str | None:
    """Return how many documents a task has fewer than requested, and why; None where it has as many.

    Args:
        result: of the task.
        settings: of the task in its suite.
        limit: maximum number of documents of each task, if one was given.
        texts: returns the run's validation documents.
    """
    requested = limit or (0 if settings.kind == "harness" else settings.documents)
    reason = why_fewer(settings, result.documents, requested, texts)
    return f"{result.documents:,} of {requested:,} items: {reason}" if reason else None
