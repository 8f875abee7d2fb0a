"""A sweep file and the trials it spells out.

```yaml
dir: runs/ladder
recipe: ../{variant}_{size}.yaml          # both placeholders are optional
variant: [dense, prism]
size: {130m: {}, wide: {model.backbone.n_embd: 1024}}
tokens: [1e9, 2e9]
seed: [0, 1]
settings: {data.path: text/*.jsonl}
suites: [../../evals/downstream.yaml]
```
"""

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
from omegaconf import OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from prism_lightning.common.errors import UserError, nearest
from prism_lightning.config.compose import compose
from prism_lightning.lightning_modules.text_data import TextData

PROGRAM = ("python", "-m", "prism_lightning")


@dataclass
class Sweep:
    """A grid of runs.

    Args:
        dir: folder of all run directories and of the sweep's own records.
        recipe: of every run, relative to the sweep file; `{variant}` and `{size}` stand for their names.
        variant: names, usually dense and prism.
        size: settings of each size by its name; without any, the recipe's own.
        tokens: training tokens of a run; without any, the recipe's own steps.
        seed: of weights and order.
        settings: of every run.
        suites: evaluated after each run, relative to the sweep file.
    """

    dir: str
    recipe: str
    variant: list[str] = field(default_factory=lambda: ["dense", "prism"])
    size: dict[str, dict[str, Any]] = field(default_factory=dict)
    tokens: list[float] = field(default_factory=list)
    seed: list[int] = field(default_factory=lambda: [0])
    settings: dict[str, Any] = field(default_factory=dict)
    suites: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Trial:
    """One run of a sweep.

    Attributes:
        name: of its run directory.
        run: its directory.
        size, variant, seed, tokens: where it stands in the grid; `tokens` are those it trains on.
        recipe, settings: what `fit` is called with.
        suites: what `evaluate` is called with.
        steps: of the optimiser.
        block_size: tokens of a block.
        config: the composed recipe.
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

    def commands(self, evaluation: list[str]) -> Iterator[list[str]]:
        """What is run, verb and arguments: `fit`, then `evaluate` with some arguments more."""
        fit = ["fit", "--config", str(self.recipe)]
        for setting in self.settings:
            key, _, value = setting.partition("=")
            fit += [f"--{key}", value]
        yield fit
        if self.suites:
            yield ["evaluate", "--ckpt_path", str(self.run), "--suite", *map(str, self.suites), *evaluation]


def typed(command: list[str]) -> str:
    """A command as one would type it."""
    return shlex.join([*PROGRAM, *command])


def load_sweep(path: Path) -> Sweep:
    """Read a sweep file.

    Raises:
        UserError: no such file, an unknown axis or setting, or a value of another type.
    """
    if not path.is_file():
        others = [str(file) for file in sorted(path.parent.glob("*.yaml"))]
        raise UserError(f"sweep {path} not found: {nearest(str(path), others) if others else 'no such folder'}")
    try:
        merged = OmegaConf.merge(OmegaConf.structured(Sweep), OmegaConf.load(path))
        sweep = OmegaConf.to_object(merged)
    except ConfigKeyError as error:
        hint = nearest(str(error.key), Sweep.__dataclass_fields__)
        raise UserError(f"{path}: {error.key} is neither axis nor setting of a sweep: {hint}") from error
    except (OmegaConfBaseException, yaml.YAMLError, ValueError, TypeError) as error:
        where = getattr(error, "full_key", None)
        raise UserError(f"{path}: {f'{where}: ' if where else ''}{' '.join(str(error).split())[:200]}") from error
    assert isinstance(sweep, Sweep)
    empty = [axis for axis in ("variant", "seed") if not getattr(sweep, axis)]
    if empty:
        raise UserError(f"{path}: {', '.join(empty)} names nothing: give at least one value")
    return sweep


def trials_of(path: Path, overrides: list[str]) -> list[Trial]:
    """Every trial of a sweep file, seeds together, in the order of the file.

    Args:
        path: of the sweep file.
        overrides: `key=value` settings of every run, over the file's own.

    Raises:
        UserError: as `load_sweep`; a recipe that is not there or does not compose; two trials of one name.
    """
    sweep = load_sweep(path)
    counts: Sequence[float | None] = sweep.tokens or [None]
    grid = product(sweep.size or [""], counts, sweep.variant, sweep.seed)
    trials = [_trial(path, sweep, overrides, size, variant, tokens, seed) for size, tokens, variant, seed in grid]
    names = [trial.name for trial in trials]
    doubled = sorted({name for name in names if names.count(name) > 1})
    if doubled:
        raise UserError(f"{path}: {', '.join(doubled)} would run twice: an axis repeats a value")
    return trials


AXES = {"seed": "seed_everything", "dir": "run.dir", "the sweep's name": "run.experiment"}


def _trial(
    path: Path, sweep: Sweep, overrides: list[str], size: str, variant: str, tokens: float | None, seed: int
) -> Trial:
    try:
        recipe = _beside(path, sweep.recipe.format(size=size, variant=variant))
    except (KeyError, ValueError, IndexError) as error:
        raise UserError(f"{path}: recipe {sweep.recipe!r} takes {{variant}} and {{size}} and nothing else") from error
    given = [f"{key}={_text(value)}" for key, value in {**sweep.settings, **sweep.size.get(size, {})}.items()]
    given += overrides
    _check_settings(path, given, tokens)
    config = compose(recipe, given)
    defaults = {field.name: field.default for field in fields(TextData)}
    data = {name: config.get("data", {}).get(name, defaults[name]) for name in ("batch_size", "block_size")}
    steps = config.get("trainer", {}).get("max_steps") if tokens is None else round(tokens / math.prod(data.values()))
    if not isinstance(steps, int) or steps < 1:
        raise UserError(f"{path}: {recipe} gives no trainer.max_steps: state it or the axis tokens")
    name = "_".join(part for part in (size, variant, tokens and spoken(tokens), f"seed{seed}") if part)
    run = Path(sweep.dir) / name
    own = {"trainer.max_steps": steps, "seed_everything": seed, "run.dir": str(run)}
    own["run.experiment"] = Path(sweep.dir).name
    if not any(setting.startswith("run.tracking_uri=") for setting in given):
        own["run.tracking_uri"] = tracking_uri(Path(sweep.dir))
    given += [f"{key}={_text(value)}" for key, value in own.items()]
    suites = tuple(_beside(path, suite) for suite in sweep.suites)
    return Trial(
        name=name, run=run, size=size, variant=variant, seed=seed, tokens=steps * math.prod(data.values()),
        recipe=recipe, settings=tuple(given), suites=suites, steps=steps, block_size=data["block_size"],
        config=compose(recipe, given),
    )  # fmt: skip


def _check_settings(path: Path, given: list[str], tokens: float | None) -> None:
    """Refuse settings that the sweep itself decides."""
    decided = AXES | ({"tokens": "trainer.max_steps"} if tokens is not None else {})
    keys = {setting.partition("=")[0] for setting in given}
    stray = [f"{path}: {key} is decided by {axis} of the sweep" for axis, key in decided.items() if key in keys]
    if stray:
        raise UserError(stray)


def tracking_uri(folder: Path) -> str:
    """The MLflow database that all runs of a sweep share, so that they can be one parent's children."""
    return f"sqlite:///{(folder / 'mlflow.db').absolute()}"


def _beside(path: Path, name: str) -> Path:
    """A path relative to the sweep file, as one would type it from here."""
    return Path(os.path.relpath(path.parent / name))


def _text(value: Any) -> str:
    """A value as the command line takes it: plain where that reads back the same, else in JSON's quotes."""
    plain = str(value)
    try:
        same = isinstance(value, str | int | float) and yaml.safe_load(plain) == value
    except yaml.YAMLError:
        same = False
    return plain if same and not isinstance(value, bool) else json.dumps(value)


def spoken(number: float) -> str:
    """1,350,400 as 1.35M."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"
