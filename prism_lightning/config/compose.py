"""Recipes: YAML files composed by `base:`, overridden from the command line, then interpolated, in that order.

Values that come from the environment (`${oc.env:NAME}`) may be secrets. They are used and never written.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from omegaconf import Container, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from omegaconf.resolvers import oc

from prism_lightning.common.errors import UserError, nearest
from prism_lightning.common.retired import RETIRED_INDEX_SETTINGS, retired_in

SHORTEST_SECRET = 4  # characters; shorter values occur in texts with other meanings and are not hidden
MOVED_CLASSES = {
    "prism_lightning.evaluation.in_loop.InLoopEvaluation": (
        "prism_lightning.lightning_modules.callbacks.in_loop_evaluation.InLoopEvaluation"
    ),
}
Key = tuple[str | int, ...]  # path of a value through nested mappings and lists


@dataclass
class Recipe:
    """A composed recipe.

    Attributes:
        settings: plain nested dictionaries, interpolations resolved.
        from_environment: the unresolved text of every value that depends on the environment, by its key.
    """

    settings: dict[str, Any]
    from_environment: dict[Key, str] = field(default_factory=dict)

    def without_environment(self, settings: dict[str, Any]) -> dict[str, Any]:
        """Replace values from the environment in `settings` by their unresolved text, and return `settings`.

        Args:
            settings: these settings, possibly with more keys; changed in place.
        """
        for key, text in self.from_environment.items():
            parent: Any = settings
            for part in key[:-1]:
                parent = parent[part]
            parent[key[-1]] = text
        return settings

    def hide_environment(self, text: str) -> str:
        """Return a message with values from the environment replaced by their unresolved text."""
        for key, raw in self.from_environment.items():
            value: Any = self.settings
            for part in key:
                value = value[part]
            text = text.replace(repr(value), raw)
            text = text.replace(str(value), raw) if len(str(value)) >= SHORTEST_SECRET else text
        return text


def compose(path: Path, overrides: list[str], groups: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return the settings of a recipe as plain nested dictionaries; arguments and errors as of `composed`."""
    return composed(path, overrides, groups).settings


def composed(path: Path, overrides: list[str], groups: tuple[str, ...] = ()) -> Recipe:
    """Return a composed recipe.

    Args:
        path: the recipe; the recipes of its `base:` (a path or a list, relative to it) are overridden by it.
        overrides: texts `key.path=value`. Values are parsed as YAML and set before interpolations are resolved.
        groups: top-level groups to resolve, by default all. A recorded recipe can then be read without the
            environment variables of its other groups.

    Raises:
        UserError: a missing file, invalid YAML, circular bases, or an interpolation without a target.
    """
    config = _load(path, ())
    try:
        for override in overrides:
            key, _, value = override.partition("=")
            key = _full_key(key, config)
            OmegaConf.update(config, key, _value(value), merge=False, force_add=True)
        raw = OmegaConf.to_container(config, resolve=False)
        container: Any
        if groups:
            present = [name for name in groups if config.get(name)]
            container = {name: OmegaConf.to_container(config[name], resolve=True) for name in present}
        else:
            container = OmegaConf.to_container(config, resolve=True)
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        raise UserError(f"{path}: {_one_line(error)}") from error
    assert isinstance(container, dict)
    _update_class_paths(container)
    _leave_out_retired(container.get("index"), path)
    texts = {key: text for key, text in _environment_values(config, raw) if not _is_retired(key)}
    return Recipe({str(key): value for key, value in container.items()}, texts)


def _update_class_paths(node: Any) -> None:
    """Replace class paths of earlier versions by the present ones, in place."""
    if isinstance(node, dict) and node.get("class_path") in MOVED_CLASSES:
        node["class_path"] = MOVED_CLASSES[node["class_path"]]
    for child in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        _update_class_paths(child)


def _is_retired(key: Key) -> bool:
    return key[0] == "index" and len(key) > 1 and key[1] in RETIRED_INDEX_SETTINGS


def _leave_out_retired(index: Any, path: Path) -> None:
    """Remove retired settings of the index at their only value, as recorded recipes have them; refuse another."""
    if not isinstance(index, dict):
        return
    problems = [f"{path}: index.{name} is a retired setting: leave it out" for name in retired_in(index)]
    if problems:
        raise UserError(problems)
    for name in RETIRED_INDEX_SETTINGS:
        index.pop(name, None)


def _leaves(node: Any, key: Key = ()) -> Iterator[tuple[Key, Any]]:
    children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for name, child in children:
        yield from _leaves(child, (*key, name))
    if not isinstance(node, dict | list):
        yield key, node


def _environment_values(config: DictConfig, raw: Any) -> Iterator[tuple[Key, str]]:
    """Yield the key and the unresolved text of every value that depends on the environment.

    Every value is resolved twice, the second time with a resolver that ignores the environment, and compared.
    """
    texts = {key: value for key, value in _leaves(raw) if isinstance(value, str) and "${" in value}
    values = {key: _resolved(config, key) for key in texts}
    OmegaConf.register_resolver("oc.env", lambda *_: "\0", replace=True)
    try:
        yield from [(key, text) for key, text in texts.items() if _resolved(config, key) != values[key]]
    finally:
        OmegaConf.register_resolver("oc.env", oc.env, replace=True)


def _resolved(config: DictConfig, key: Key) -> Any:
    """Return a value with its interpolations resolved; the exception's type where that fails."""
    node: Any = config
    try:
        for part in key:
            node = node[part]
    except Exception as error:  # a resolver may raise any exception
        return type(error)
    return OmegaConf.to_container(node, resolve=True) if isinstance(node, Container) else node


def take_flags(arguments: list[str], *names: str) -> tuple[set[str], list[str]]:
    """Return the given flags (written --NAME, without a value) among the arguments, and the other arguments."""
    flags = {f"--{name}" for name in names}
    return {a[2:] for a in arguments if a in flags}, [a for a in arguments if a not in flags]


def split_arguments(arguments: list[str]) -> tuple[Path, list[str]]:
    """Return the recipe and the `key=value` overrides of a verb's arguments.

    Raises:
        UserError: no --config or several, a value without a key, or a key without a value.
    """
    recipe: Path | None = None
    overrides: list[str] = []
    remaining = list(arguments)
    while remaining:
        argument = remaining.pop(0)
        if argument == "-c":
            argument = "--config"
        if not argument.startswith("--"):
            raise UserError(f"{argument!r} belongs to no setting: write --key value (quote a pattern: '*.txt')")
        key, equals, value = argument[2:].partition("=")
        if not equals:
            if not remaining:
                raise UserError(f"--{key} has no value: write --{key} VALUE")
            value = remaining.pop(0)
        if key == "config":
            if recipe:
                raise UserError("--config was given twice: let one recipe name the other as its base")
            recipe = Path(value)
        else:
            overrides.append(f"{key}={value}")
    if recipe is None:
        raise UserError("no recipe: give --config recipes/quickstart.yaml or another")
    return recipe, overrides


def _load(path: Path, descendants: tuple[Path, ...]) -> DictConfig:
    """Return a recipe merged over its bases; `descendants` are the recipes that it is a base of."""
    path = path.resolve()
    if path in descendants:
        raise UserError(f"{path}: a recipe cannot be its own base")
    if not path.is_file():
        neighbours = [p.name for p in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
        hint = nearest(path.name, neighbours) if neighbours else "no such folder"
        raise UserError(f"recipe {path} not found: {hint}")
    try:
        config = OmegaConf.load(path)
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {_one_line(error)}") from error
    if not isinstance(config, DictConfig):
        raise UserError(f"{path}: a recipe is a YAML mapping of settings")
    bases = config.pop("base", None) or []
    for base in reversed([bases] if isinstance(bases, str) else list(bases)):
        config = OmegaConf.merge(_load(path.parent / base, (*descendants, path)), config)  # type: ignore[assignment]
    return config


def _full_key(key: str, config: DictConfig) -> str:
    """Return `model.init_args.X` for the shorthand `model.X`, and likewise in every group that names a class."""
    head, _, tail = key.partition(".")
    is_class = isinstance(config.get(head), DictConfig) and "class_path" in config[head]
    if is_class and tail and tail.partition(".")[0] not in ("class_path", "init_args"):
        return f"{head}.init_args.{tail}"
    return key


def _value(text: str) -> Any:
    """Return a command-line value as YAML reads it; a value that is no YAML, such as a Jinja template, is a text."""
    try:
        return OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))["value"]  # type: ignore[call-overload,index]
    except yaml.YAMLError:
        return text


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested dictionaries as one, with their keys joined by dots."""
    out: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict) and value:
            out |= flat(value, f"{prefix}{key}.")
        else:
            out[prefix + key] = value
    return out
