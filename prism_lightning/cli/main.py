"""The command line: one place for all verbs. Nothing heavy is imported before a verb needs it."""

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
    """Verbs that `--help` lists under one heading: for each its module in this package and what it does.

    Every verb is a function of that name, which takes the arguments behind the verb.
    """

    heading: str
    verbs: dict[str, tuple[str, str]]


GROUPS = (
    VerbGroup(
        "verbs on a recipe (--config recipes/X.yaml, any setting overridden by --key value):",
        {
            "fit": ("training", "train a model from a recipe; the same command resumes an interrupted run"),
            "validate": ("training", "evaluate a trained model on the recipe's validation split"),
            "test": ("training", "the same under the name test, for a split of its own"),
            "predict": ("training", "write the log-probability of every validation token"),
            "index": ("index", "build the index over the training data that attribution asks"),
        },
    ),
    VerbGroup(
        "verbs on a trained model (--ckpt_path runs/X):",
        {
            "generate": ("models", "continue a prompt with a trained model"),
            "explain": ("models", "show which prototypes made each token likely"),
            "export": ("models", "write a model, with interventions, as a Hugging Face folder of its own"),
        },
    ),
    VerbGroup(
        "verbs that act on prototypes (--ckpt_path runs/X); all verbs on a trained model then take their file by"
        " --intervention:",
        {
            "suppress": (
                "interventions",
                "find the prototypes behind a behaviour, remove them, and show what that does",
            ),
            "calibrate": (
                "interventions",
                "fit factors on prototypes that make right answers likelier, and judge them on others",
            ),
        },
    ),
    VerbGroup(
        "verbs that evaluate and compare (each with a --help of its own):",
        {
            "evaluate": (
                "evaluation",
                "score a trained model on a suite of the LM Evaluation Harness, alone or against another",
            ),
            "lm_eval": (
                "evaluation",
                "the harness's own command line, which knows --model prism --model_args checkpoint=RUN here",
            ),
            "sweep": ("sweep", "plan, run, watch and collect a grid of runs"),
            "report": ("report", "write the paper's tables and figures from finished runs"),
        },
    ),
    VerbGroup(
        "verbs on a trained model and its index (--ckpt_path runs/X):",
        {
            "attribute": (
                "attribution",
                "name the training tokens, passages and documents that made the model say something",
            ),
            "curvature": (
                "attribution",
                "report how local the curvature is, against the dense head and random prototypes",
            ),
            "prototypes": (
                "attribution",
                "show prototypes: a label, usage, promoted tokens, and training tokens near and far",
            ),
        },
    ),
)
VERBS = {name: entry for group in GROUPS for name, entry in group.verbs.items()}
# Their --help is printed from a file, since Lightning alone takes five seconds to import; a test compares the two.
VERBS_ON_RECIPES = GROUPS[0].verbs

OVERVIEW = f"""prism_lightning {__version__}: train prototype language models and ask why they say what they say

usage: python -m prism_lightning VERB ..., or prism VERB ...

{{verbs}}

python -m prism_lightning VERB --help explains a verb and every setting it takes.
First steps: python -m prism_lightning fit --config recipes/quickstart.yaml
"""

# Verbs that keep what they have finished: the same command goes on there.
RESUMABLE = {"fit", "index", "prototypes", "suppress", "calibrate", "evaluate", "sweep"}
# Nothing is sent anywhere unless the user says so; a value set outside wins.
QUIET_LIBRARIES = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
    "TOKENIZERS_PARALLELISM": "true",
}


def console_script() -> None:
    """The command `prism`."""
    sys.exit(main(sys.argv[1:]))


def main(arguments: list[str]) -> int:
    """Run a command line; returns the exit code. Errors of the user's are one line each and exit with 2."""
    tolerate_any_character()
    # Every torch.load below us, also inside Lightning and DeepSpeed, then reads tensors and plain values only.
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    for name, value in QUIET_LIBRARIES.items():
        os.environ.setdefault(name, value)
    # DeepSpeed says so whenever a library looks whether it is there.
    logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator to CPU" not in record.getMessage())
    verb = arguments[0] if arguments else "help"
    with stop_signals_raise():
        try:
            _run(verb, arguments[1:])
            return 0
        except Stopped as stop:
            if int(os.environ.get("LOCAL_RANK", 0)) == 0:  # the other processes of a run have nothing to add
                print(stop_line(verb, stop), file=sys.stderr)
            return stop.exit_code
        except Exception as error:
            mendable = user_error_in(error)
            if mendable is None:
                raise
            for problem in mendable.problems:
                print(f"error: {problem}", file=sys.stderr)
            return 2


def stop_line(verb: str, stop: Stopped) -> str:
    """What the user reads after a signal: what stopped the verb, what was saved, and how to go on."""
    parts = [f"stopped by {stop.signal.name}"]
    if stop.saved:
        parts.append(f": {stop.saved}; the same command resumes there")
    elif verb in RESUMABLE:
        parts.append(": what is finished is kept; the same command goes on")
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
