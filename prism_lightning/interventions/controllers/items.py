"""Items to fit controllers to, and other items to judge them on."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from lm_eval.api.task import ConfigurableTask
from transformers import PreTrainedTokenizerFast

from prism_lightning.common.errors import UserError
from prism_lightning.evaluation.suites import SuiteTask
from prism_lightning.evaluation.tasks import build_tasks, why_fewer
from prism_lightning.interventions.controllers.answers import AnswerRecorder, Answers, joined, record
from prism_lightning.models import PrismForCausalLM

MIN_ITEMS = 40  # to fit to, and to judge on, over all tasks
Documents = list[dict[str, Any]]
TaskDocuments = tuple[ConfigurableTask, Documents]


def split_items(
    model: PrismForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    suite: dict[str, SuiteTask],
    data_dir: Path | None,
    training: Callable[[], list[str]],
    held_out: Callable[[], list[str]],
    items: int,
    seed: int,
    progress: Callable[[str, int, int], None],
) -> tuple[Answers, Answers]:
    """Return items of a suite's tasks to fit to, and other items to judge on.

    A task of the harness with a training split is fitted to that split and judged on all documents that it is scored
    on. Another task of the harness is divided at random. Tasks made from the run's documents are fitted to training
    documents and judged on held-out ones.

    Args:
        model: A PRISM model.
        tokenizer: Its tokenizer.
        suite: The tasks.
        data_dir: Folder of the tasks' data, as `build_tasks` takes it.
        training: Returns training documents of the run.
        held_out: Returns held-out documents of the run.
        items: Largest number of items of each task to fit to.
        seed: Seed of the division.
        progress: Receives the progress of the forward passes.

    Raises:
        UserError: as `build_tasks` and `record`, or there are too few items.
    """
    fit, judged = _documents(suite, data_dir, training, held_out, items, seed)
    for name, (_, documents) in fit.items():
        settings = suite[name] if suite[name].kind == "harness" else replace(suite[name], documents=items)
        reason = why_fewer(settings, len(documents), items, training, "training")
        if reason:
            print(f"note: {name}: {len(documents):,} of {items:,} items to fit to: {reason}", file=sys.stderr)
    fit_count, judged_count = (sum(len(documents) for _, documents in part.values()) for part in (fit, judged))
    if min(fit_count, judged_count) < MIN_ITEMS:
        raise UserError(
            f"{fit_count} items to fit controllers to and {judged_count} to judge them on: {MIN_ITEMS} of each are"
            " needed; give tasks with more documents"
        )
    bridge = AnswerRecorder(model=model, tokenizer=tokenizer, report=progress)
    fit_items, judged_items = (
        joined([record(bridge, name, *part[name], suite[name].metric) for name in suite if part[name][1]])
        for part in (fit, judged)
    )
    return fit_items, judged_items


def _documents(
    suite: dict[str, SuiteTask],
    data_dir: Path | None,
    training: Callable[[], list[str]],
    held_out: Callable[[], list[str]],
    items: int,
    seed: int,
) -> tuple[dict[str, TaskDocuments], dict[str, TaskDocuments]]:
    """Return the documents of every task to fit to, and those to judge on; arguments as of `split_items`."""
    # Tasks of the run's documents give as many items as there are documents for, not as many as the suite evaluates.
    own = {name: replace(settings, documents=items) for name, settings in suite.items() if settings.kind != "harness"}
    tasks = build_tasks({name: settings for name, settings in suite.items() if name not in own}, data_dir, held_out)
    fit_tasks, judged_tasks = (build_tasks(own, data_dir, texts) if own else {} for texts in (training, held_out))
    fit, judged = {}, {}
    for name in suite:
        if name in own:
            fit_task, judged_task = fit_tasks[name], judged_tasks[name]
            fit_documents, judged_documents = list(fit_task.eval_docs), list(judged_task.eval_docs)
        else:
            fit_task = judged_task = tasks[name]
            fit_documents, judged_documents = _divided(tasks[name], seed)
        fit[name], judged[name] = (fit_task, fit_documents[:items]), (judged_task, judged_documents)
    return fit, judged


def _divided(task: ConfigurableTask, seed: int) -> tuple[Documents, Documents]:
    """Return a task's documents to fit to, and its documents to judge on."""
    scored = list(task.eval_docs)
    if task.has_training_docs():
        training = list(task.training_docs())
        order = np.random.default_rng(seed).permutation(len(training)).tolist()
        return [training[index] for index in order], scored
    order = np.random.default_rng(seed).permutation(len(scored)).tolist()
    half = len(order) // 2
    return [scored[index] for index in sorted(order[:half])], [scored[index] for index in sorted(order[half:])]
