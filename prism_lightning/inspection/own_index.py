"""The index of a model's own prototypes, the source of cards, labels and traces."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

from prism_lightning.attribution.build.builder import Builder
from prism_lightning.attribution.settings import IndexSettings
from prism_lightning.common.errors import UserError, disk_is_full
from prism_lightning.common.files import read_json
from prism_lightning.common.progress import PhaseProgress
from prism_lightning.data.sample import sampled_store
from prism_lightning.models import PrismForCausalLM
from prism_lightning.run.directory import RunPaths
from prism_lightning.run.fingerprints import model_fingerprint
from prism_lightning.run.training_data import data_of

# All 3.1 million tokens of the quickstart took two thirds of `suppress`'s time.
OWN_INDEX_TOKENS = 1_000_000


def own_index(run: Path, model: PrismForCausalLM, rebuild: bool = False) -> Path:
    """Return the folder of the index of the model's own prototypes, RUN/prototypes; build it where it is missing.

    Of a large corpus it indexes random whole documents; `index --index.dictionary model` indexes all of it.

    Args:
        run: the run directory.
        model: of the run.
        rebuild: whether an existing index is replaced.

    Raises:
        UserError: a dense model; otherwise as `data_of` and `Builder`.
    """
    paths = RunPaths.of(run)
    folder = paths.prototypes
    manifest = read_json(folder / "manifest.json")
    if manifest is not None and not rebuild and _is_own(manifest, model):
        return folder
    corpus = data_of(paths.root).train  # before anything is removed
    try:
        facts = manifest or read_json(folder / "settings.json")  # the latter alone where a build was interrupted
        if folder.is_dir() and (facts is None or rebuild or manifest is not None or not _is_model(facts, model)):
            shutil.rmtree(folder)
        store = sampled_store(corpus, OWN_INDEX_TOKENS, folder / "sample")
    except OSError as error:
        fix = "free space" if disk_is_full(error) else "give yourself write access"
        raise UserError(f"{folder} cannot be written ({error.strerror}): {fix}") from error
    tokens = f"{store.counts['tokens']:,} of {corpus.counts['tokens']:,} training tokens"
    print(f"indexing {tokens} by the model's own prototypes, once: {folder}", file=sys.stderr)
    settings = IndexSettings(dictionary="model")
    with PhaseProgress() as progress:
        try:
            builder = Builder(model, store, settings, folder, progress)
        except UserError:  # started by another version, or with the decoder in another type
            shutil.rmtree(folder)
            store = sampled_store(corpus, OWN_INDEX_TOKENS, folder / "sample")
            builder = Builder(model, store, settings, folder, progress)
        builder.build()
    return folder


def _is_model(facts: dict[str, Any], model: PrismForCausalLM) -> bool:
    return facts.get("model") == model_fingerprint(model)


def _is_own(manifest: dict[str, Any], model: PrismForCausalLM) -> bool:
    """Whether a finished index belongs to this model and its corpus still exists."""
    return _is_model(manifest, model) and Path(str(manifest.get("store"))).is_dir()
