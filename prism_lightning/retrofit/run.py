"""One retrofit from the pretrained model to a run directory that every model verb takes; resumed by the same call."""

from __future__ import annotations

import json
import resource
import shutil
import time
from dataclasses import asdict
from typing import Any

from prism_lightning.common.devices import device_named, dtype_named
from prism_lightning.common.errors import UserError
from prism_lightning.common.progress import PhaseProgress
from prism_lightning.data.corpus import Corpus
from prism_lightning.models import PrismForCausalLM
from prism_lightning.models.conversion import converted
from prism_lightning.models.isolation import check_isolation
from prism_lightning.models.pretrained import open_pretrained
from prism_lightning.retrofit.evaluation import evaluated
from prism_lightning.retrofit.fitting import fit_prototypes, states_needed
from prism_lightning.retrofit.hidden_states import StateFile
from prism_lightning.retrofit.settings import RetrofitSettings
from prism_lightning.run.directory import RunDirectory, RunSettings
from prism_lightning.run.fingerprints import check_context, model_fingerprint
from prism_lightning.run.model_folder import save_exported
from prism_lightning.run.model_tokenizer import check_vocabulary, model_tokenizer, save_tokenizer


def retrofit(settings: RetrofitSettings, corpus: Corpus) -> dict[str, Any]:
    """Fit prototypes to a frozen pretrained decoder, export the model, and return the results on validation text.

    Args:
        settings: of the retrofit.
        corpus: the text; its tokenizer is replaced by the model's.

    Raises:
        UserError: the model, the text or the run directory cannot be used.
    """
    run = RunDirectory(RunSettings(dir=settings.out), option="--out")
    native = open_pretrained(settings.model, settings.gguf_file)
    tokenizer = model_tokenizer(settings.model, settings.gguf_file)
    model = converted(
        native,
        base_model=settings.model,
        fused=False,
        num_prototypes=settings.prototypes,
        active_prototypes=settings.active,
        encoder=settings.encoder,
    )
    check_vocabulary(tokenizer, model.config.vocab_size, settings.model)
    save_tokenizer(tokenizer, run)
    corpus.tokenizer = str(run.paths.tokenizer)
    corpus.open()
    check_text(corpus, model)
    try:
        recipe = {"retrofit": asdict(settings), "data": asdict(corpus), "run": {"dir": settings.out}}
        run.record(recipe, corpus.train.manifest["fingerprint"])
        finished = run.last_results()
        if finished and run.paths.model.is_dir():
            shutil.rmtree(run.paths.retrofit, ignore_errors=True)  # left where a stop came after the results
            print(f"{run.paths.root} is complete: choose another --out, or remove it", flush=True)
            return finished
        return _finish(settings, corpus, model, run)
    finally:
        run.unlock()


def _finish(settings: RetrofitSettings, corpus: Corpus, model: PrismForCausalLM, run: RunDirectory) -> dict[str, Any]:
    """Take the steps that are not done yet, write the run directory's results and remove the intermediate files."""
    model.to(device_named(settings.device))  # type: ignore[arg-type]
    batch_blocks = max(1, settings.batch_tokens // corpus.block_size)
    states = StateFile(
        run.paths.retrofit,
        corpus.train,
        settings.fit_tokens,
        states_needed(settings),
        model.config.hidden_size,
        settings.seed,
    )
    check_sample(settings, states)
    run.paths.retrofit.mkdir(exist_ok=True)
    started = time.monotonic()
    with PhaseProgress() as progress:
        if states.blocks_done() < len(states.blocks):
            narrowed = _narrowed(settings, model)
            states.fill(narrowed, batch_blocks, lambda done, total: progress("computing hidden states", done, total))
            if narrowed is not model:
                del narrowed
        model.prototypes = fit_prototypes(
            states,
            model.lm_head.weight.detach(),
            settings,
            run.paths.retrofit / "fit.safetensors",
            lambda done, total: progress("fitting prototypes", done, total),
        )
        results: dict[str, Any] = {"step": max(1, settings.fit_steps), "fit_tokens": len(states.targets_n)}
        results |= evaluated(
            model,
            corpus.validation,
            settings.validation_tokens,
            batch_blocks,
            lambda done, total: progress("evaluating", done, total),
        )
    results["seconds"] = round(time.monotonic() - started, 1)
    results["peak_memory_gib"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)
    results["commit"] = json.loads(run.paths.environment.read_text())["commit"]
    save_exported(model.cpu(), corpus.train.tokenizer, run.paths.model)
    run.add_results(results)
    shutil.rmtree(run.paths.retrofit)
    return results


def _narrowed(settings: RetrofitSettings, model: PrismForCausalLM) -> PrismForCausalLM:
    """Return the model that computes the hidden states: in bf16 a copy, since the exported weights are not rounded."""
    dtype = dtype_named(settings.dtype)
    if dtype == model.dtype:
        return model
    native = open_pretrained(settings.model, settings.gguf_file)
    copy = converted(native, base_model=settings.model, fused=False).to(model.device)  # type: ignore[arg-type]
    copy.narrow_decoder(dtype, model_fingerprint(copy))
    return copy


def check_text(corpus: Corpus, model: PrismForCausalLM) -> None:
    """Raise UserError if the blocks are longer than the context, or the decoder cannot keep documents apart."""
    check_context(corpus.block_size, model)
    if corpus.isolated:
        check_isolation(model)


def check_sample(settings: RetrofitSettings, states: StateFile) -> None:
    """Raise UserError if the sample has too few tokens for so many prototypes."""
    if states.tokens < settings.prototypes:
        raise UserError(
            f"{states.tokens:,} training tokens are too few to fit {settings.prototypes:,} prototypes: give more text"
            f" or --prototypes {2 ** max(0, (states.tokens // 16).bit_length() - 1)}"
        )
