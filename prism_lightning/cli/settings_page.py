"""The page of settings that `fit --help` prints.

Run `python -m prism_lightning.cli.settings_page` after changing a setting: it writes the page to settings.txt.
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
    """Return the page: every setting with its type, default and meaning, as the parser prints them."""
    os.environ["COLUMNS"] = "110"
    parser = _parser()
    groups = {"run": RunSettings, "model.init_args": PrismLM, "data": TextData, "index": IndexSettings}
    for group, owner in {**groups, "trainer": Trainer}.items():
        parser.add_class_arguments(owner, group)
    page = re.sub(r"\n  --\S+ CONFIG +Path to a configuration file\.", "", parser.format_help())
    # The parser's options for appending to lists are none of a recipe's.
    page = re.sub(r", --\S+\+ \S+", "", page)
    # The known subclasses depend on the modules imported so far.
    return re.sub(r",\s+known\s+subclasses:.*?\)(?=\n  -|\n\n|\n$)", ")", page, flags=re.S)


def _parser() -> ArgumentParser:
    """Return a parser of the settings that belong to no group."""
    parser = ArgumentParser(
        prog="python -m prism_lightning VERB",
        usage="%(prog)s --config recipes/X.yaml [--SETTING VALUE ...]",
        description="Any setting of the recipe can be given on the command line; "
        "model.init_args.X may be shortened to model.X.",
        add_help=False,
    )
    parser.add_argument(
        "--config", help="The recipe, a YAML file of the settings below; it overrides the recipes of its `base:`."
    )
    parser.add_argument(
        "--seed_everything", type=int, default=0, help="Seed of the weights and of all other randomness of training."
    )
    parser.add_argument(
        "--ckpt_path", help="Checkpoint or exported folder to start from; by default the newest in the run directory."
    )
    parser.add_argument(
        "--allow_custom_code",
        action="store_true",
        help="Allow the recipe to import any class, which runs its code; without it only a list of known classes.",
    )
    parser.add_argument(
        "--print_config", action="store_true", help="Print the composed recipe with every default, and exit."
    )
    parser.add_argument(
        "--device",
        default="auto",
        help="Device of the verb `index`: cpu, cuda, cuda:N or mps; auto takes CUDA if available.",
    )
    parser.add_argument(
        "--dtype",
        default="fp32",
        help="Number type of the decoder in the verb `index`: fp32, or bf16. Head and prototypes stay fp32.",
    )
    parser.add_argument(
        "--model.class_path",
        default="PrismLM",
        help="Class of the model: DenseLM or PrismLM. DenseLM has the settings below that are not about prototypes.",
    )
    return parser


if __name__ == "__main__":
    Path(__file__).with_name("settings.txt").write_text(settings_page())
