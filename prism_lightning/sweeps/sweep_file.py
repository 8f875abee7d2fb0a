"""The sweep file: a YAML description of a grid of runs.

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

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from prism_lightning.common.errors import UserError, nearest


@dataclass
class Sweep:
    """A grid of runs: every combination of size, tokens, variant and seed.

    Args:
        dir: Folder of all run directories and of the sweep's records.
        recipe: Recipe of every run, relative to the sweep file; `{variant}` and `{size}` are replaced by their names.
        variant: Names of the variants, usually dense and prism.
        size: Settings of each size by its name; if empty, all runs have the recipe's size.
        tokens: Numbers of training tokens; if empty, all runs have the recipe's number of steps.
        seed: Seeds of weights and data order.
        settings: Settings of every run.
        suites: Suites that every run is evaluated on, relative to the sweep file.
    """

    dir: str
    recipe: str
    variant: list[str] = field(default_factory=lambda: ["dense", "prism"])
    size: dict[str, dict[str, Any]] = field(default_factory=dict)
    tokens: list[float] = field(default_factory=list)
    seed: list[int] = field(default_factory=lambda: [0])
    settings: dict[str, Any] = field(default_factory=dict)
    suites: list[str] = field(default_factory=list)


def load_sweep(path: Path) -> Sweep:
    """Return the content of a sweep file.

    Raises:
        UserError: the file does not exist, or has an unknown key, a value of a wrong type or an empty axis.
    """
    if not path.is_file():
        others = [str(file) for file in sorted(path.parent.glob("*.yaml"))]
        hint = nearest(str(path), others) if others else f"{path.parent} has no YAML file"
        raise UserError(f"sweep {path} not found: {hint}")
    try:
        merged = OmegaConf.merge(OmegaConf.structured(Sweep), OmegaConf.load(path))
        sweep = OmegaConf.to_object(merged)
    except ConfigKeyError as error:
        hint = nearest(str(error.key), Sweep.__dataclass_fields__)
        raise UserError(f"{path}: {error.key} is neither an axis nor a setting of a sweep: {hint}") from error
    except (OmegaConfBaseException, yaml.YAMLError, ValueError, TypeError) as error:
        key = getattr(error, "full_key", None)
        raise UserError(f"{path}: {f'{key}: ' if key else ''}{' '.join(str(error).split())[:200]}") from error
    assert isinstance(sweep, Sweep)
    empty = [axis for axis in ("variant", "seed") if not getattr(sweep, axis)]
    if empty:
        raise UserError(f"{path}: {', '.join(empty)} has no values: give at least one")
    return sweep
