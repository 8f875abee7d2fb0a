"""The model card: README.md of a shared model, made from the files of its run.

Every number is read from the run, and what a file does not say is "not known".
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import transformers
import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from prism_lightning import __version__
from prism_lightning.common import markdown
from prism_lightning.common.counts import format_count
from prism_lightning.common.errors import visible
from prism_lightning.evaluation.results import TaskResult, read_result, results_folder
from prism_lightning.interventions.intervention import Intervention, located
from prism_lightning.models import PrismForCausalLM
from prism_lightning.reporting.run_facts import (
    DATASET,
    REPOSITORY,
    RunFacts,
    entry,
    is_public,
    local_name,
    number_text,
    public_name,
    text_or_unknown,
)
from prism_lightning.run.directory import RunPaths, exported_folder
from prism_lightning.run.hub import CARD

TEMPLATES = Path(__file__).with_name("templates")
FOLDER = "path/to/folder"  # in the commands of a card that is not for a repository
FIGURES = {
    "loss": "cross-entropy in nats per token",
    "perplexity": "exponential of the loss",
    "bits_per_byte": "loss in bits per byte of text",
}
FAITHFULNESS = {
    "prediction_recovered": "1: the prototypes alone predict as well as the model; 0: as badly as its mean state",
    "prediction_divergence": "mean KL divergence of the prototypes' prediction from the model's, in nats",
    "top1_agreement": "share of tokens for which both have the same likeliest token",
    "unexplained_variance": "share of the hidden states' squared length outside the mixtures",
    "unexplained_centred_variance": "the same around the mean hidden state",
}


class Section(NamedTuple):
    """A heading with a paragraph and a table; a table without rows is left out."""

    title: str
    text: str
    columns: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()


class ModelCard(NamedTuple):
    """A card and a few lines of it, for `push` to show before anything is sent."""

    text: str
    summary: list[str]


def model_card(
    model: PrismForCausalLM, source: Path, interventions: list[str], repository: str | None = None
) -> ModelCard:
    """Return the card of a model.

    A folder from elsewhere has no run; its own README.md is kept, and applied interventions are added below it.

    Args:
        model: the model, with interventions applied.
        source: the run directory or exported folder that it was loaded from.
        interventions: names or paths of those that are applied on top of the folder's own.
        repository: USER/NAME on the Hugging Face hub that the card is for; None for a local folder.
    """
    paths, applied = RunPaths.of(source), _interventions(model, source, interventions)
    folder = exported_folder(source)
    if folder and (folder / CARD).is_file() and not paths.recipe.is_file():
        return _kept_card(folder / CARD, applied if interventions else None)
    facts, dense = RunFacts.of(paths), model.prototypes is None
    text = _rendered(
        metadata=_metadata(model, facts),
        title=repository.split("/")[-1] if repository else local_name(paths.root.resolve()),
        description=_description(model),
        transformers=transformers.__version__,
        location=repository or FOLDER,
        repository=repository,
        has_prototypes=not dense,
        question='generate --prompt "import os"' if dense else 'explain --text "import os"',
        sections=[
            _recipe(model, facts),
            _data(model, facts),
            _figures("Figures of the training run", "", FIGURES, facts),
            *(
                []
                if dense
                else [_figures("Faithfulness", " of the prototypes without the residual", FAITHFULNESS, facts)]
            ),
            _evaluation(source, interventions),
            applied,
        ],
        version=__version__,
    )
    recovered = number_text(facts.results.get("prediction_recovered"))
    summary = [_description(model), f"Training data: {facts.source()}."]
    summary += [] if dense else [f"Prediction recovered by the prototypes: {recovered}."]
    return ModelCard(text, [visible(line) for line in summary])


def _kept_card(earlier: Path, applied: Section | None) -> ModelCard:
    text = earlier.read_text(encoding="utf-8", errors="replace").rstrip() + "\n"
    if applied is not None and applied.rows:
        text += f"\n## Interventions of this copy\n\n{applied.text}\n\n{_table(applied.columns, applied.rows)}\n"
    return ModelCard(text, [f"The card is kept from {earlier}."])


def _rendered(**card: Any) -> str:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"escaped": lambda text: markdown.escaped(visible(text)), "markdown_table": _table}
    return environment.get_template("model_card.md").render(card=card).rstrip() + "\n"


def _table(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    return markdown.table(columns, ([visible(cell) for cell in row] for row in rows))


def _metadata(model: PrismForCausalLM, facts: RunFacts) -> str:
    """Return the YAML that the hub reads; what is not known is left out, the license too."""
    metadata: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    metadata["tags"] = ["prism_lightning", "custom_code", "arxiv:2607.00510"]
    if model.prototypes is not None:
        metadata["tags"].append("prototype-language-model")
    if is_public(_base_model(model), REPOSITORY):
        metadata["base_model"] = _base_model(model)
    dataset = entry(facts.recipe, "data", "dataset")
    if is_public(dataset, DATASET):
        metadata["datasets"] = [dataset]
    return yaml.safe_dump(metadata, sort_keys=False)


def _base_model(model: PrismForCausalLM) -> str | None:
    return getattr(model.config, "base_model", None)


def _description(model: PrismForCausalLM) -> str:
    config = model.config
    decoder = sum(p.numel() for name, p in model.named_parameters() if not name.startswith("prototypes."))
    sizes = f"a {config.get_text_config().model_type} decoder of {format_count(decoder)} parameters"
    if model.prototypes is None:
        return f"Dense language model: {sizes}, without prototypes."
    return (
        f"Prototype language model (PRISM): {sizes} with {config.num_prototypes:,} prototypes, of which"
        f" {config.active_prototypes} are active for a token. Each logit is exactly a sum of one term for every active"
        " prototype and a residual term."
    )


def _recipe(model: PrismForCausalLM, facts: RunFacts) -> Section:
    recipe, results, config = facts.recipe, facts.results, model.config
    steps, tokens = results.get("step"), facts.tokens_of_a_step()
    precision = entry(recipe, "trainer", "precision") or ("32-true" if recipe else None)  # Lightning's default
    rows = [
        ("Recipe", local_name(results.get("recipe"))),
        *([("Pretrained model", public_name(name, REPOSITORY))] if (name := _base_model(model)) else []),
        ("Hidden size", number_text(config.hidden_size)),
        ("Vocabulary", number_text(config.vocab_size)),
        ("Context", number_text(config.context_length)),
        ("Optimiser steps", number_text(steps)),
        ("Tokens of a step", number_text(tokens)),
        ("Tokens in all", number_text(steps * tokens if type(steps) is int and tokens is not None else None)),
        ("Learning rate", number_text(entry(recipe, "model", "init_args", "learning_rate"))),
        ("Weight decay", number_text(entry(recipe, "model", "init_args", "weight_decay"))),
        ("Precision", text_or_unknown(precision)),
        ("Seed", number_text(recipe.get("seed_everything"))),
        ("Commit of prism_lightning", text_or_unknown(results.get("commit") or facts.environment.get("commit"))),
        *((f"Version of {name}", _package_version(facts, name)) for name in ("torch", "lightning", "transformers")),
    ]
    return Section("Recipe", "How the model was trained, as its run recorded it.", ("Setting", "Value"), tuple(rows))


def _package_version(facts: RunFacts, package: str) -> str:
    return text_or_unknown(entry(facts.environment, "packages", package))


def _data(model: PrismForCausalLM, facts: RunFacts) -> Section:
    rows = [("Source", facts.source())]
    for split in ("train", "validation"):
        rows += [
            (f"Tokens, {split} split", number_text(entry(facts.data, split, "tokens"))),
            (f"Documents, {split} split", number_text(entry(facts.data, split, "documents"))),
        ]
    rows += [
        ("Tokenizer", facts.tokenizer(pretrained=_base_model(model) is not None)),
        ("Fingerprint of the prepared data", text_or_unknown(facts.environment.get("data_fingerprint"))),
    ]
    return Section("Data", "What the model was trained on.", ("Data", "Value"), tuple(rows))


def _figures(title: str, what: str, meanings: dict[str, str], facts: RunFacts) -> Section:
    values = {name: number_text(facts.results.get(name)) for name in meanings}
    rows = tuple((name.replace("_", " "), values[name], meaning) for name, meaning in meanings.items())
    text = f"Measured{what} by the training run on its validation split, without interventions."
    return Section(title, text, ("Figure", "Value", "Meaning"), rows)


def _evaluation(source: Path, interventions: list[str]) -> Section:
    files = sorted(results_folder(source, interventions).glob("*.json"))
    rows = tuple(_evaluation_row(result) for path in files if (result := read_result(path.parent, path.stem)))
    text = "Zero-shot, measured by prism_lightning" + (", with the interventions." if interventions else ".")
    columns = ("Task", "Metric", "Value", "Standard error", "Chance", "Documents")
    return Section("Evaluation", text if rows else "No results are known for this model.", columns, rows)


def _evaluation_row(result: TaskResult) -> tuple[str, ...]:
    numbers = [number_text(value) for value in (result.value, result.error, result.chance, result.documents)]
    return (result.task, result.metric, *numbers)


def _interventions(model: PrismForCausalLM, source: Path, names: list[str]) -> Section:
    prototypes = {prototype for scaling in model.scalings for prototype in scaling.factors}
    if not prototypes:
        return Section("Interventions", "None: the logits are those of the decoder and its head.")
    removed = {prototype for scaling in model.scalings for prototype, factor in scaling.factors.items() if factor == 0}
    text = (
        f"The terms of {len(prototypes):,} prototypes are scaled in some or all logits, those of {len(removed):,} by 0."
        " The factors are in config.json."
    )
    made_by = [Intervention.read(located(source, name)).origin.get("verb") for name in names]
    rows = tuple((Path(name).stem, text_or_unknown(verb)) for name, verb in zip(names, made_by, strict=True))
    return Section("Interventions", text, ("Applied", "Made by"), rows)
