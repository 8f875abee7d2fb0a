"""Run directories of a report: which there are, and the content of their files, checked."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import yaml

from prism_lightning.common.errors import UserError
from prism_lightning.common.manifests import Kind, problem_in
from prism_lightning.run.directory import RECIPE_NAME, RunPaths

RETROFIT = "retrofit"  # the group of a recipe that `retrofit` recorded


def run_folders(folders: Iterable[Path]) -> list[Path]:
    """Return the run directories in some folders and below.

    Raises:
        UserError: a folder does not exist.
    """
    folders = list(folders)
    missing = [f"--runs {folder}: no such folder" for folder in folders if not folder.is_dir()]
    if missing:
        raise UserError(missing)
    recipes = [path for folder in folders for path in sorted(folder.rglob(RECIPE_NAME))]
    return list({path.parent.resolve(): path.parent for path in recipes}.values())


def is_retrofit(run_folder: Path) -> bool:
    """Return whether a run directory's recipe was recorded by `retrofit`."""
    try:
        return RETROFIT in yaml.safe_load(RunPaths(run_folder).recipe.read_text())
    except (OSError, ValueError, TypeError, RecursionError, yaml.YAMLError):
        return False


def read_checked(
    path: Path, fields: dict[str, Kind], read: Callable[[Path], Any], again: str = "run its `fit` again"
) -> dict[str, Any]:
    """Return the content of a run's file; raise UserError if it cannot be read or an entry has a wrong type."""
    try:
        content = read(path)
        problem = problem_in(content, fields)
    except (OSError, ValueError, IndexError, RecursionError, yaml.YAMLError) as error:
        problem = " ".join(str(error).split())[:120] or type(error).__name__
    if problem:
        raise UserError(f"{path} is damaged ({problem}): {again}")
    return content
