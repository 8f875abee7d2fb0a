"""Run a suite on a model, task by task; finished tasks are not run again."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import lm_eval
import lm_eval.api.task
import lm_eval.utils
from lm_eval.api.task import ConfigurableTask
from lm_eval.evaluator import evaluate
from tqdm import tqdm

from prism_lightning.evaluation.harness import PrismHarnessModel
from prism_lightning.evaluation.results import TaskResult, read_result, write_result
from prism_lightning.evaluation.suites import SuiteTask

BOOTSTRAPS = 100  # for metrics whose standard error has no formula: 1,000 took half of LAMBADA's time
SAMPLE_FIELDS = ("doc_id", "doc_hash", "prompt_hash", "target", "arguments", "resps")  # kept beside a sample's metrics

# The harness compiles a prompt's template for every document, which took most of the time outside the model. It also
# shows a progress bar for each step of a task.
lm_eval.utils.env.from_string = cache(lm_eval.utils.env.from_string)  # type: ignore[method-assign]
lm_eval.api.task.tqdm = partial(tqdm, disable=True)  # type: ignore[misc,assignment]


def run_task(
    model: PrismHarnessModel,
    name: str,
    settings: SuiteTask,
    task: ConfigurableTask,
    folder: Path,
    identity: dict[str, Any],
    limit: int | None = None,
) -> TaskResult:
    """Evaluate one task and write its result, or read the result of an earlier call with the same identity.

    Args:
        model: the bridge to the harness.
        name, settings: the task's name and settings in the suite.
        task: the harness's object of the task.
        folder: where results are kept.
        identity: everything that the results depend on besides the settings, the limit and the harness's version.
        limit: maximum number of documents.
    """
    identity = identity | {"settings": settings.__dict__, "limit": limit, "lm_eval": lm_eval.__version__}
    earlier_result = read_result(folder, name, identity)
    if earlier_result is not None:
        return earlier_result
    model.cut, model.model_seconds, started = 0, 0.0, time.perf_counter()
    results = harness_results(model, {name: task}, limit, BOOTSTRAPS)
    metrics, errors = split_metrics(results["results"][name])
    samples = results["samples"][name]
    result = TaskResult(
        task=name,
        metric=settings.metric,
        chance=settings.chance,
        metrics={**metrics},
        errors={**errors},
        documents=len(samples),
        requests=sum(len(sample["arguments"]) for sample in samples),
        cut=model.cut,
        seconds=time.perf_counter() - started,
        model_seconds=model.model_seconds,
        identity=identity,
    )
    write_result(folder, result, [_kept_fields(sample) for sample in samples])
    return result


def _kept_fields(sample: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in sample.items() if name in (*SAMPLE_FIELDS, *sample["metrics"])}


def harness_results(
    model: PrismHarnessModel, tasks: dict[str, ConfigurableTask], limit: int | None, bootstraps: int
) -> dict[str, Any]:
    """Return the harness's `results` and `samples` by task."""
    task_tree = {"tasks": dict(tasks), "groups": {}, "group_map": {}}
    results = evaluate(model, task_tree, limit=limit, bootstrap_iters=bootstraps)  # type: ignore[arg-type]
    assert results is not None
    return results


def split_metrics(results: dict[str, Any]) -> tuple[dict[str, float], dict[str, float]]:
    """Return metrics and standard errors by metric; the harness calls them "acc,none" and "acc_stderr,none"."""
    metrics, errors = {}, {}
    for key, value in results.items():
        name = key.split(",")[0]
        if "," not in key or not isinstance(value, int | float):
            continue
        if name.endswith("_stderr"):
            errors[name.removesuffix("_stderr")] = float(value)
        else:
            metrics[name] = float(value)
    return metrics, errors


def run_suite(
    model: PrismHarnessModel,
    suite: dict[str, SuiteTask],
    tasks: dict[str, ConfigurableTask],
    folder: Path,
    identity: dict[str, Any],
    limit: int | None,
    report: Callable[[TaskResult], None],
) -> list[TaskResult]:
    """Return the results of a suite's tasks in order; `report` is called with each result."""
    results = []
    for name, settings in suite.items():
        results.append(run_task(model, name, settings, tasks[name], folder, identity, limit))
        report(results[-1])
    return results
