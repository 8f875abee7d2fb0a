"""Run a suite on a model, task by task; what is finished is not run again."""

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

BOOTSTRAPS = 100  # of metrics whose standard error has no formula: 1,000 took half of LAMBADA's time
KEPT = ("doc_id", "doc_hash", "prompt_hash", "target", "arguments", "resps")  # of a sample, beside its metrics

# The harness compiles a prompt's template anew for every document, which took more of the time outside the model than
# anything else, and draws a bar for each step of a task.
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
    """Evaluate one task, or read what an earlier call with the same identity found.

    Args:
        model: the bridge.
        name, settings, task: from the suite, and the harness's object.
        folder: where results are kept.
        identity: what they depend on.
        limit: documents at most.
    """
    identity = identity | {"settings": settings.__dict__, "limit": limit, "lm_eval": lm_eval.__version__}
    found = read_result(folder, name, identity)
    if found is not None:
        return found
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
    write_result(folder, result, [{k: v for k, v in s.items() if k in (*KEPT, *s["metrics"])} for s in samples])
    return result


def harness_results(
    model: PrismHarnessModel, tasks: dict[str, ConfigurableTask], limit: int | None, bootstraps: int
) -> dict[str, Any]:
    """What the harness finds: `results` and `samples` by task."""
    given = {"tasks": dict(tasks), "groups": {}, "group_map": {}}
    found = evaluate(model, given, limit=limit, bootstrap_iters=bootstraps)  # type: ignore[arg-type]
    assert found is not None
    return found


def split_metrics(found: dict[str, Any]) -> tuple[dict[str, float], dict[str, float]]:
    """The harness's "acc,none" and "acc_stderr,none" as two mappings by metric."""
    metrics, errors = {}, {}
    for key, value in found.items():
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
    """All tasks of a suite in order; `report` hears of each as it is done."""
    results = []
    for name, settings in suite.items():
        results.append(run_task(model, name, settings, tasks[name], folder, identity, limit))
        report(results[-1])
    return results
