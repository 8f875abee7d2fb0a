"""Items to fit controllers to, and others to judge them on."""

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

LEAST_ITEMS = 40  # of either side, over all tasks


def split_items(
    model: PrismForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    suite: dict[str, SuiteTask],
    data_dir: Path | None,
    training: Callable[[], list[str]],
    held_out: Callable[[], list[str]],
    items: int,
    seed: int,
    report: Callable[[str, int, int], None],
) -> tuple[Answers, Answers]:
    """Items of a suite's tasks for the fit and for the judgement, none in both.

    A task of the harness that has a training split gives items of that for the fit, and all of those it is scored on
    for the judgement; another is divided at random. Tasks made from the run's documents are made from training
    documents for the fit, from held-out ones for the judgement.

    Args:
        model, tokenizer: as exported.
        suite, data_dir: as `build_tasks` takes them.
        training, held_out: documents of the run.
        items: of each task for the fit, at most.
        seed: of the division.
        report: hears of the forward passes.

    Raises:
        UserError: as `build_tasks` and `record`, or too few items.
    """
    # As many as there are documents for, not as many as the suite evaluates.
    own = {name: replace(settings, documents=items) for name, settings in suite.items() if settings.kind != "harness"}
    tasks = build_tasks({n: s for n, s in suite.items() if n not in own}, data_dir, held_out)
    halves = [build_tasks(own, data_dir, texts) for texts in (training, held_out)] if own else []
    sides: list[list[tuple[str, ConfigurableTask, list[dict[str, Any]]]]] = [[], []]
    for name in suite:
        if name in own:
            both = [(half[name], list(half[name].eval_docs)) for half in halves]
        else:
            both = [(tasks[name], docs) for docs in _divided(tasks[name], seed)]
        both[0] = (both[0][0], both[0][1][:items])
        reason = why_fewer(own.get(name, suite[name]), len(both[0][1]), items, training, "training")
        if reason:
            print(f"note: {name}: {len(both[0][1]):,} of {items:,} items to fit to: {reason}", file=sys.stderr)
        for side, (task, docs) in zip(sides, both, strict=True):
            side += [(name, task, docs)] if docs else []
    counts = [sum(len(docs) for _, _, docs in side) for side in sides]
    if min(counts) < LEAST_ITEMS:
        raise UserError(
            f"{counts[0]} items to fit controllers to and {counts[1]} to judge them on: {LEAST_ITEMS} of each are"
            " needed; give tasks with more documents"
        )
    bridge = AnswerRecorder(model=model, tokenizer=tokenizer, report=report)
    fit, judged = (
        joined([record(bridge, name, task, docs, suite[name].metric) for name, task, docs in side]) for side in sides
    )
    return fit, judged


def _divided(task: ConfigurableTask, seed: int) -> list[list[dict[str, Any]]]:
    """A task's documents for the fit and for the judgement."""
    judged = list(task.eval_docs)
    if task.has_training_docs():
        training = list(task.training_docs())
        order = np.random.default_rng(seed).permutation(len(training)).tolist()
        return [[training[number] for number in order], judged]
    order = np.random.default_rng(seed).permutation(len(judged))
    half = len(order) // 2
    return [[judged[number] for number in sorted(part.tolist())] for part in (order[:half], order[half:])]
