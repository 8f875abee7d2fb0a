"""The command line: the list of all verbs and their execution. No heavy package is imported before a verb needs it."""

from __future__ import annotations

import logging
import os
import sys
from dataclasses import dataclass
from importlib import import_module, resources

from prism_lightning import __version__
from prism_lightning.common.errors import UserError, nearest, user_error_in
from prism_lightning.common.stops import Stopped, stop_signals_raise
from prism_lightning.common.streams import tolerate_any_character


@dataclass(frozen=True)
class VerbGroup:
    """Verbs that `--help` lists under one heading.

    Attributes:
        heading: the line above the verbs.
        verbs: for each verb its module in this package and one line on what it does. The module has a function of the
            verb's name, which takes the arguments after the verb.
    """

    heading: str
    verbs: dict[str, tuple[str, str]]


GROUPS = (
    VerbGroup(
        "verbs on a recipe (--config recipes/X.yaml, any setting overridden by --key value):",
        {
            "fit": ("training", "train a model from a recipe; run the same command again to resume an interrupted run"),
            "validate": ("training", "evaluate a trained model on the recipe's validation split"),
            "test": ("training", "evaluate like validate, with metrics under the name test"),
            "predict": ("training", "write the log-probability of every validation token to a file"),
            "index": ("index", "build the index over the training data, which attribute needs"),
        },
    ),
    VerbGroup(
        "verbs on a pretrained model (--model ID_OR_FOLDER):",
        {
            "retrofit": ("retrofit", "fit prototypes to a frozen Hugging Face decoder, on your own text"),
        },
    ),
    VerbGroup(
        "verbs on a trained model (--ckpt_path runs/X):",
        {
            "generate": ("models", "continue a prompt with a trained model"),
            "explain": ("models", "show which prototypes made each token likely"),
            "export": ("models", "write a model with interventions as a Hugging Face folder that loads elsewhere"),
        },
    ),
    VerbGroup(
        "verbs that make interventions on prototypes (--ckpt_path runs/X), which other verbs apply by --intervention:",
        {
            "suppress": (
                "interventions",
                "find the prototypes behind a behaviour, remove them, and measure the effect",
            ),
            "calibrate": (
                "interventions",
                "fit factors on prototypes that make right answers likelier, and test them on other questions",
            ),
        },
    ),
    VerbGroup(
        "verbs that share models by the Hugging Face hub:",
        {
            "push": ("hub", "send a model and its card, after showing what would be sent"),
            "pull": ("hub", "download a model into a run directory"),
        },
    ),
    VerbGroup(
        "verbs that evaluate and compare (each with a --help of its own):",
        {
            "evaluate": (
                "evaluation",
                "score a trained model on a suite of the LM Evaluation Harness, alone or compared with another",
            ),
            "lm_eval": (
                "evaluation",
                "run the harness's own command line, with --model prism --model_args checkpoint=RUN",
            ),
            "sweep": ("sweep", "plan, run, monitor and collect a grid of runs"),
            "report": ("report", "write the paper's tables and figures from finished runs"),
        },
    ),
    VerbGroup(
        "verbs on a trained model and its index (--ckpt_path runs/X):",
        {
            "attribute": (
                "attribution",
                "find the training tokens, passages and documents that influenced a prediction",
            ),
            "curvature": (
                "attribution",
                "measure how local the curvature is, compared with the dense head and random prototypes",
            ),
            "prototypes": (
                "attribution",
                "show prototypes: label, usage, promoted tokens, and typical training tokens",
            ),
        },
    ),
)
VERBS = {name: entry for group in GROUPS for name, entry in group.verbs.items()}
# Their --help is printed from a file, because importing Lightning takes five seconds. A test compares file and parser.
VERBS_ON_RECIPES = GROUPS[0].verbs

OVERVIEW = f"""prism_lightning {__version__}: train prototype language models and explain their predictions

usage: python -m prism_lightning VERB ..., or prism VERB ...

{{verbs}}

python -m prism_lightning VERB --help explains a verb and all its settings.
First steps: python -m prism_lightning fit --config recipes/quickstart.yaml
"""

# Verbs that keep finished work, so that running the same command again resumes.
RESUMABLE = {"fit", "retrofit", "index", "prototypes", "suppress", "calibrate", "evaluate", "sweep"}
# Libraries send nothing unless the user allows it; variables that are set already are kept.
QUIET_LIBRARIES = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
    "TOKENIZERS_PARALLELISM": "true",
}


def console_script() -> None:
    """Run the command `prism` and exit with its code."""
    sys.exit(main(sys.argv[1:]))


def main(arguments: list[str]) -> int:
    """Run a command line and return its exit code; each user error is printed as one line, with exit code 2."""
    tolerate_any_character()
    # Every torch.load, also in Lightning and DeepSpeed, then reads only tensors and plain values.
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    for name, value in QUIET_LIBRARIES.items():
        os.environ.setdefault(name, value)
    # DeepSpeed logs this whenever a library checks whether it is installed.
    logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator to CPU" not in record.getMessage())
    verb = arguments[0] if arguments else "help"
    with stop_signals_raise():
        try:
            _run(verb, arguments[1:])
            return 0
        except Stopped as stop:
            if int(os.environ.get("LOCAL_RANK", 0)) == 0:  # one process prints for all of a run
                print(stop_line(verb, stop), file=sys.stderr)
            return stop.exit_code
        except Exception as error:
            user_error = user_error_in(error)
            if user_error is None:
                raise
            for problem in user_error.problems:
                print(f"error: {problem}", file=sys.stderr)
            return 2


def stop_line(verb: str, stop: Stopped) -> str:
    """Return the message after a signal: the signal, what was saved, and how to resume."""
    parts = [f"stopped by {stop.signal.name}"]
    if stop.saved:
        parts.append(f": {stop.saved}; run the same command again to resume there")
    elif verb in RESUMABLE:
        parts.append(": finished work is kept; run the same command again to resume")
    return "".join(parts)


def _run(verb: str, arguments: list[str]) -> None:
    if verb in ("-h", "--help", "help"):
        print(OVERVIEW.format(verbs="\n\n".join(map(_listed, GROUPS))), end="")
    elif verb == "--version":
        print(f"prism_lightning {__version__}")
    elif verb not in VERBS:
        raise UserError(f"unknown verb {verb!r}: {nearest(verb, VERBS)}")
    elif verb in VERBS_ON_RECIPES and {"-h", "--help"}.intersection(arguments):
        print(f"{verb}: {VERBS[verb][1]}\n")
        print(resources.files("prism_lightning.cli").joinpath("settings.txt").read_text(), end="")
    else:
        getattr(import_module(f"prism_lightning.cli.{VERBS[verb][0]}"), verb)(arguments)


def _listed(group: VerbGroup) -> str:
    return "\n".join([group.heading, *(f"  {name:<10} {text}" for name, (_, text) in group.verbs.items())])
