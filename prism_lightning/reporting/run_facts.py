"""What the files of a run say, for people elsewhere: what is missing is "not known", and no local path is shown."""

from __future__ import annotations

import getpass
import json
import os
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from prism_lightning.common.files import read_json
from prism_lightning.run.directory import RunPaths

UNKNOWN = "not known"
MAX_SOURCES = 5  # listed by name
REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
DATASET = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)  # old data sets have no user: "wikitext"


@dataclass
class RunFacts:
    """What the files of a run say; each is empty where the file is missing or damaged.

    Attributes:
        recipe: the resolved recipe.
        environment: commit, package versions and the data's fingerprint.
        results: the last line of results.jsonl.
        data: manifest of the prepared data, while they are in the cache.
    """

    recipe: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    results: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, paths: RunPaths) -> RunFacts:
        """Return the facts of a run directory."""
        recipe = _parsed(paths.recipe, yaml.safe_load)
        environment = _parsed(paths.environment, json.loads)
        results = _parsed(paths.results, lambda text: json.loads(text.splitlines()[-1]))
        cache, fingerprint = entry(recipe, "data", "cache_dir"), environment.get("data_fingerprint")
        data = None
        if isinstance(cache, str) and isinstance(fingerprint, str):
            data = read_json(Path(cache) / fingerprint / "manifest.json")
        return cls(recipe, environment, results, data or {})

    def source(self) -> str:
        """Return the names of the training data."""
        settings = entry(self.recipe, "data")
        if not isinstance(settings, dict):
            return UNKNOWN
        if path := settings.get("path"):
            names = list(dict.fromkeys(local_name(part) for part in (path if isinstance(path, list) else [path])))
            more = f" and {len(names) - MAX_SOURCES} more" if len(names) > MAX_SOURCES else ""
            return f"local files: {', '.join(names[:MAX_SOURCES])}{more}"
        if dataset := settings.get("dataset"):
            parts = [settings.get("dataset_config"), settings.get("dataset_revision")]
            return " ".join([public_name(dataset, DATASET), *(str(part) for part in parts if part)])
        return "standard library of Python"

    def tokenizer(self, pretrained: bool) -> str:
        """Return the tokenizer's name; one without a name in the recipe was trained, if the model was, too."""
        if name := entry(self.recipe, "data", "tokenizer"):
            return public_name(name, DATASET)
        return "trained on the training data" if "data" in self.recipe and not pretrained else UNKNOWN

    def tokens_of_a_step(self) -> int | None:
        """Return the number of tokens of one optimiser step; None where it is not known."""
        sizes = [entry(self.recipe, "data", name) for name in ("batch_size", "block_size")]
        return sizes[0] * sizes[1] if all(type(size) is int for size in sizes) else None


def _parsed(path: Path, parse: Callable[[str], Any]) -> dict[str, Any]:
    try:
        content = parse(path.read_text(encoding="utf-8", errors="replace"))
    except (OSError, ValueError, IndexError, RecursionError, yaml.YAMLError):
        return {}
    return content if isinstance(content, dict) else {}


def entry(content: Any, *keys: str) -> Any:
    """Return the entry at a path of keys; None where there is none."""
    for key in keys:
        content = content.get(key) if isinstance(content, dict) else None
    return content


def number_text(value: Any) -> str:
    """Return a number with four significant digits, whole ones in full; "not known" for anything else."""
    if not isinstance(value, int | float) or isinstance(value, bool) or value != value:
        return UNKNOWN
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def text_or_unknown(value: Any) -> str:
    """Return a text; "not known" for anything else."""
    return value if isinstance(value, str) and value else UNKNOWN


def is_public(name: Any, form: re.Pattern[str]) -> bool:
    """Return whether a name may be one of the hub; one that is also a local path is taken for the path."""
    return isinstance(name, str) and bool(form.fullmatch(name)) and not Path(name).exists()


def public_name(name: Any, form: re.Pattern[str]) -> str:
    """Return a name of the hub unchanged, and of a local path the last part."""
    return name if is_public(name, form) else local_name(name)


def local_name(path: Any) -> str:
    """Return the last part of a local path, unless it is the name of the user."""
    if not isinstance(path, str | Path) or not str(path):
        return UNKNOWN
    name = Path(str(path).replace("\\", "/")).name
    return "a local folder" if not name or name in _user_names() else name


def _user_names() -> set[str]:
    names = {Path(os.path.expanduser("~")).name}
    with suppress(OSError, KeyError):  # no such user in a container
        names.add(getpass.getuser())
    return names
