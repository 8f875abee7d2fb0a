"""Recipes: YAML files composed by `base:`, overridden from the command line, then interpolated, in that order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from prism_lightning.errors import UserError, nearest


def compose(path: Path, overrides: list[str]) -> dict[str, Any]:
    """The recipe as plain nested dictionaries.

    Args:
        path: a recipe; its `base:` (a path or a list, relative to it) is merged beneath it.
        overrides: `key.path=value`, each parsed as YAML and set before interpolations are resolved.

    Raises:
        UserError: missing file, broken YAML, circular bases, an interpolation without a target.
    """
    config = _load(path, ())
    try:
        for override in overrides:
            key, _, value = override.partition("=")
            key = _full_key(key, config)
            OmegaConf.update(config, key, _value(value), merge=False, force_add=True)
        container = OmegaConf.to_container(config, resolve=True)
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        raise UserError(f"{path}: {_one_line(error)}") from error
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


def split_arguments(arguments: list[str]) -> tuple[Path, list[str]]:
    """Split a verb's command line into its recipe and `key=value` overrides.

    Raises:
        UserError: no --config, a value without a key, or a key without a value.
    """
    recipe: Path | None = None
    overrides: list[str] = []
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        if argument == "-c":
            argument = "--config"
        if not argument.startswith("--"):
            raise UserError(f"{argument!r} stands alone: settings are written --key value (quote a pattern: '*.txt')")
        key, equals, value = argument[2:].partition("=")
        if not equals:
            if not rest:
                raise UserError(f"--{key} has no value: write --{key} VALUE")
            value = rest.pop(0)
        if key == "config":
            if recipe:
                raise UserError("--config was given twice: let one recipe name the other as its base")
            recipe = Path(value)
        else:
            overrides.append(f"{key}={value}")
    if recipe is None:
        raise UserError("no recipe: give --config recipes/quickstart.yaml or another")
    return recipe, overrides


def _load(path: Path, above: tuple[Path, ...]) -> DictConfig:
    path = path.resolve()
    if path in above:
        raise UserError(f"{path}: a recipe cannot be its own base")
    if not path.is_file():
        others = [p.name for p in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
        hint = nearest(path.name, others) if others else "no such folder"
        raise UserError(f"recipe {path} not found: {hint}")
    try:
        config = OmegaConf.load(path)
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {_one_line(error)}") from error
    if not isinstance(config, DictConfig):
        raise UserError(f"{path}: a recipe is a YAML mapping of settings")
    bases = config.pop("base", None) or []
    for base in reversed([bases] if isinstance(bases, str) else list(bases)):
        config = OmegaConf.merge(_load(path.parent / base, (*above, path)), config)  # type: ignore[assignment]
    return config


def _full_key(key: str, config: DictConfig) -> str:
    """`model.learning_rate` is short for `model.init_args.learning_rate` wherever a group names a class."""
    head, _, tail = key.partition(".")
    is_class = isinstance(config.get(head), DictConfig) and "class_path" in config[head]
    if is_class and tail and tail.partition(".")[0] not in ("class_path", "init_args"):
        return f"{head}.init_args.{tail}"
    return key


def _value(text: str) -> Any:
    return OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))["value"]  # type: ignore[call-overload,index]


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
