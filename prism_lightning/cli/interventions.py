"""The verbs that act on prototypes: suppress and calibrate."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prism_lightning.cli.dataclass_options import add_options, parsed_options
from prism_lightning.cli.options import device_options, model_parser, suite_options
from prism_lightning.cli.renamed_flags import replace_renamed_flags
from prism_lightning.common.texts import decode_options
from prism_lightning.interventions.controllers.settings import ControllerSettings
from prism_lightning.interventions.suppression.settings import BehaviourSource, SuppressionSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from prism_lightning.evaluation.results import TaskResult
    from prism_lightning.evaluation.suites import SuiteTask
    from prism_lightning.models import PrismForCausalLM

EXAMPLES_PER_GROUP = 3  # training tokens of each group on a prototype's card
RENAMED_FLAGS = {"--fall": "--min_rate_reduction", "--rise": "--max_perplexity_increase"}

SUPPRESS = """examples:
  suppress --ckpt_path runs/tinystories_prism --words sad cry cried crying --name calm
  suppress --ckpt_path runs/tinystories_prism --with_texts rude.jsonl --without_texts kind.jsonl --name kind
  suppress --ckpt_path runs/tinystories_prism --id 318 77 --words sad --name two
  generate --ckpt_path runs/tinystories_prism --intervention calm --prompt "Tom was"

Prototypes are ranked on training documents. Their number is selected on one half of the run's validation documents.
The selected prototypes are compared with rivals on the other half. The intervention is RUN/interventions/NAME.json.
Beside it, NAME.md has the comparison and a card of every prototype, NAME.png has the plot, and NAME.details.json has
all numbers."""

CALIBRATE = """examples:
  calibrate --ckpt_path runs/tinystories_prism --suite evals/continuation.yaml --name controllers
  evaluate --ckpt_path runs/tinystories_prism --intervention controllers --suite evals/language_modeling.yaml

Controllers are factors on prototypes. They are fitted to multiple-choice items and judged on other items. A task with a
training split is fitted to that split; another task is fitted to one half of its items. Tasks made from the run's
documents are fitted to training documents and judged on held-out ones. The intervention is
RUN/interventions/NAME.json. Beside it, NAME.md has the comparison and the prototypes with the largest changes, NAME.png
has the plot, and NAME.details.json has all numbers."""


@dataclass(frozen=True)
class OutputOptions:
    """Where an intervention is written.

    Attributes:
        name: Name of the intervention; it is written to RUN/interventions/NAME.json.

    Raises:
        ValueError: the name could be a path.
    """

    name: str

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[\w-]+", self.name):
            raise ValueError(f"--name {self.name}: give a name of letters, digits, - and _")


@dataclass(frozen=True)
class ScoredSuites:
    """Suites that a model is scored on without and with an intervention.

    Attributes:
        suite: YAML files of tasks that the model is also scored on, unchanged and suppressed.
        data_dir: Folder with TASK/SPLIT.jsonl for the suites; without it tasks come from the hub.
    """

    suite: list[Path] | None = None
    data_dir: Path | None = None


def suppress(arguments: list[str]) -> None:
    """Find the prototypes behind a behaviour, write an intervention that removes them, and show its effect."""
    parser = model_parser("suppress", "Find the prototypes behind a behaviour and suppress them.", epilog=SUPPRESS)
    add_options(parser, BehaviourSource, OutputOptions, SuppressionSettings, ScoredSuites)
    device_options(parser)
    arguments = replace_renamed_flags(arguments, RENAMED_FLAGS)
    options = parser.parse_args(arguments)
    source = parsed_options(parser, options, BehaviourSource)
    settings = parsed_options(parser, options, SuppressionSettings)
    parsed_options(parser, options, OutputOptions)
    decode_options(options, "words", "label")

    from prism_lightning.common.console import console
    from prism_lightning.common.progress import PhaseProgress
    from prism_lightning.evaluation.suites import load_suites
    from prism_lightning.inspection.cards import inspect_prototypes
    from prism_lightning.inspection.tracing import own_attributor, prototypes_labelled
    from prism_lightning.interventions.suppression.behaviours import load_behaviour
    from prism_lightning.interventions.suppression.experiment import SuppressionExperiment
    from prism_lightning.interventions.suppression.report import comparison_table, measurement_line, verdict
    from prism_lightning.run.directory import RunPaths
    from prism_lightning.run.training_data import data_of

    model, tokenizer = _load_prism_model(options)
    suite = load_suites(options.suite) if options.suite else {}
    data = data_of(RunPaths.of(options.ckpt_path).root)
    behaviour, examples, labels = load_behaviour(source, tokenizer)
    score_suites = _suite_comparison(options, suite)
    attributor = own_attributor(options.ckpt_path, loaded=(model, tokenizer))
    labelled = prototypes_labelled(attributor, source.label) if source.label else []
    with PhaseProgress() as progress:
        experiment = SuppressionExperiment(
            model,
            tokenizer,
            behaviour,
            examples or data.train.texts(data.train.sample(settings.tokens)),
            data.validation.texts(),
            settings,
            [*(source.id or []), *labelled] or None,
            labels,
            progress,
            lambda measurement: console.print(measurement_line(measurement)),
        )
        result = experiment.run()
    prototypes = list(result.kept_attempt.selection.scaling.factors)
    cards = inspect_prototypes(attributor, prototypes, EXAMPLES_PER_GROUP)
    path = _intervention_path(options)
    scores = experiment.report(result, path, _command("suppress", arguments), cards, score_suites)
    for note in behaviour.notes:
        console.print(f"note: {note}", markup=False, style="yellow")
    console.print(comparison_table(result))
    for score in scores:
        line = f"{score['task']}: {score['plain']:.4f} unchanged, {score['suppressed']:.4f} suppressed"
        console.print(line, markup=False)
    console.print(verdict(result), markup=False)
    console.print(_written(path), markup=False)


def calibrate(arguments: list[str]) -> None:
    """Fit controllers to multiple-choice items, write them as an intervention, and show their gain on other items."""
    description = "Fit controllers: factors on prototypes that make right answers likelier."
    parser = model_parser("calibrate", description, epilog=CALIBRATE)
    suite_options(parser)
    add_options(parser, OutputOptions, ControllerSettings)
    device_options(parser)
    options = parser.parse_args(arguments)
    settings = parsed_options(parser, options, ControllerSettings)
    parsed_options(parser, options, OutputOptions)

    from prism_lightning.common.console import console
    from prism_lightning.common.progress import PhaseProgress
    from prism_lightning.evaluation.suites import load_suites
    from prism_lightning.inspection.cards import inspect_prototypes
    from prism_lightning.inspection.tracing import own_attributor
    from prism_lightning.interventions.controllers.fitting import calibrate
    from prism_lightning.interventions.controllers.items import split_items
    from prism_lightning.interventions.controllers.report import gain_table, trace_changes, write_controllers
    from prism_lightning.run.directory import RunPaths
    from prism_lightning.run.training_data import data_of

    model, tokenizer = _load_prism_model(options)
    suite = load_suites(options.suite, options.tasks)
    attributor = own_attributor(options.ckpt_path, loaded=(model, tokenizer))
    data = data_of(RunPaths.of(options.ckpt_path).root)
    with PhaseProgress() as progress:
        fit_items, judged_items = split_items(
            model,
            tokenizer,
            suite,
            options.data_dir,
            # Twice as many documents as items, since some are too short for one.
            lambda: data.train.texts(data.train.sample_documents(2 * settings.items, settings.seed)),
            data.validation.texts,
            settings.items,
            settings.seed,
            progress,
        )
        result = calibrate(model, fit_items, judged_items, settings.seed, settings.permutations, progress)
    traces = trace_changes(model, result)
    cards = inspect_prototypes(attributor, list(traces), EXAMPLES_PER_GROUP)
    path, command = _intervention_path(options), _command("calibrate", arguments)
    write_controllers(path, model, result, traces, cards, settings.traced, list(suite), command)
    console.print(gain_table(result))
    console.print(_written(path), markup=False)


def _load_prism_model(options: argparse.Namespace) -> tuple[PrismForCausalLM, PreTrainedTokenizerFast]:
    from prism_lightning.common.errors import UserError
    from prism_lightning.run.model_folder import load_exported

    model, tokenizer = load_exported(options.ckpt_path, options.device, options.dtype)
    if model.prototypes is None:
        raise UserError(f"{options.ckpt_path} is dense: it has no prototypes to scale; give a PRISM model")
    return model, tokenizer


def _intervention_path(options: argparse.Namespace) -> Path:
    from prism_lightning.interventions.intervention import folder_of

    return folder_of(options.ckpt_path) / f"{options.name}.json"


def _command(verb: str, arguments: list[str]) -> str:
    return f"python -m prism_lightning {verb} {shlex.join(arguments)}"


def _written(path: Path) -> str:
    return f"wrote {path} and, beside it, {path.stem}.md and {path.stem}.png"


def _suite_comparison(options: argparse.Namespace, suite: dict[str, SuiteTask]) -> Callable[[], list[dict[str, Any]]]:
    """Score suites on the unchanged model; return a function that scores them with the intervention and compares."""
    from prism_lightning.cli.evaluation import evaluated

    def results(interventions: list[str]) -> list[TaskResult]:
        run = (options.ckpt_path, interventions, suite, options.data_dir)
        return evaluated(*run, device=options.device, dtype=options.dtype)

    if not suite:
        return list
    plain = results([])
    return lambda: _suite_scores(options, plain, results([options.name]))


def _suite_scores(
    options: argparse.Namespace, plain: list[TaskResult], suppressed: list[TaskResult]
) -> list[dict[str, Any]]:
    """Return every task's metric without and with the intervention, and the paired difference of accuracies."""
    from prism_lightning.evaluation.results import paired, results_folder

    plain_folder, suppressed_folder = (results_folder(options.ckpt_path, names) for names in ([], [options.name]))
    scores = []
    for before, after in zip(plain, suppressed, strict=True):
        score: dict[str, Any] = {
            "task": before.task,
            "metric": before.metric,
            "plain": before.value,
            "suppressed": after.value,
        }
        if before.chance is not None:
            difference = paired(suppressed_folder, plain_folder, before.task, before.metric)
            score |= {"difference": difference.value, "interval": difference.interval}
        scores.append(score)
    return scores
