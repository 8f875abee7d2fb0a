"""Suites: YAML files of tasks to evaluate, each with the metric that is reported and the score of a guess."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from prism_lightning.common.errors import UserError, nearest


@dataclass
class SuiteTask:
    """One task of a suite.

    Args:
        metric: metric of the harness that tables show and that models are compared by.
        chance: score of a guess; none where the metric is not an accuracy.
        kind: "harness", a task of the harness by its name; "validation", the loss on the run's validation documents;
            "continuation", choosing the true continuation of a validation document among those of others.
        documents: maximum number of validation documents, for the kinds that use them.
        context, continuation: number of words of each, for the kind continuation.
        seed: of the kind continuation's random choices.
    """

    metric: str
    chance: float | None = None
    kind: Literal["harness", "validation", "continuation"] = "harness"
    documents: int = 400
    context: int = 60
    continuation: int = 20
    seed: int = 0


def load_suites(paths: list[Path], only: list[str] | None = None) -> dict[str, SuiteTask]:
    """Return the tasks of several suites by name.

    Args:
        paths: of the suites.
        only: names of the tasks to return; None for all.

    Raises:
        UserError: as `load_suite`; two suites give one task different settings; a name in `only` is unknown.
    """
    tasks: dict[str, SuiteTask] = {}
    for path in paths:
        for name, task in load_suite(path).items():
            if tasks.setdefault(name, task) != task:
                raise UserError(f"{path}: another suite gives task {name} other settings: evaluate them one by one")
    unknown = [name for name in only or [] if name not in tasks]
    if unknown:
        suites = ", ".join(map(str, paths))
        raise UserError([f"task {name!r} is not in {suites}: {nearest(name, tasks)}" for name in unknown])
    return {name: task for name, task in tasks.items() if not only or name in only}


def load_suite(path: Path) -> dict[str, SuiteTask]:
    """Return the tasks of a suite by name.

    Raises:
        UserError: the file does not exist, or has an unknown setting or a value of another type.
    """
    if not path.is_file():
        known = [str(file) for folder in (path.parent, Path("evals")) for file in folder.glob("[!.]*.yaml")]
        raise UserError(f"--suite {path}: no such file; {nearest(str(path), set(known))}")
    tasks: dict[str, SuiteTask] = {}
    try:
        content = OmegaConf.to_container(OmegaConf.load(path))
        if not isinstance(content, dict) or list(content) != ["tasks"] or not isinstance(content["tasks"], dict):
            raise UserError(f"{path}: give `tasks`, a mapping from names of tasks to their settings, and nothing else")
        for name, settings in content["tasks"].items():
            merged = OmegaConf.merge(OmegaConf.structured(SuiteTask), settings or {})
            tasks[str(name)] = OmegaConf.to_object(merged)  # type: ignore[assignment]
    except (OmegaConfBaseException, YAMLError) as error:
        key = getattr(error, "full_key", None)
        raise UserError(f"{path}: {f'{key}: ' if key else ''}{str(error).splitlines()[0]}") from error
    return tasks
