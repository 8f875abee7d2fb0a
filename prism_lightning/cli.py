"""The command line: one place for all verbs. Nothing heavy is imported before a verb needs it."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from importlib import import_module, resources

from prism_lightning import __version__
from prism_lightning.common.stops import Stopped, stop_signals_raise
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

usage: python -m prism_lightning VERB ..., or prism VERB ...

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
        groups = {"training": TRAINING_VERBS, "model": MODEL_VERBS, "attribution": ATTRIBUTION_VERBS}
        groups |= {"evaluation": EVALUATION_VERBS, "intervention": INTERVENTION_VERBS}
        print(OVERVIEW.format(**{name: _listed(verbs) for name, verbs in groups.items()}), end="")
    elif verb == "--version":
        print(f"prism_lightning {__version__}")
    else:
        _verb(verb)(arguments)


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
