"""What an evaluation found: one JSON file a task, its samples beside it, and paired differences of two models."""

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

Z95 = 1.959964
# A metric may be null: one that the harness could not compute is NaN, which JSON does not know.
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
    """One task on one model.

    Attributes:
        metrics, errors: by the harness's names, and their standard errors.
        documents, requests: how many.
        cut: requests whose context did not fit and lost its beginning.
        seconds, model_seconds: in all, and of them inside the model.
        identity: what the numbers depend on; results of another are made anew.
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
        """Of the suite's metric; NaN where the harness could not compute it."""
        return _or_nan(self.metrics[self.metric])

    @property
    def error(self) -> float:
        """Its standard error; NaN where the harness knows none."""
        return _or_nan(self.errors.get(self.metric))


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value


def write_result(folder: Path, result: TaskResult, samples: list[dict[str, Any]]) -> None:
    """TASK.samples.jsonl, then TASK.json: a task without the latter is evaluated again."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = "".join(as_json(sample, default=str) + "\n" for sample in samples)
    write_whole(folder / f"{result.task}.samples.jsonl", lines.encode())
    write_json(folder / f"{result.task}.json", asdict(result))


def read_result(folder: Path, task: str, identity: dict[str, Any] | None = None) -> TaskResult | None:
    """A finished result; None where there is none, it is damaged, or it is of something else than `identity`."""
    content = read_json(folder / f"{task}.json")
    if content is None or content.keys() != RESULT.keys() or problem_in(content, RESULT):
        return None
    if content["metric"] not in content["metrics"]:
        return None
    found = TaskResult(**content)
    return found if identity is None or found.identity == json.loads(json.dumps(identity)) else None


def sample_values(folder: Path, task: str, metric: str) -> dict[str, float]:
    """The metric of every document, by a hash of the document.

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


def normal_interval(value: float, error: float) -> tuple[float, float]:
    """95 % of a value with a standard error."""
    return value - Z95 * error, value + Z95 * error


@dataclass
class Difference:
    """Mean difference of two models over the same documents, with its standard error."""

    task: str
    value: float
    error: float
    documents: int

    @property
    def interval(self) -> tuple[float, float]:
        """95 %, normal."""
        return normal_interval(self.value, self.error)


def paired(one: Path, other: Path, task: str, metric: str) -> Difference:
    """The first model minus the second, document by document; raises as `paired_over_seeds`."""
    return paired_over_seeds([(one, other)], task, metric)


def paired_over_seeds(pairs: list[tuple[Path, Path]], task: str, metric: str) -> Difference:
    """Mean over documents of the difference that a document makes on average over the pairs of results folders.

    Raises:
        UserError: they were not all evaluated on the same documents.
    """
    per_pair = [_differences(one, other, task, metric) for one, other in pairs]
    if any(values.keys() != per_pair[0].keys() for values in per_pair):
        raise UserError(f"task {task}: the seeds hold results on different documents; evaluate all the same way")
    values = np.array([[found[key] for key in per_pair[0]] for found in per_pair]).mean(0)
    error = float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan
    return Difference(task, float(values.mean()), error, len(values))


def _differences(one: Path, other: Path, task: str, metric: str) -> dict[str, float]:
    left, right = sample_values(one, task, metric), sample_values(other, task, metric)
    if left.keys() != right.keys():
        raise UserError(f"task {task}: {one} and {other} hold results on other documents; evaluate both the same way")
    return {key: left[key] - right[key] for key in left}


def average(differences: list[Difference]) -> Difference:
    """The mean over tasks, each counted alike; documents of different tasks are independent."""
    error = math.sqrt(sum(d.error**2 for d in differences)) / len(differences)
    total = sum(d.documents for d in differences)
    return Difference("average", float(np.mean([d.value for d in differences])), error, total)
