"""Task objects of the harness for a suite: its own tasks, and tasks made from a run's validation documents."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import datasets
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks import TaskManager

from prism_lightning.common.errors import UserError, nearest
from prism_lightning.evaluation.continuation_questions import continuations, long_enough
from prism_lightning.evaluation.suites import SuiteTask

Texts = Callable[[], list[str]]  # returns the run's validation documents, which are read when a task needs them


def build_tasks(suite: dict[str, SuiteTask], data_dir: Path | None, texts: Texts) -> dict[str, ConfigurableTask]:
    """Return the task objects by name.

    Args:
        suite: tasks by name, from `load_suite`.
        data_dir: folder with NAME/SPLIT.jsonl for each task of the harness; None for the Hugging Face hub.
        texts: returns the run's validation documents.

    Raises:
        UserError: unknown tasks or metrics, missing files, or no network; one error names all problems.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    problems, tasks = [], {}
    for name, settings in suite.items():
        try:
            if settings.kind == "harness":
                tasks[name] = _harness_task(_manager(), name, data_dir)
            else:
                tasks[name] = OWN_KINDS[settings.kind](name, settings, texts())
            metrics = tasks[name].aggregation()
            if settings.metric not in metrics:
                problems.append(f"task {name} has no metric {settings.metric!r}: {nearest(settings.metric, metrics)}")
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(problems)
    return tasks


def why_fewer(
    settings: SuiteTask, documents: int, requested: int, texts: Texts, split: str = "validation"
) -> str | None:
    """Return why a task has fewer documents than requested, in words; None where it has as many.

    Args:
        settings: the task's settings in its suite.
        documents: number of documents that the task has.
        requested: number of documents that were requested.
        texts: returns the documents of the run's split, which our own tasks are made from.
        split: name of that split in the message.
    """
    if documents >= requested:
        return None
    if settings.kind == "harness":
        return "its data have no more"
    if settings.documents < requested and documents >= settings.documents:
        return f"the suite's setting `documents` is {settings.documents:,}"
    if settings.kind == "validation":
        return f"the run's {split} split has no more"
    length = settings.context + settings.continuation
    return (
        f"of {len(texts()):,} {split} documents {len(long_enough(texts(), length)):,} have the {length} words that a"
        " question takes"
    )


@cache
def _manager() -> TaskManager:
    """Return the harness's list of tasks, which takes seconds to read."""
    return TaskManager()


def _harness_task(manager: TaskManager, name: str, data_dir: Path | None) -> ConfigurableTask:
    if name not in manager.all_subtasks:
        raise UserError(f"the harness has no task {name!r}: {nearest(name, manager.all_subtasks)}")
    overrides: dict[str, Any] = {"task": name}
    if data_dir is not None:
        paths = sorted((data_dir / name).glob("*.jsonl"))
        if not paths:
            raise UserError(f"{data_dir / name} has no SPLIT.jsonl: put the data of task {name} there")
        files = {path.stem: str(path.resolve()) for path in paths}
        overrides |= {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": files}}
        if "train" not in files:  # Zero-shot evaluation reads nothing from it.
            overrides |= {"training_split": None, "fewshot_split": None}
    try:
        # Only groups override what is registered, so this is a group of one task.
        loaded = manager.load({"group": "prism", "task": [overrides]})["tasks"]
    except (KeyError, ValueError, OSError, datasets.exceptions.DatasetsError) as error:
        problem = f"{data_dir / name} lacks a split or a column" if data_dir else "the data set cannot be fetched"
        raise UserError(
            f"task {name}: {problem} ({' '.join(str(error).split())[:160]}); with --data_dir FOLDER its files are read"
            f" from FOLDER/{name}/SPLIT.jsonl"
        ) from error
    (task,) = loaded.values()
    return task


def _validation_task(name: str, settings: SuiteTask, texts: list[str]) -> ConfigurableTask:
    """Return the task of predicting whole validation documents."""
    rows = [{"text": text} for text in texts[: settings.documents] if text.strip()]
    metrics = [{"metric": metric} for metric in ("word_perplexity", "byte_perplexity", "bits_per_byte")]
    config = {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}"}
    return _own_task(name, rows, config | {"metric_list": metrics})


def _continuation_task(name: str, settings: SuiteTask, texts: list[str]) -> ConfigurableTask:
    """Return the task of choosing the true continuation of a validation document among four."""
    rows = continuations(texts, settings.documents, settings.context, settings.continuation, settings.seed)
    metrics = [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}]
    config = {"output_type": "multiple_choice", "doc_to_text": "{{context}}", "doc_to_choice": "{{choices}}"}
    return _own_task(name, rows, config | {"doc_to_target": "label", "metric_list": metrics})


def _own_task(name: str, rows: list[dict[str, Any]], config: dict[str, Any]) -> ConfigurableTask:
    if not rows:
        raise UserError(f"task {name}: the run has no validation documents")
    dataset = {"test": datasets.Dataset.from_list(rows)}
    config = {"task": name, "test_split": "test"} | config | {"custom_dataset": lambda **_: dataset}
    return ConfigurableTask(config=config)


OWN_KINDS = {"validation": _validation_task, "continuation": _continuation_task}
