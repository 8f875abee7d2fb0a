"""Every setting of a recipe: the page `--help` prints, and all of a recipe's problems at once.

`python -m prism_lightning.settings` writes the page to settings.txt after a setting has changed.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser
from lightning.pytorch import Trainer

from prism_lightning.attribution.settings import IndexSettings
from prism_lightning.data.datamodule import TextData
from prism_lightning.errors import nearest
from prism_lightning.lightning_modules.dense import DenseLM
from prism_lightning.lightning_modules.prism import PrismLM
from prism_lightning.tracking import RunSettings

MODEL_CLASSES: dict[str, type] = {"DenseLM": DenseLM, "PrismLM": PrismLM}
MODEL_PATHS = {f"{owner.__module__}.{name}": owner for name, owner in MODEL_CLASSES.items()} | MODEL_CLASSES
GROUPS: dict[str, type] = {"trainer": Trainer, "data": TextData, "run": RunSettings, "index": IndexSettings}
TOP_LEVEL = {"seed_everything", "ckpt_path", "weights_only", "verbose", "return_predictions", "model", *GROUPS}


def problems_in(config: dict[str, Any], allow_custom_code: bool = False) -> list[str]:
    """One line for each setting that is unknown or of the wrong type; empty where every setting is fine alone.

    With `allow_custom_code` the model may be any class; the settings of a class that is not ours are not looked at.
    """
    known = {"device": "give trainer.accelerator and trainer.devices", "dtype": "give trainer.precision"}
    found = [
        f"{key} is no setting: {known.get(key) or nearest(key, TOP_LEVEL)}" for key in config if key not in TOP_LEVEL
    ]
    for group, owner in GROUPS.items():
        found += _problems_of(group, config.get(group) or {}, owner)
    return found + _model_problems(config.get("model"), allow_custom_code)


def _model_problems(model: Any, allow_custom_code: bool) -> list[str]:
    if not isinstance(model, dict) or "class_path" not in model:
        return ["model.class_path is missing: give DenseLM or PrismLM"]
    name = str(model["class_path"])
    if name not in MODEL_PATHS:
        if allow_custom_code and "." in name:
            return []
        return [f"model.class_path={name!r} is no model: {nearest(name.rpartition('.')[2], MODEL_CLASSES)}"]
    stray = [
        f"model.{key} is no setting: write model.init_args.{key}"
        for key in model
        if key not in ("class_path", "init_args")
    ]
    settings = model.get("init_args") or {}
    if not isinstance(settings, dict) or "backbone" not in settings:
        stray.append(
            "model.init_args.backbone is missing: give the settings of a Hugging Face decoder, e.g. {model_type: gpt2}"
        )
    return stray + _problems_of("model.init_args", settings, MODEL_PATHS[name])


def _problems_of(group: str, settings: Any, owner: type) -> list[str]:
    if not isinstance(settings, dict):
        return [f"{group}={settings!r}: expected a mapping of settings"]
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(owner)
    known = {action.dest.partition(".")[0] for action in parser._actions} - {"help"}
    required: dict[str, Any] = {"backbone": {}} if "backbone" in known else {}
    found = []
    for key, value in settings.items():
        if key not in known:
            found.append(f"{group}.{key} is no setting: {nearest(str(key), known)}")
            continue
        try:
            parser.parse_object({**required, key: value})
        except (ArgumentError, TypeError, ValueError, KeyError) as error:
            found.append(f"{group}.{key}={value!r}: {_reason(error)}")
    return found


def _reason(error: Exception) -> str:
    """The heart of the parser's message: from its first "Expected" on, without the echo of the value."""
    message = " ".join(str(error).split())
    start = message.find("Expected")
    heart = (message[start:] if start >= 0 else message).split(" Got value")[0].split(" Given value")[0].rstrip(". ")
    heart = heart.replace("<class '", "").replace("'>", "").replace("typing.", "").replace("NoneType", "null")
    return " or".join(heart.split(" - Expected a"))[:160].replace("Expected a ", "expected ")


def settings_page() -> str:
    """Every setting with its type, default and meaning, as the parser knows them."""
    os.environ["COLUMNS"] = "110"
    parser = ArgumentParser(
        prog="python -m prism_lightning VERB",
        usage="%(prog)s --config recipes/X.yaml [--SETTING VALUE ...]",
        description="Any setting of the recipe can be given on the command line; "
        "model.init_args.X may be shortened to model.X.",
        add_help=False,
    )
    parser.add_argument(
        "--config", help="The recipe: a YAML file of the settings below; its `base:` is merged beneath it."
    )
    parser.add_argument("--seed_everything", type=int, default=0, help="Seed of weights, order and everything random.")
    parser.add_argument(
        "--ckpt_path", help="Checkpoint or exported folder to start from; by default the run directory's newest."
    )
    parser.add_argument(
        "--allow_custom_code",
        action="store_true",
        help="Let the recipe import classes that are not prism_lightning's or on its list: their code runs.",
    )
    parser.add_argument(
        "--print_config", action="store_true", help="Print the composed recipe with every default, and do nothing."
    )
    parser.add_argument(
        "--device", default="auto", help="With `index`: cpu, cuda, cuda:N or mps; auto is CUDA where there is one."
    )
    parser.add_argument(
        "--dtype", default="fp32", help="With `index`: fp32, or bf16 for the decoder; what follows it stays fp32."
    )
    parser.add_argument(
        "--model.class_path",
        default="PrismLM",
        help="DenseLM or PrismLM; DenseLM takes those below that are no prototype's.",
    )
    groups = {"run": RunSettings, "model.init_args": PrismLM, "data": TextData, "index": IndexSettings}
    for group, owner in {**groups, "trainer": Trainer}.items():
        parser.add_class_arguments(owner, group)
    page = re.sub(r"\n  --\S+ CONFIG +Path to a configuration file\.", "", parser.format_help())
    page = re.sub(r", --\S+\+ \S+", "", page)  # list appending and nested files: the parser's own, not a recipe's
    # Which subclasses are known depends on what happens to be imported.
    return re.sub(r",\s+known\s+subclasses:.*?\)(?=\n  -|\n\n|\n$)", ")", page, flags=re.S)


if __name__ == "__main__":
    Path(__file__).with_name("settings.txt").write_text(settings_page())
