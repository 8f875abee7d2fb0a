"""The verbs fit, validate, test and predict. Lightning is imported when one of them is called."""

from __future__ import annotations


def fit(arguments: list[str]) -> None:
    """Train a model from a recipe, or resume an interrupted run."""
    _run("fit", arguments)


def validate(arguments: list[str]) -> None:
    """Evaluate a trained model on the recipe's validation split."""
    _run("validate", arguments)


def test(arguments: list[str]) -> None:
    """Evaluate like `validate`, with metrics under the name test."""
    _run("test", arguments)


def predict(arguments: list[str]) -> None:
    """Write the log-probability of every validation token to the run directory."""
    _run("predict", arguments)


def _run(verb: str, arguments: list[str]) -> None:
    from prism_lightning.training.trainer import run

    run(verb, arguments)
