"""Suites: YAML files that say which tasks are evaluated, which metric counts, and what a guess would score."""

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
        metric: of the harness, that tables show and models are compared by.
        chance: what a guess scores; none where the metric is not an accuracy.
        kind: "harness", a task of the harness by its name; "validation", the loss on the run's validation documents;
            "continuation", their continuations among others'.
        documents: of the kinds that take them from the run's validation split, at most.
        context, continuation: words of each, for the kind continuation.
        seed: of what is drawn.
    """

    metric: str
    chance: float | None = None
    kind: Literal["harness", "validation", "continuation"] = "harness"
    documents: int = 400
    context: int = 60
    continuation: int = 20
    seed: int = 0


def load_suites(paths: list[Path], only: list[str] | None = None) -> dict[str, SuiteTask]:
    """The tasks of several suites, or some of them.

    Raises:
        UserError: as `load_suite`, or two suites that give one task other settings.
    """
    tasks: dict[str, SuiteTask] = {}
    for path in paths:
        for name, task in load_suite(path).items():
            if tasks.setdefault(name, task) != task:
                raise UserError(f"{path}: another suite gives task {name} other settings: evaluate them one by one")
    stray = [name for name in only or [] if name not in tasks]
    if stray:
        where = ", ".join(map(str, paths))
        raise UserError([f"task {name!r} is not in {where}: {nearest(name, tasks)}" for name in stray])
    return {name: task for name, task in tasks.items() if not only or name in only}


def load_suite(path: Path) -> dict[str, SuiteTask]:
    """The tasks of a suite by name.

    Raises:
        UserError: no such file, an unknown setting, or a value of another type.
    """
    if not path.is_file():
        known = [str(file) for folder in (path.parent, Path("evals")) for file in folder.glob("[!.]*.yaml")]
        raise UserError(f"--suite {path}: no such file; {nearest(str(path), set(known))}")
    tasks: dict[str, SuiteTask] = {}
    try:
        found = OmegaConf.to_container(OmegaConf.load(path))
        if not isinstance(found, dict) or list(found) != ["tasks"] or not isinstance(found["tasks"], dict):
            raise UserError(f"{path}: give `tasks`, a mapping from names of tasks to their settings, and nothing else")
        for name, settings in found["tasks"].items():
            merged = OmegaConf.merge(OmegaConf.structured(SuiteTask), settings or {})
            tasks[str(name)] = OmegaConf.to_object(merged)  # type: ignore[assignment]
    except (OmegaConfBaseException, YAMLError) as error:
        where = getattr(error, "full_key", None)
        raise UserError(f"{path}: {f'{where}: ' if where else ''}{str(error).splitlines()[0]}") from error
    return tasks
