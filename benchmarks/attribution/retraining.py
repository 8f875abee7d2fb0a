"""Models retrained on parts of the corpus, by several processes, cached and resumable.

Every job leaves one file: the loss of every held-out target under its model, and, for the decoders that are attributed,
the model. Files that are there are not made again.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.utils.logging import disable_progress_bar

from benchmarks.attribution.config import Settings
from benchmarks.attribution.corpus import open_corpus
from benchmarks.attribution.pool import run_all
from benchmarks.attribution.training import DENSE, UNTRAINED, fit_model, target_losses
from prism_lightning.common.files import partial_file
from prism_lightning.models import PrismForCausalLM

disable_progress_bar()  # one for every model that is read
Variant = float | str  # the commitment of a PRISM model, or DENSE or UNTRAINED
FIRST_SEED = 100  # of retrained models: never that of a decoder that is attributed


class Job(NamedTuple):
    """One model to train."""

    path: str  # under the run's `models`, without a suffix
    variant: Variant
    seed: int
    rows: list[int]  # sequences to train on
    keep: bool  # the model too, not its losses alone


def halves(size: int, count: int) -> np.ndarray:
    """Return random halves of the sequences as booleans [count, size]."""
    generator = np.random.default_rng(size)
    included = np.zeros((count, size), dtype=bool)
    for row in included:
        row[generator.permutation(size)[: size // 2]] = True
    return included


def decoder_path(variant: Variant, size: int, seed: int) -> str:
    """Return the path of the model on the first `size` sequences."""
    return f"{variant}/{size}/decoder-{seed}"


def half_path(variant: Variant, size: int, seed: int, half: int) -> str:
    """Return the path of the losses of a half's model."""
    return f"{variant}/{size}/half-{seed}-{half:03d}"


def planned(settings: Settings) -> list[Job]:
    """Return all models of the run: decoders, then halves, ordered by how much of the report needs them."""
    plan, sizes = settings.retraining, settings.corpus.sizes
    main, *other_commitments = settings.training.commitments
    variants: list[Variant] = [main, *other_commitments, DENSE] if settings.quality else [main]
    jobs = [
        Job(decoder_path(variant, size, seed), variant, seed, list(range(size)), True)
        for size in sizes
        for seed in range(plan.decoders)
        for variant in variants
    ]

    size = plan.variant_size
    for seed in range(plan.decoders, plan.checkpoints):
        jobs.append(Job(decoder_path(main, size, seed), main, seed, list(range(size)), True))
    for seed in range(plan.decoders if settings.quality else 0):
        path = decoder_path(UNTRAINED, plan.variant_size, seed)
        jobs.append(Job(path, UNTRAINED, seed, list(range(plan.variant_size)), True))

    def half_jobs(variant: Variant, size: int, seed: int) -> Iterator[Job]:
        for number, included in enumerate(halves(size, plan.halves)):
            rows = np.flatnonzero(included).tolist()
            yield Job(half_path(variant, size, seed, number), variant, FIRST_SEED + seed, rows, False)

    for seed in range(plan.seeds):
        jobs += half_jobs(main, plan.variant_size, seed)
    for variant in variants[:0:-1]:
        if variant:  # commitment 0 trains the dense decoder itself
            jobs += half_jobs(variant, plan.variant_size, 0)
    for seed in range(plan.seeds):
        for size in sizes:
            if size != plan.variant_size:
                jobs += half_jobs(main, size, seed)
    return jobs


def _run(settings: Settings, job: Job) -> None:
    corpus = open_corpus(settings)
    model = fit_model(settings, corpus.train_SL[job.rows], job.variant, job.seed)
    path = settings.folder / "models" / job.path
    path.parent.mkdir(parents=True, exist_ok=True)
    if job.keep:
        model.save_pretrained(path)
    losses_QT = target_losses(model, torch.cat([corpus.queries_QL, corpus.tuning_QL]))
    with partial_file(path.with_suffix(".safetensors")) as partial:
        save_file({"losses": losses_QT}, partial)


def retrain(settings: Settings, jobs: list[Job], description: str = "retraining") -> None:
    """Train the models that are missing of some jobs."""
    open_corpus(settings)
    models = settings.folder / "models"
    missing = [(settings, job) for job in jobs if not (models / f"{job.path}.safetensors").is_file()]
    run_all(_run, missing, settings.retraining.jobs, description, len(jobs) - len(missing))


def losses_of(settings: Settings, path: str) -> Tensor:
    """Return a job's losses [Q + tuning, T], queries first."""
    return load_file(settings.folder / "models" / f"{path}.safetensors")["losses"]


def decoder(settings: Settings, variant: Variant, size: int, seed: int) -> PrismForCausalLM:
    """Return an attributed model, in eval mode."""
    return read_decoder(settings.folder / "models" / decoder_path(variant, size, seed))


def read_decoder(path: Path) -> PrismForCausalLM:
    """Return a saved model, in eval mode."""
    return PrismForCausalLM.from_pretrained(path, local_files_only=True).eval()
