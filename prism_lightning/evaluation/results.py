"""Results of evaluations: a JSON file for each task with its samples beside it, and paired differences of models."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from prism_lightning.common.errors import UserError
from prism_lightning.common.files import read_json, write_json, write_whole
from prism_lightning.common.json_text import as_json
from prism_lightning.common.manifests import mapping, mapping_of, number, optional, problem_in, text, whole
from prism_lightning.common.statistics import normal_interval
from prism_lightning.run.directory import RunPaths

# A metric may be null: the harness gives NaN where it cannot compute one, and JSON has no NaN.
RESULT = {
    "task": text(),
    "metric": text(),
    "chance": optional(number()),
    "metrics": mapping_of(optional(number())),
    "errors": mapping_of(optional(number())),
    "documents": whole(),
    "requests": whole(),
    "cut": whole(),
    "seconds": number(),
    "model_seconds": number(),
    "identity": mapping({}),
}


@dataclass
class TaskResult:
    """The result of one task on one model.

    Attributes:
        task: name of the task.
        metric: the suite's metric.
        chance: score of a guess; None where the metric is not an accuracy.
        metrics, errors: all metrics by the harness's names, and their standard errors.
        documents, requests: number of documents and of requests.
        cut: number of requests that did not fit into the context and lost their beginning.
        seconds, model_seconds: duration in all, and the part of it inside the model.
        identity: everything that the numbers depend on; a result with another identity is not reused.
    """

    task: str
    metric: str
    chance: float | None
    metrics: dict[str, float | None]
    errors: dict[str, float | None]
    documents: int
    requests: int
    cut: int
    seconds: float
    model_seconds: float
    identity: dict[str, Any] = field(default_factory=dict)

    @property
    def value(self) -> float:
        """Value of the suite's metric; NaN where the harness could not compute it."""
        return _or_nan(self.metrics[self.metric])

    @property
    def error(self) -> float:
        """Standard error of the suite's metric; NaN where the harness has none."""
        return _or_nan(self.errors.get(self.metric))


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value


def results_folder(run: Path, interventions: list[str]) -> Path:
    """Return the folder of a run's evaluation results: RUN/evaluation, or a subfolder named by the interventions.

    Args:
        run: run directory, or the exported folder in it.
        interventions: names or paths of the interventions that the model is evaluated with.
    """
    return RunPaths.of(run).evaluation / "+".join(Path(name).stem for name in interventions)


def write_result(folder: Path, result: TaskResult, samples: list[dict[str, Any]]) -> None:
    """Write TASK.samples.jsonl, then TASK.json: a task without the latter is evaluated again."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = "".join(as_json(sample, default=str) + "\n" for sample in samples)
    write_whole(folder / f"{result.task}.samples.jsonl", lines.encode())
    write_json(folder / f"{result.task}.json", asdict(result))


def read_result(folder: Path, task: str, identity: dict[str, Any] | None = None) -> TaskResult | None:
    """Return a finished result; None where it is missing, damaged, or has another identity than the one given."""
    content = read_json(folder / f"{task}.json")
    if content is None or content.keys() != RESULT.keys() or problem_in(content, RESULT):
        return None
    if content["metric"] not in content["metrics"]:
        return None
    result = TaskResult(**content)
    return result if identity is None or result.identity == json.loads(json.dumps(identity)) else None


def sample_values(folder: Path, task: str, metric: str) -> dict[str, float]:
    """Return the metric of every document, by its number and hash.

    Raises:
        UserError: the file is missing or damaged.
    """
    path = folder / f"{task}.samples.jsonl"
    try:
        rows = [json.loads(line) for line in path.read_bytes().splitlines()]
        values = {f"{row['doc_id']} {row['doc_hash']}": row[metric] for row in rows}
        return {document: math.nan if value is None else float(value) for document, value in values.items()}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is missing or damaged: remove {folder / f'{task}.json'} and evaluate again") from error


@dataclass
class Difference:
    """The mean difference of two models over the same documents, with its standard error."""

    task: str
    value: float
    error: float
    documents: int

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval, by the normal approximation."""
        return normal_interval(self.value, self.error)


def paired(first: Path, second: Path, task: str, metric: str) -> Difference:
    """Return the first model's metric minus the second's, document by document; raises as `paired_over_seeds`.

    Args:
        first, second: folders with results.
        task: name of the task.
        metric: an accuracy, which is a mean over documents.
    """
    return paired_over_seeds([(first, second)], task, metric)


def paired_over_seeds(pairs: list[tuple[Path, Path]], task: str, metric: str) -> Difference:
    """Return the difference of two models, averaged over seeds for each document and then over documents.

    Args:
        pairs: results folders of both models, a pair for each seed.
        task: name of the task.
        metric: an accuracy, which is a mean over documents.

    Raises:
        UserError: the models were not all evaluated on the same documents.
    """
    per_pair = [_differences(first, second, task, metric) for first, second in pairs]
    if any(values.keys() != per_pair[0].keys() for values in per_pair):
        raise UserError(f"task {task}: the seeds hold results on different documents; evaluate all the same way")
    values = np.array([[differences[key] for key in per_pair[0]] for differences in per_pair]).mean(0)
    error = float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan
    return Difference(task, float(values.mean()), error, len(values))


def _differences(first: Path, second: Path, task: str, metric: str) -> dict[str, float]:
    minuend, subtrahend = sample_values(first, task, metric), sample_values(second, task, metric)
    if minuend.keys() != subtrahend.keys():
        raise UserError(
            f"task {task}: {first} and {second} hold results on other documents; evaluate both the same way"
        )
    return {key: minuend[key] - subtrahend[key] for key in minuend}


def average(differences: list[Difference]) -> Difference:
    """Return the mean over tasks with equal weights; documents of different tasks count as independent."""
    error = math.sqrt(sum(d.error**2 for d in differences)) / len(differences)
    total = sum(d.documents for d in differences)
    return Difference("average", float(np.mean([d.value for d in differences])), error, total)
