"""The corpus that a run was trained on, found by the recipe in the run directory."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

from jsonargparse import ArgumentError, ArgumentParser

from prism_lightning.common.errors import UserError
from prism_lightning.config.compose import compose
from prism_lightning.data.corpus import Corpus
from prism_lightning.run.directory import RunPaths


def data_of(run: Path) -> Corpus:
    """Return the corpus that a run was trained on, with both splits open.

    Raises:
        UserError: the run directory has no recipe, or the recipe's data cannot be read.
    """
    recipe = RunPaths(run).recipe
    if not recipe.is_file():
        raise UserError(f"{run} has no {recipe.name}: give a run directory of `fit`")
    settings = compose(recipe, [], groups=("data",)).get("data") or {}
    names = {field.name for field in fields(Corpus)}
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Corpus, "data")
    try:
        known = {name: value for name, value in settings.items() if name in names}
        corpus = parser.instantiate_classes(parser.parse_object({"data": known})).data
    except (ArgumentError, TypeError, ValueError, KeyError, AttributeError) as error:
        raise UserError(f"{recipe}: {' '.join(str(error).split())[:300]}") from error
    corpus.open()
    return corpus
