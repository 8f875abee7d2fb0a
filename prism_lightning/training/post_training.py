"""After training: polish the prototypes, evaluate, export one safetensors folder, explain a sample."""

from __future__ import annotations

import json
import math
import resource
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer

from prism_lightning.common.console import console
from prism_lightning.common.errors import UserError
from prism_lightning.common.json_text import as_json
from prism_lightning.common.progress import Progressing
from prism_lightning.inspection.explain import explain_prompt, explanation_table
from prism_lightning.lightning_modules.dense import DenseLM
from prism_lightning.lightning_modules.prism import PrismLM
from prism_lightning.lightning_modules.text_data import TextData
from prism_lightning.models import PrismConfig, PrismForCausalLM
from prism_lightning.models.polishing import polish
from prism_lightning.run.checkpoints import load_checkpoint, load_model_weights, open_deepspeed
from prism_lightning.run.directory import RunDirectory, exported_folder, is_deepspeed
from prism_lightning.run.model_folder import load_exported, save_exported


def finish(module: DenseLM, data: TextData, trainer: Trainer, run: RunDirectory, recipe: str) -> None:
    """Polish, evaluate, export, record the results and explain a sample; on one process.

    The other ranks are done by now. Weights come from the final checkpoint when a strategy has sharded them.
    """
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    if hasattr(trainer.strategy, "deepspeed_engine"):
        checkpoint = run.last_checkpoint()
        assert checkpoint is not None
        module.model = consolidated_model(module.model.config, checkpoint)
    module = module.to(trainer.strategy.root_device).eval()
    results: dict[str, Any] = {"recipe": recipe, "step": trainer.global_step}
    if isinstance(module, PrismLM) and module.polish_steps:
        results["unexplained_variance_before_polish"] = evaluate(module, data)["unexplained_variance"]
        started = time.perf_counter()
        polish_prototypes(module, data)
        results["polish_seconds"] = round(time.perf_counter() - started, 1)
    results |= evaluate(module, data)
    results["peak_memory_gib"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)
    if "tokens_per_second" in trainer.callback_metrics:
        results["tokens_per_second"] = round(trainer.callback_metrics["tokens_per_second"].item())
    results["commit"] = json.loads(run.paths.environment.read_text())["commit"]
    strange = [name for name, value in results.items() if isinstance(value, float) and not math.isfinite(value)]
    if strange:
        raise UserError(
            f"{', '.join(strange)} of the trained model are not finite: train anew with a lower model.learning_rate in"
            " another run.dir"
        )
    save_exported(module.model, data.train.tokenizer, run.paths.model)
    run.add_results(results)
    show_sample(module.model.cpu(), data, run.settings.sample_prompt)
    print(f"model: {run.paths.model}", flush=True)
    print(as_json(results), flush=True)


def show_sample(model: PrismForCausalLM, data: TextData, prompt: str | None) -> None:
    """Continue the recipe's prompt by a token and explain it, or say why not: the run itself is done and saved."""
    if not prompt or model.prototypes is None:
        return
    console.print(f"The model goes on from {prompt!r}:", markup=False)
    try:
        console.print(explanation_table(explain_prompt(model, data.train.tokenizer, prompt, 1)))
    except UserError as error:
        console.print(f"no sample: {error}", markup=False)


@torch.no_grad()
def evaluate(module: DenseLM, data: TextData) -> dict[str, float]:
    """Loss, perplexity, bits per byte and the prototypes' diagnostics over the validation split."""
    loader = data.validation_loader()
    with Progressing() as progress:
        for number, batch in enumerate(loader):
            module.validation_step({name: value.to(module.device) for name, value in batch.items()}, number)
            progress("evaluating", number + 1, len(loader))
    return {name: round(value.item(), 6) for name, value in module.evaluation(data.validation.bytes_per_token).items()}


def polish_prototypes(module: PrismLM, data: TextData) -> None:
    """Fit the prototypes to hidden states of training blocks, with the decoder frozen."""
    z_ND = module.sampled_hidden_states(step=0, tokens=module.polish_tokens, salt=2)
    steps = polish(module.layer, z_ND, module.polish_steps, module.polish_learning_rate, data.seed)
    with Progressing() as progress:
        for number, _ in enumerate(steps):
            progress("polishing prototypes", number + 1, module.polish_steps)


def consolidated_model(config: PrismConfig, checkpoint: Path) -> PrismForCausalLM:
    """The model with the full fp32 weights of a DeepSpeed checkpoint folder, of any ZeRO stage."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    open_deepspeed(checkpoint)
    weights = get_fp32_state_dict_from_zero_checkpoint(str(checkpoint), tag="checkpoint")
    model = PrismForCausalLM(config)
    load_model_weights(model, weights, checkpoint)
    return model


def load_weights(module: DenseLM, path: Path | None, run: RunDirectory) -> None:
    """Load an exported folder, a checkpoint file or a DeepSpeed folder; by default what `fit` left in the run.

    Raises:
        UserError: nothing to load, or weights of another model.
    """
    path = path or (run.paths.model if run.paths.model.is_dir() else run.last_checkpoint())
    if path is None:
        raise UserError(f"{run.paths.root} holds neither a model nor a checkpoint: run fit first or give --ckpt_path")
    if exported_folder(path):
        weights = {f"model.{name}": value for name, value in load_exported(path)[0].state_dict().items()}
        load_model_weights(module.model, weights, path)
    elif is_deepspeed(path):
        module.model = consolidated_model(module.model.config, path)
    elif path.is_dir():
        raise UserError(f"{path} holds neither an exported model nor a checkpoint: give a file under RUN/checkpoints")
    else:
        load_model_weights(module.model, load_checkpoint(path)["state_dict"], path)
