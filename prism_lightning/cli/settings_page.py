"""The page of settings that `fit --help` prints.

`python -m prism_lightning.cli.settings_page` writes it to settings.txt after a setting has changed.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from jsonargparse import ArgumentParser
from lightning.pytorch import Trainer

from prism_lightning.attribution.settings import IndexSettings
from prism_lightning.lightning_modules.prism import PrismLM
from prism_lightning.lightning_modules.text_data import TextData
from prism_lightning.run.directory import RunSettings


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
