"""Expand a sweep file into its trials. A trial is one run of the sweep."""

from __future__ import annotations

import json
import math
import os
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from itertools import product
from pathlib import Path
from typing import Any

import yaml

from prism_lightning.common.counts import format_count
from prism_lightning.common.errors import UserError
from prism_lightning.config.compose import compose
from prism_lightning.lightning_modules.text_data import TextData
from prism_lightning.sweeps.sweep_file import Sweep, load_sweep

PROGRAM = ("python", "-m", "prism_lightning")
# Settings that the sweep decides, by the part of the sweep file that they follow from.
SETTINGS_BY_AXIS = {"seed": "seed_everything", "dir": "run.dir", "the sweep's name": "run.experiment"}


@dataclass(frozen=True)
class SweepTrial:
    """One run of a sweep.

    Attributes:
        name: Name of its run directory.
        run: Path of its run directory.
        size, variant, seed, tokens: Position in the grid; `tokens` is the exact number of training tokens.
        recipe, settings: Recipe of `fit`, and its `key=value` overrides.
        suites: Suites of `evaluate`.
        steps: Number of optimiser steps.
        block_size: Tokens of a block.
        config: Composed recipe.
    """

    name: str
    run: Path
    size: str
    variant: str
    seed: int
    tokens: int
    recipe: Path
    settings: tuple[str, ...]
    suites: tuple[Path, ...]
    steps: int
    block_size: int
    config: dict[str, Any] = field(compare=False, repr=False)

    def commands(self, evaluate_options: list[str]) -> Iterator[list[str]]:
        """Yield the trial's commands, each as a verb with its arguments: `fit`, then `evaluate`."""
        fit = ["fit", "--config", str(self.recipe)]
        for setting in self.settings:
            key, _, value = setting.partition("=")
            fit += [f"--{key}", value]
        yield fit
        if self.suites:
            yield ["evaluate", "--ckpt_path", str(self.run), "--suite", *map(str, self.suites), *evaluate_options]


def shell_command(command: list[str]) -> str:
    """Return a command as a line for a shell."""
    return shlex.join([*PROGRAM, *command])


def load_trials(path: Path, overrides: list[str]) -> list[SweepTrial]:
    """Return the trials of a sweep file in the file's order; the seed varies fastest.

    Args:
        path: Sweep file.
        overrides: `key=value` settings of every run, which replace those of the file.

    Raises:
        UserError: as `load_sweep`; a recipe does not exist or does not compose; two trials have one name.
    """
    sweep = load_sweep(path)
    token_counts: Sequence[float | None] = sweep.tokens or [None]
    grid = product(sweep.size or [""], token_counts, sweep.variant, sweep.seed)
    trials = [_make_trial(path, sweep, overrides, size, variant, tokens, seed) for size, tokens, variant, seed in grid]
    names = [trial.name for trial in trials]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise UserError(f"{path}: {', '.join(repeated)} would run twice: remove repeated values of an axis")
    return trials


def _make_trial(
    path: Path, sweep: Sweep, overrides: list[str], size: str, variant: str, tokens: float | None, seed: int
) -> SweepTrial:
    try:
        recipe = _relative_to_here(path, sweep.recipe.format(size=size, variant=variant))
    except (KeyError, ValueError, IndexError) as error:
        raise UserError(f"{path}: recipe {sweep.recipe!r} may contain only {{variant}} and {{size}}") from error
    file_settings = {**sweep.settings, **sweep.size.get(size, {})}
    settings = [f"{key}={_as_argument(value)}" for key, value in file_settings.items()] + overrides
    _check_settings(path, settings, tokens)
    config = compose(recipe, settings)
    defaults = {field.name: field.default for field in fields(TextData)}
    data = {name: config.get("data", {}).get(name, defaults[name]) for name in ("batch_size", "block_size")}
    tokens_per_step = math.prod(data.values())
    steps = config.get("trainer", {}).get("max_steps") if tokens is None else round(tokens / tokens_per_step)
    if not isinstance(steps, int) or steps < 1:
        raise UserError(f"{path}: {recipe} has no trainer.max_steps: set it, or give the sweep's axis tokens")
    name = "_".join(part for part in (size, variant, tokens and format_count(tokens), f"seed{seed}") if part)
    run = Path(sweep.dir) / name
    trial_settings = {"trainer.max_steps": steps, "seed_everything": seed, "run.dir": str(run)}
    trial_settings["run.experiment"] = Path(sweep.dir).name
    if not any(setting.startswith("run.tracking_uri=") for setting in settings):
        trial_settings["run.tracking_uri"] = tracking_uri(Path(sweep.dir))
    settings += [f"{key}={_as_argument(value)}" for key, value in trial_settings.items()]
    suites = tuple(_relative_to_here(path, suite) for suite in sweep.suites)
    return SweepTrial(
        name=name, run=run, size=size, variant=variant, seed=seed, tokens=steps * tokens_per_step, recipe=recipe,
        settings=tuple(settings), suites=suites, steps=steps, block_size=data["block_size"],
        config=compose(recipe, settings),
    )  # fmt: skip


def _check_settings(path: Path, settings: list[str], tokens: float | None) -> None:
    """Refuse settings that the sweep decides."""
    decided = SETTINGS_BY_AXIS | ({"tokens": "trainer.max_steps"} if tokens is not None else {})
    keys = {setting.partition("=")[0] for setting in settings}
    problems = [
        f"{path}: {key} is decided by {axis} of the sweep: remove the setting"
        for axis, key in decided.items()
        if key in keys
    ]
    if problems:
        raise UserError(problems)


def tracking_uri(folder: Path) -> str:
    """Return the address of the MLflow database that all runs of a sweep share."""
    return f"sqlite:///{(folder / 'mlflow.db').absolute()}"


def _relative_to_here(sweep_file: Path, name: str) -> Path:
    """Return a path that is relative to the sweep file as one relative to the working directory."""
    return Path(os.path.relpath(sweep_file.parent / name))


def _as_argument(value: Any) -> str:
    """Return a value as a command-line argument: unquoted if YAML reads it back equal, otherwise as JSON."""
    plain = str(value)
    try:
        same = isinstance(value, str | int | float) and yaml.safe_load(plain) == value
    except yaml.YAMLError:
        same = False
    return plain if same and not isinstance(value, bool) else json.dumps(value)
