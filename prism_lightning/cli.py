"""The command line: one place for all verbs. Nothing heavy is imported before a verb needs it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from importlib import import_module, resources

from prism_lightning import __version__
from prism_lightning.common.streams import tolerate_any_character
from prism_lightning.errors import UserError, nearest, user_error_in

TRAINING_VERBS = {
    "fit": "train a model from a recipe; the same command resumes an interrupted run",
    "validate": "evaluate a trained model on the recipe's validation split",
    "test": "the same under the name test, for a split of its own",
    "predict": "write the log-probability of every validation token",
    "index": "build the index over the training data that attribution asks",
}
MODEL_VERBS = {
    "generate": "continue a prompt with a trained model",
    "explain": "show which prototypes made each token likely",
    "export": "write a model, with interventions, as a Hugging Face folder of its own",
}
INTERVENTION_VERBS = {
    "suppress": "find the prototypes behind a behaviour, remove them, and show what that does",
    "calibrate": "fit factors on prototypes that make right answers likelier, and judge them on others",
}
EVALUATION_VERBS = {
    "evaluate": "score a trained model on a suite of the LM Evaluation Harness, alone or against another",
    "lm_eval": "the harness's own command line, which knows --model prism --model_args checkpoint=RUN here",
    "sweep": "plan, run, watch and collect a grid of runs",
    "report": "write the paper's tables and figures from finished runs",
}
ATTRIBUTION_VERBS = {
    "attribute": "name the training tokens, passages and documents that made the model say something",
    "curvature": "report how local the curvature is, against the dense head and random prototypes",
    "prototypes": "show prototypes: a label, usage, promoted tokens, and training tokens near and far",
}

OVERVIEW = f"""prism_lightning {__version__}: train prototype language models and ask why they say what they say

usage: python -m prism_lightning VERB ...

verbs on a recipe (--config recipes/X.yaml, any setting overridden by --key value):
{{training}}

verbs on a trained model (--ckpt_path runs/X):
{{model}}

verbs that act on prototypes (--ckpt_path runs/X); all verbs on a trained model then take their file by --intervention:
{{intervention}}

verbs that evaluate and compare (each with a --help of its own):
{{evaluation}}

verbs on a trained model and its index (--ckpt_path runs/X):
{{attribution}}

python -m prism_lightning VERB --help explains a verb and every setting it takes.
First steps: python -m prism_lightning fit --config recipes/quickstart.yaml
"""


def main(arguments: list[str]) -> int:
    """Run a command line; returns the exit code. Errors of the user's are one line each and exit with 2."""
    tolerate_any_character()
    # Every torch.load below us, also inside Lightning and DeepSpeed, then reads tensors and plain values only.
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    try:
        if not arguments or arguments[0] in ("-h", "--help", "help"):
            groups = {"training": TRAINING_VERBS, "model": MODEL_VERBS, "attribution": ATTRIBUTION_VERBS}
            groups |= {"evaluation": EVALUATION_VERBS, "intervention": INTERVENTION_VERBS}
            print(OVERVIEW.format(**{name: _listed(verbs) for name, verbs in groups.items()}), end="")
            return 0
        if arguments[0] == "--version":
            print(__version__)
            return 0
        _verb(arguments[0])(arguments[1:])
        return 0
    except (KeyboardInterrupt, SystemExit) as stop:
        # Lightning turns an interrupt into an exit of its own, after saving its loggers.
        if isinstance(stop, SystemExit) and not isinstance(stop.__context__, KeyboardInterrupt):
            raise
        print("interrupted: the same command goes on where it stopped", file=sys.stderr)
        return 130
    except Exception as error:
        mendable = user_error_in(error)
        if mendable is None:
            raise
        for problem in mendable.problems:
            print(f"error: {problem}", file=sys.stderr)
        return 2


def _verb(name: str) -> Callable[[list[str]], None]:
    if name in TRAINING_VERBS:
        return lambda arguments: _training(name, arguments)
    if name in ATTRIBUTION_VERBS:
        from prism_lightning import attribution_verbs

        return getattr(attribution_verbs, name)
    if name in EVALUATION_VERBS:
        module = name if name in ("sweep", "report") else "evaluation"
        return getattr(import_module(f"prism_lightning.{module}_verbs"), name)
    if name in INTERVENTION_VERBS:
        from prism_lightning import intervention_verbs

        return getattr(intervention_verbs, name)
    if name in MODEL_VERBS:
        from prism_lightning import model_verbs

        return getattr(model_verbs, name)
    known = [*TRAINING_VERBS, *MODEL_VERBS, *ATTRIBUTION_VERBS, *EVALUATION_VERBS, *INTERVENTION_VERBS]
    raise UserError(f"unknown verb {name!r}: {nearest(name, known)}")


def _training(verb: str, arguments: list[str]) -> None:
    if {"-h", "--help"}.intersection(arguments):
        # Printed from a file, since Lightning alone takes five seconds to import; a test compares it with the parser.
        print(f"{verb}: {TRAINING_VERBS[verb]}\n")
        print(resources.files("prism_lightning").joinpath("settings.txt").read_text(), end="")
        return
    if verb == "index":
        from prism_lightning import indexing

        indexing.run(arguments)
        return
    from prism_lightning import training

    training.run(verb, arguments)


def _listed(verbs: dict[str, str]) -> str:
    return "\n".join(f"  {name:<10} {text}" for name, text in verbs.items())
