"""Validation of a recipe: all settings that are unknown or of the wrong type, reported at once."""

from __future__ import annotations

from typing import Any

from jsonargparse import ArgumentError, ArgumentParser
from lightning.pytorch import Trainer

from prism_lightning.attribution.settings import IndexSettings
from prism_lightning.common.errors import nearest
from prism_lightning.lightning_modules.dense import DenseLM
from prism_lightning.lightning_modules.prism import PrismLM
from prism_lightning.lightning_modules.text_data import TextData
from prism_lightning.run.directory import RunSettings

MODEL_CLASSES: dict[str, type] = {"DenseLM": DenseLM, "PrismLM": PrismLM}
MODEL_PATHS = {f"{owner.__module__}.{name}": owner for name, owner in MODEL_CLASSES.items()} | MODEL_CLASSES
GROUPS: dict[str, type] = {"trainer": Trainer, "data": TextData, "run": RunSettings, "index": IndexSettings}
RETROFIT = "retrofit"
TOP_LEVEL = {"seed_everything", "ckpt_path", "weights_only", "verbose", "return_predictions", "model", *GROUPS}


def problems_in(config: dict[str, Any], allow_custom_code: bool = False) -> list[str]:
    """Return one line for each setting that is unknown or of the wrong type.

    Settings are checked one by one, not in combination. With `allow_custom_code` the model may be any class; the
    settings of a class outside this package are not checked.
    """
    replacements = {"device": "give trainer.accelerator and trainer.devices", "dtype": "give trainer.precision"}
    problems = [
        f"{key} is no setting: {replacements.get(key) or nearest(key, TOP_LEVEL)}"
        for key in config
        if key not in TOP_LEVEL | {RETROFIT}
    ]
    for group, owner in GROUPS.items():
        problems += _problems_of(group, config.get(group) or {}, owner)
    if RETROFIT in config:  # a recipe that `retrofit` recorded; its model is not trained here
        return problems
    return problems + _model_problems(config.get("model"), allow_custom_code)


def _model_problems(model: Any, allow_custom_code: bool) -> list[str]:
    if not isinstance(model, dict) or "class_path" not in model:
        return ["model.class_path is missing: give DenseLM or PrismLM"]
    name = str(model["class_path"])
    if name not in MODEL_PATHS:
        if allow_custom_code and "." in name:
            return []
        return [f"model.class_path={name!r} is no model: {nearest(name.rpartition('.')[2], MODEL_CLASSES)}"]
    problems = [
        f"model.{key} is no setting: write model.init_args.{key}"
        for key in model
        if key not in ("class_path", "init_args")
    ]
    settings = model.get("init_args") or {}
    given = [n for n in ("backbone", "pretrained") if isinstance(settings, dict) and settings.get(n) is not None]
    if not given:
        problems.append(
            "model.init_args.backbone is missing: give the settings of a Hugging Face decoder, e.g. {model_type: gpt2},"
            " or the hub id or folder of a pretrained one by model.init_args.pretrained"
        )
    if len(given) == 2:
        problems.append(
            "model.init_args.backbone and model.init_args.pretrained exclude each other: give a new decoder's settings"
            " or a pretrained decoder"
        )
    return problems + _problems_of("model.init_args", settings, MODEL_PATHS[name])


def _problems_of(group: str, settings: Any, owner: type) -> list[str]:
    if not isinstance(settings, dict):
        return [f"{group}={settings!r}: expected a mapping of settings"]
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(owner)
    known = {action.dest.partition(".")[0] for action in parser._actions} - {"help"}
    problems = []
    for key, value in settings.items():
        if key not in known:
            problems.append(f"{group}.{key} is no setting: {nearest(str(key), known)}")
            continue
        try:
            parser.parse_object({key: value})
        except (ArgumentError, TypeError, ValueError, KeyError) as error:
            problems.append(f"{group}.{key}={value!r}: {_reason(error)}")
    return problems


def _reason(error: Exception) -> str:
    """Return the parser's message from its first "Expected" on, without the value that it repeats."""
    message = " ".join(str(error).split())
    start = message.find("Expected")
    reason = (message[start:] if start >= 0 else message).split(" Got value")[0].split(" Given value")[0].rstrip(". ")
    reason = reason.replace("<class '", "").replace("'>", "").replace("typing.", "").replace("NoneType", "null")
    return " or".join(reason.split(" - Expected a"))[:160].replace("Expected a ", "expected ")
