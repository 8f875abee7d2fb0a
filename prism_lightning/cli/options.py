"""Options that several verbs share. Importing this is quick: nothing here needs torch."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def model_parser(verb: str, description: str, **settings: Any) -> argparse.ArgumentParser:
    """Return the parser of a verb that needs a trained model, with the option --ckpt_path.

    Args:
        verb: the verb's name.
        description: the first paragraph of its --help.
        settings: further arguments of ArgumentParser; an `epilog` is printed with its own line breaks.
    """
    if "epilog" in settings:
        settings["formatter_class"] = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog=f"python -m prism_lightning {verb}", description=description, **settings)
    parser.add_argument(
        "--ckpt_path",
        type=Path,
        required=True,
        help="Run directory of a finished fit, or an exported model folder.",
    )
    return parser


def steered_parser(verb: str, description: str, **settings: Any) -> argparse.ArgumentParser:
    """Return the parser of a verb that also applies interventions; arguments as of `model_parser`."""
    parser = model_parser(verb, description, **settings)
    parser.add_argument(
        "--intervention",
        nargs="+",
        default=[],
        metavar="NAME",
        help="Interventions of `suppress` and `calibrate` to apply, each by its name or its file. Factors of the same"
        " prototype are multiplied.",
    )
    return parser


def device_options(parser: argparse.ArgumentParser) -> None:
    """Add --device and --dtype: where the model computes, and the number type of the decoder."""
    parser.add_argument(
        "--device",
        default="auto",
        help="Device to compute on: cpu, cuda, cuda:N or mps (default auto: CUDA if available, otherwise cpu).",
    )
    parser.add_argument(
        "--dtype",
        default="fp32",
        help="Number type of the decoder: fp32, or bf16 for half the memory. Head and prototypes stay fp32"
        " (default fp32).",
    )


def suite_options(parser: argparse.ArgumentParser) -> None:
    """Add --suite, --tasks and --data_dir: the tasks of an evaluation and the folder of their data."""
    parser.add_argument("--suite", nargs="+", type=Path, required=True, help="YAML files of tasks, see evals/*.yaml.")
    parser.add_argument("--tasks", nargs="+", help="Tasks of the suites to use (default: all).")
    parser.add_argument(
        "--data_dir", type=Path, help="Folder with the tasks' data as TASK/SPLIT.jsonl (default: the Hugging Face hub)."
    )


def refuse_below(parser: argparse.ArgumentParser, options: argparse.Namespace, minimum: int, *names: str) -> None:
    """Exit with code 2 if one of the named options is set to less than `minimum`, or is NaN."""
    for name in names:
        value = getattr(options, name)
        if value is not None and not value >= minimum:  # NaN compares false
            parser.error(f"--{name} must be " + ("a positive number" if minimum == 1 else f"at least {minimum}"))
