"""Settings of a benchmark run: a YAML file, overridden by the command line."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from prism_lightning.common.errors import UserError

PATHS = ("path", "pretrained")  # settings of the corpus and of the model


@dataclass
class CorpusSettings:
    """Settings of the sequences.

    Args:
        path: local files; by default `dataset`, or else the running Python's standard library.
        dataset: name of a Hugging Face dataset.
        documents: largest number of documents.
        tokens: number T of targets per sequence.
        per_document: largest number of windows of T + 1 tokens per document.
        sizes: numbers of training sequences, ascending; each corpus is the beginning of the next.
        queries: held-out sequences on which methods are compared.
        tuning: held-out sequences on which damping and ranks are chosen.
        vocab_size: size of the tokenizer, which is trained on the documents; with `model.pretrained`, its own is used.
        seed: of the order of documents.
    """

    path: str | None = None
    dataset: str | None = None
    documents: int = 50_000
    tokens: int = 64
    per_document: int = 1
    sizes: list[int] = field(default_factory=lambda: [500, 1000, 2000])
    queries: int = 100
    tuning: int = 50
    vocab_size: int = 2048
    seed: int = 0


@dataclass
class TrainingSettings:
    """Settings of training, the same for all models.

    Args:
        epochs: passes over the training sequences.
        batch_size: sequences of an optimiser step.
        commitments: of the PRISM models; the first is the main one, and 0 trains the dense twin's decoder.
    """

    epochs: int = 6
    batch_size: int = 16
    commitments: list[float] = field(default_factory=lambda: [0.1, 0.0, 1.0])


@dataclass
class RetrainingSettings:
    """Settings of retraining on random halves.

    Args:
        halves: random halves of every corpus.
        seeds: training seeds; each half is trained once with each.
        decoders: models on the whole corpus, with other seeds, that are attributed.
        checkpoints: models of the corpus of `variant_size` with the main commitment that TRAK may average over.
        jobs: processes that train at once, one thread each.
        variant_size: the corpus on which all methods are compared, and whose halves are trained with the other
            commitments too, with the first seed.
    """

    halves: int = 100
    seeds: int = 2
    decoders: int = 2
    checkpoints: int = 2
    jobs: int = 2
    variant_size: int = 1000


@dataclass
class QualitySettings:
    """Settings of the comparison with retraining.

    Args:
        ours, reference: names of the method that others are compared with, and of EK-FAC.
        grids: tokens_per_prototype and active of fitted dictionaries, by the index's space.
        fit_steps, polish_steps: that fit them, and that polish the models' own.
        ceiling: a method that differs from `reference` in its seed alone: how far EK-FAC agrees with itself.
        removed, removal_queries, removal_draws, removal_seeds: numbers of removed sequences, of queries, of random sets
            of the same size, and of training seeds.
        removal_size: size of the corpus from which they are removed.
        contenders: methods that are also scored at the other sizes, on the dense twin and on an untrained model, and
            whose first sequences are removed.
        exact_queries: number of queries for which the whole Gauss-Newton matrix is solved, on the smallest corpus.
        patches, patch_queries, patch_rate: tail-patch: sequences of each query, queries, and rate of the step.
    """

    ours: str
    reference: str
    grids: dict[str, dict[str, list[int]]] = field(
        default_factory=lambda: {
            "logits": {"tokens_per_prototype": [512, 128, 32], "active": [4, 16]},
            "hidden": {"tokens_per_prototype": [32, 8], "active": [3, 8]},
        }
    )
    fit_steps: int = 150
    polish_steps: int = 300
    ceiling: str | None = None
    removed: int = 20
    removal_queries: int = 12
    removal_draws: int = 10
    removal_seeds: int = 1
    removal_size: int = 500
    contenders: list[str] = field(default_factory=list)
    exact_queries: int = 30
    patches: int = 10
    patch_queries: int = 30
    patch_rate: float = 0.003  # at 0.1 a step on EK-FAC's first raised the loss by 28 millinats, on random by 74


@dataclass
class CostSettings:
    """Settings of the time measurements.

    Args:
        methods: names; by default all.
        sizes: of the corpus; by default all.
        counts: numbers of queries answered at once.
        repeats: of every measurement.
        patience: seconds for all repeats of one measurement; at least one is made.
        longest: seconds for one measurement; the time of larger numbers of queries is predicted by the line through
            the smaller ones, and marked in the report.
        threads: of every process.
    """

    methods: list[str] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    counts: list[int] = field(default_factory=lambda: [1, 16, 64, 1024])
    repeats: int = 5
    patience: float = 120.0
    longest: float = 300.0
    threads: int = 2


@dataclass
class Settings:
    """Settings of one benchmark run.

    Args:
        name: of its results.
        out: folder of models, states and retrained losses, from which an interrupted run resumes.
        results: folder of the report.
        corpus, training, retraining: see there.
        model: settings of `PrismLM`; without `num_prototypes`, of `DenseLM`.
        methods: the compared methods by name: `kind` (of `registry.KINDS`), its arguments, and as `sweep` the
            alternatives to choose from on the tuning queries, equally many for each method.
        quality, cost: settings of these stages; without them the stage is skipped.
        planted: measure how well facts are found that some sequences state, which the quality stage does too.
    """

    name: str
    out: str
    results: str = "benchmarks/attribution/results"
    corpus: CorpusSettings = field(default_factory=CorpusSettings)
    training: TrainingSettings = field(default_factory=TrainingSettings)
    retraining: RetrainingSettings = field(default_factory=RetrainingSettings)
    model: dict[str, Any] = field(default_factory=dict)
    methods: dict[str, dict[str, Any]] = field(default_factory=dict)
    quality: QualitySettings | None = None
    cost: CostSettings | None = None
    planted: bool = False

    @property
    def folder(self) -> Path:
        """The folder of the run's files."""
        return Path(self.out)

    def identity(self) -> dict[str, Any]:
        """Return the settings that models and losses depend on; a folder with others is refused."""
        return {
            "corpus": _by_name(asdict(self.corpus)),
            "model": _by_name(self.model),
            "epochs": self.training.epochs,
            "batch_size": self.training.batch_size,
        }

    def choice(self) -> list[Any]:
        """Return the settings beside the method's that the choice of alternatives depends on."""
        plan = self.retraining
        return [self.training.commitments[0], plan.variant_size, plan.halves, plan.seeds, plan.checkpoints]


def _by_name(settings: dict[str, Any]) -> dict[str, Any]:
    """Return settings with the names of folders and files in place of their paths, which differ between machines."""
    return settings | {name: Path(settings[name]).name for name in PATHS if settings.get(name)}


def load_settings(path: Path, overrides: list[str]) -> Settings:
    """Return the settings of a YAML file, overridden by `group.name=value` settings.

    Raises:
        UserError: no such file, an unknown setting, a value of another type, or settings at odds with each other.
    """
    if not path.is_file():
        raise UserError(f"--config {path}: no such file")
    try:
        merged = OmegaConf.merge(
            OmegaConf.structured(Settings), OmegaConf.load(path), OmegaConf.from_dotlist(overrides)
        )
        settings = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise UserError(f"{path} {' '.join(overrides)}: {str(error).splitlines()[0]}") from error
    assert isinstance(settings, Settings)
    problems = _corpus_problems(settings) + _quality_problems(settings) + _cost_problems(settings)
    if problems:
        raise UserError(problems)
    return settings


def _corpus_problems(run: Settings) -> list[str]:
    sizes, plan, problems = run.corpus.sizes, run.retraining, []
    if sorted(sizes) != sizes or not sizes:
        problems.append(f"corpus.sizes is {sizes}: list the sizes in ascending order")
    if plan.checkpoints < plan.decoders:
        problems.append(f"retraining.checkpoints is {plan.checkpoints}: give at least retraining.decoders")
    return problems


def _quality_problems(run: Settings) -> list[str]:
    plan, problems = run.quality, []
    if plan is None:
        return []
    for name, size in {
        "retraining.variant_size": run.retraining.variant_size,
        "quality.removal_size": plan.removal_size,
    }.items():
        if size not in run.corpus.sizes:
            problems.append(f"{name} is {size}: take one of corpus.sizes")
    methods_of_setting = {"ours": [plan.ours], "reference": [plan.reference], "contenders": plan.contenders}
    methods_of_setting["ceiling"] = [plan.ceiling] if plan.ceiling else []
    for setting, names in methods_of_setting.items():
        unknown = [name for name in names if name not in run.methods]
        problems += [f"quality.{setting}: no method {name!r} in methods" for name in unknown]
    if plan.ours not in plan.contenders:
        problems.append(f"quality.contenders: {plan.ours!r}, with which others are compared, must be among them")
    return problems


def _cost_problems(run: Settings) -> list[str]:
    plan, problems = run.cost, []
    if plan is None:
        return []
    if len(plan.counts) < 2 or max(plan.counts) > run.corpus.queries:
        problems.append(
            f"cost.counts is {plan.counts}: give two numbers or more, up to corpus.queries, {run.corpus.queries}"
        )
    names = plan.methods or list(run.methods)
    problems += [f"cost.methods: no method {name!r} in methods" for name in names if name not in run.methods]
    for size in plan.sizes or run.corpus.sizes:
        if size not in run.corpus.sizes:
            problems.append(f"cost.sizes has {size}: take some of corpus.sizes")
        elif run.retraining.checkpoints > run.retraining.decoders and size != run.retraining.variant_size:
            several = [name for name in names if run.methods.get(name, {}).get("several")]
            problems += [f"cost: {name} has all its checkpoints at retraining.variant_size only" for name in several]
    return problems


def digest(value: Any) -> str:
    """Return a short hash of plain settings."""
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=6).hexdigest()
