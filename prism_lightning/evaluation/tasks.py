"""The harness's task objects for a suite: official ones from the hub or from local files, and those of our own."""

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
from prism_lightning.evaluation.continuations import continuations, long_enough
from prism_lightning.evaluation.suites import SuiteTask

Texts = Callable[[], list[str]]  # the run's validation documents, read when a task needs them


def build_tasks(suite: dict[str, SuiteTask], data_dir: Path | None, texts: Texts) -> dict[str, ConfigurableTask]:
    """Task objects by name; all that is missing is said at once.

    Args:
        suite: from `load_suite`.
        data_dir: folder with NAME/SPLIT.jsonl for each official task; without it, the hub.
        texts: the run's validation documents.

    Raises:
        UserError: an unknown task, missing files, or no network.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    problems, tasks = [], {}
    for name, settings in suite.items():
        try:
            if settings.kind == "harness":
                tasks[name] = _official(_manager(), name, data_dir)
            else:
                tasks[name] = _own(name, settings, texts())
            known = tasks[name].aggregation()
            if settings.metric not in known:
                problems.append(f"task {name} has no metric {settings.metric!r}: {nearest(settings.metric, known)}")
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(problems)
    return tasks


def why_fewer(settings: SuiteTask, documents: int, asked: int, texts: Texts, split: str = "validation") -> str | None:
    """Why a task has fewer documents than were asked for, in words; None where it has as many.

    Args:
        settings: of the task.
        documents: that it has.
        asked: documents that were asked for.
        texts: of the run's split, which tasks of our own are made from.
        split: its name.
    """
    if documents >= asked:
        return None
    if settings.kind == "harness":
        return "its data have no more"
    if settings.documents < asked and documents >= settings.documents:
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
    """The harness's list of tasks, which takes seconds to read."""
    return TaskManager()


def _official(manager: TaskManager, name: str, data_dir: Path | None) -> ConfigurableTask:
    if name not in manager.all_subtasks:
        raise UserError(f"the harness has no task {name!r}: {nearest(name, manager.all_subtasks)}")
    overrides: dict[str, Any] = {"task": name}
    if data_dir is not None:
        found = sorted((data_dir / name).glob("*.jsonl"))
        if not found:
            raise UserError(f"{data_dir / name} has no SPLIT.jsonl: put the data of task {name} there")
        files = {path.stem: str(path.resolve()) for path in found}
        overrides |= {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": files}}
        if "train" not in files:  # zero-shot: nothing is read from it
            overrides |= {"training_split": None, "fewshot_split": None}
    try:
        # A group of one, since only groups override what is registered.
        loaded = manager.load({"group": "prism", "task": [overrides]})["tasks"]
    except (KeyError, ValueError, OSError, datasets.exceptions.DatasetsError) as error:
        where = f"{data_dir / name} lacks a split or a column" if data_dir else "the data set cannot be fetched"
        raise UserError(
            f"task {name}: {where} ({' '.join(str(error).split())[:160]}); with --data_dir FOLDER its files are read"
            f" from FOLDER/{name}/SPLIT.jsonl"
        ) from error
    (task,) = loaded.values()
    return task


def _own(name: str, settings: SuiteTask, texts: list[str]) -> ConfigurableTask:
    config: dict[str, Any] = {"task": name, "test_split": "test"}
    if settings.kind == "validation":
        rows: list[dict[str, Any]] = [{"text": text} for text in texts[: settings.documents] if text.strip()]
        metrics = ["word_perplexity", "byte_perplexity", "bits_per_byte"]
        config |= {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}"}
        config["metric_list"] = [{"metric": metric} for metric in metrics]
    else:
        rows = continuations(texts, settings.documents, settings.context, settings.continuation, settings.seed)
        config |= {"output_type": "multiple_choice", "doc_to_text": "{{context}}", "doc_to_choice": "{{choices}}"}
        config |= {"doc_to_target": "label"}
        config["metric_list"] = [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}]
    if not rows:
        raise UserError(f"task {name}: the run has no validation documents")
    config["custom_dataset"] = lambda **_: {"test": datasets.Dataset.from_list(rows)}
    return ConfigurableTask(config=config)
