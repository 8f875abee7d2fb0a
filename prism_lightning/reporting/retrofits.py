"""Retrofits in a report: pretrained models with the prototypes that were fitted to them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from prism_lightning.common.errors import UserError
from prism_lightning.common.manifests import mapping, number, optional, text, whole
from prism_lightning.reporting.folders import RETROFIT, is_retrofit, read_checked, run_folders
from prism_lightning.reporting.run_facts import REPOSITORY, RunFacts, public_name
from prism_lightning.reporting.runs import RESULTS
from prism_lightning.reporting.tables import LOSSES, PROTOTYPES, Table
from prism_lightning.run.directory import RunPaths

RECIPE = {
    RETROFIT: mapping({"model": text(), "prototypes": whole(1), "active": whole(1), "encoder": text(), "seed": whole()})
}
RETROFIT_RESULTS = RESULTS | {"fit_tokens": whole(1), "seconds": optional(number())}


@dataclass(frozen=True)
class Retrofit:
    """A finished retrofit.

    Attributes:
        path: Run directory.
        settings: The group `retrofit` of its recipe.
        text: Files or data set that the prototypes were fitted to, for people.
        results: Last line of results.jsonl.
    """

    path: Path
    settings: dict[str, Any]
    text: str
    results: dict[str, Any]


def find_retrofits(folders: Iterable[Path]) -> tuple[list[Retrofit], list[str]]:
    """Return the finished retrofits in some folders and below, and a message for everything left out."""
    found, left_out = [], []
    for folder in filter(is_retrofit, run_folders(folders)):
        try:
            found.append(read_retrofit(folder))
        except UserError as error:
            left_out += error.problems
    return sorted(found, key=_sort_key), left_out


def _sort_key(retrofit: Retrofit) -> tuple[Any, ...]:
    chosen = [retrofit.settings[name] for name in ("model", "encoder", "prototypes", "active", "seed")]
    return (*chosen, retrofit.results["fit_tokens"], str(retrofit.path))


def read_retrofit(path: Path) -> Retrofit:
    """Return the finished retrofit in a run directory.

    Raises:
        UserError: it is not finished, or one of its files is damaged.
    """
    paths, again = RunPaths(path), "run its `retrofit` again"
    if not paths.results.is_file() or not paths.model.is_dir():
        raise UserError(f"{path} is not finished: {again}")
    recipe = read_checked(paths.recipe, RECIPE, lambda file: yaml.safe_load(file.read_text()), again)
    results = read_checked(
        paths.results, RETROFIT_RESULTS, lambda file: json.loads(file.read_text().splitlines()[-1]), again
    )
    return Retrofit(path, recipe[RETROFIT], RunFacts.of(paths).source(), results)


def retrofit_table(retrofits: list[Retrofit]) -> Table:
    """Return a row for every retrofit: what was fitted, and how much of the predictions the prototypes carry."""
    measured = LOSSES | {name: PROTOTYPES[name] for name in PROTOTYPES if name != "before polishing"}
    shown = {name: column for name, column in measured.items() if any(column[0] in r.results for r in retrofits)}
    rows = [
        [
            str(retrofit.path),
            public_name(retrofit.settings["model"], REPOSITORY),
            retrofit.settings["encoder"],
            f"{retrofit.settings['prototypes']:,}",
            str(retrofit.settings["active"]),
            f"{retrofit.results['fit_tokens']:,}",
            retrofit.text,
            *(_cell(retrofit.results.get(key), form) for key, form in shown.values()),
            _cell(retrofit.results.get("seconds"), "{:,.0f}"),
            _cell(retrofit.results.get("peak_memory_gib"), "{:.2f}"),
            str(retrofit.results.get("commit"))[:10],
        ]
        for retrofit in retrofits
    ]
    columns = ["directory", "model", "encoder", "K", "k", "tokens", "text", *shown, "seconds", "GiB", "commit"]
    note = (
        "Prototypes fitted to frozen pretrained models, measured on validation text. The models predict as they did"
        " before. Other work on the machine affects the seconds."
    )
    return Table("Retrofitted models", columns, rows, note)


def _cell(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)
