"""The verb `index`: it builds an index over the training tokens from a recipe's data and a trained model."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser

from prism_lightning.attribution.attributor import default_index
from prism_lightning.attribution.build.builder import Builder
from prism_lightning.attribution.index.base import Index
from prism_lightning.attribution.index.opening import open_index
from prism_lightning.attribution.settings import IndexSettings
from prism_lightning.common.devices import device_named
from prism_lightning.common.errors import UserError
from prism_lightning.common.progress import PhaseProgress
from prism_lightning.config.compose import Recipe, composed, split_arguments, take_flags
from prism_lightning.config.trust import limit_imports
from prism_lightning.config.validate import problems_in
from prism_lightning.lightning_modules.text_data import TextData
from prism_lightning.run.directory import RunPaths, RunSettings
from prism_lightning.run.fingerprints import check_context, check_tokenizer
from prism_lightning.run.model_folder import load_exported
from prism_lightning.run.model_tokenizer import chosen_tokenizer


def index(arguments: list[str]) -> None:
    """Build the index of a recipe, or the missing parts of an unfinished one.

    With several processes that have RANK and WORLD_SIZE set, as torchrun sets them, each builds its own shards.
    """
    flags, arguments = take_flags(arguments, "allow_custom_code", "print_config")
    path, overrides = split_arguments(_with_recipe(arguments))
    device, dtype, overrides = _device_and_dtype(overrides)
    recipe = composed(path, overrides)
    allow_custom_code = "allow_custom_code" in flags
    if "print_config" in flags:
        from prism_lightning.training.trainer import TrainingCLI  # imports Lightning, not needed below

        TrainingCLI("fit", recipe, str(path), allow_custom_code, print_config=True)
    data, settings, run_settings = _settings_of(recipe, str(path), allow_custom_code)
    model_path = Path(recipe.settings.get("ckpt_path") or run_settings.dir)
    if model_path.is_file():
        raise UserError(f"{model_path} is a checkpoint: give the run directory or its exported folder by --ckpt_path")
    model, tokenizer = load_exported(model_path, device, dtype)
    data.setup()
    check_context(data.block_size, model)
    check_tokenizer(tokenizer, data.train)
    folder = Path(settings.dir) if settings.dir else default_index(model_path)
    rank, world_size = _ranks()
    progress = PhaseProgress()
    started = time.monotonic()
    with progress:
        builder = Builder(model, data.train, settings, folder, progress)
        finished = builder.build(rank, world_size)
    if not finished:
        print(f"this process's shards of {folder} are done; the last process to end finishes the index")
        return
    print(summary(open_index(folder, verify=False)) + f", in {time.monotonic() - started:.0f} s")


def _with_recipe(arguments: list[str]) -> list[str]:
    """Return the arguments; without --config, the recipe in the run directory that --ckpt_path names is added."""
    names = [argument.partition("=")[0] for argument in arguments]
    if "--ckpt_path" not in names or {"--config", "-c"} & set(names):
        return arguments
    _, overrides = split_arguments(["--config", "", *arguments])
    run = next(value for key, _, value in (o.partition("=") for o in overrides) if key == "ckpt_path")
    recipe = RunPaths.of(Path(run)).recipe
    if not recipe.is_file():
        raise UserError(f"{run} has no {recipe.name}: name the text to index by --config RECIPE")
    return ["--config", str(recipe), *arguments]


def _device_and_dtype(overrides: list[str]) -> tuple[str, str, list[str]]:
    """Return `--device` (of several processes, this one's), `--dtype`, and the overrides of the recipe."""
    options = {"device": "auto", "dtype": "fp32"}
    settings = []
    for override in overrides:
        key, _, value = override.partition("=")
        if key in options:
            options[key] = value
        else:
            settings.append(override)
    rank = int(os.environ.get("LOCAL_RANK", 0))
    return str(device_named(options["device"], rank)), options["dtype"], settings


def summary(index: Index) -> str:
    """Return one line with the index's tokens, documents, prototypes and size."""
    files = [*index.shard_paths, *(index.folder / f"{name}.safetensors" for name in ("dictionary", "curvature"))]
    size = sum(file.stat().st_size for file in files)
    unused = int((index.usage_K() == 0).sum())
    targets = "" if index.targets == index.tokens else f" ({index.targets:,} of them targets)"
    return (
        f"{index.folder}: {index.tokens:,} training tokens{targets} of {index.manifest['documents']:,} documents,"
        f" {index.num_prototypes:,} prototypes ({unused:,} unused), {index.manifest['active']} active per token,"
        f" {size / index.tokens:.0f} bytes per token"
    )


def _ranks() -> tuple[int, int]:
    """Return RANK and WORLD_SIZE, as torchrun sets them; by default 0 and 1.

    Raises:
        UserError: a value that is no number or out of range.
    """
    names = ("RANK", "WORLD_SIZE")
    try:
        rank, world_size = (int(os.environ.get(name, default)) for name, default in zip(names, "01", strict=True))
    except ValueError:
        rank, world_size = 0, 0
    if not 0 <= rank < world_size:
        values = ", ".join(f"{name}={os.environ.get(name)}" for name in names)
        raise UserError(f"{values}: both must be numbers with 0 <= RANK < WORLD_SIZE; start ranks with torchrun")
    return rank, world_size


def _settings_of(recipe: Recipe, name: str, allow_custom_code: bool) -> tuple[TextData, IndexSettings, RunSettings]:
    """Return the data, the index settings and the run settings of a recipe.

    Raises:
        UserError: all problems in the recipe, without values from the environment.
    """
    limit_imports(recipe.settings, name, allow_custom_code)
    try:
        return _parsed(recipe.settings, name, allow_custom_code)
    except UserError as error:
        raise UserError([recipe.hide_environment(problem) for problem in error.problems]) from error


def _parsed(
    config: dict[str, Any], recipe: str, allow_custom_code: bool
) -> tuple[TextData, IndexSettings, RunSettings]:
    """Return the recipe's data, index settings and run settings; raise UserError for all problems in it."""
    problems = problems_in(config, allow_custom_code)
    if problems:
        raise UserError([f"{recipe}: {problem}" for problem in problems])
    config = _with_model_tokenizer(config)
    parser = ArgumentParser(exit_on_error=False)
    groups = {"data": TextData, "index": IndexSettings, "run": RunSettings}
    for name, owner in groups.items():
        parser.add_class_arguments(owner, name)
    try:
        parsed = parser.instantiate_classes(parser.parse_object({n: config[n] for n in groups if n in config}))
    except (ArgumentError, TypeError, ValueError, KeyError) as error:
        raise UserError(f"{recipe}: {' '.join(str(error).split())[:300]}") from error
    return parsed["data"], parsed["index"], parsed["run"]


def _with_model_tokenizer(config: dict[str, Any]) -> dict[str, Any]:
    """Return a recipe that starts from a pretrained model with the tokenizer that its `fit` has used."""
    model, data = (config.get("model") or {}).get("init_args") or {}, config.get("data") or {}
    paths = RunPaths(Path((config.get("run") or {}).get("dir") or RunSettings.dir))
    tokenizer = chosen_tokenizer(model, data.get("tokenizer"), paths)
    return config if tokenizer is None else config | {"data": data | {"tokenizer": tokenizer}}
