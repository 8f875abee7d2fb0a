"""The end of `fit`: polish the prototypes, evaluate, export one safetensors folder and explain a sample."""

from __future__ import annotations

import json
import math
import resource
import time
from typing import Any

import torch
from lightning.pytorch import Trainer

from prism_lightning.common.console import console
from prism_lightning.common.errors import UserError
from prism_lightning.common.json_text import as_json
from prism_lightning.common.progress import PhaseProgress
from prism_lightning.inspection.explain import explain_prompt, explanation_table
from prism_lightning.lightning_modules.dense import DenseLM
from prism_lightning.lightning_modules.prism import PrismLM
from prism_lightning.lightning_modules.text_data import TextData
from prism_lightning.models import PrismForCausalLM
from prism_lightning.models.low_rank import save_adapter, take_out_adapters
from prism_lightning.models.polishing import polish
from prism_lightning.run.directory import RunDirectory
from prism_lightning.run.model_folder import save_exported
from prism_lightning.training.resuming import consolidated_model


def finish(module: DenseLM, data: TextData, trainer: Trainer, run: RunDirectory, recipe: str) -> None:
    """Polish, evaluate and export the trained model, record the results and explain a sample; on the first process.

    The other processes have ended their work by now. Adapters are saved and merged before all else.

    Args:
        module: the trained module.
        data: of the run, set up.
        trainer: after its last step.
        run: gets the exported model, a trained adapter and a line of results.
        recipe: the recipe's path, for the results.

    Raises:
        UserError: a result that is not finite; then nothing is exported.
    """
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    if hasattr(trainer.strategy, "deepspeed_engine"):  # its weights are sharded: read them from the last checkpoint
        checkpoint = run.last_checkpoint()
        assert checkpoint is not None
        module.model = consolidated_model(module.model.config, checkpoint)
    module = module.to(trainer.strategy.root_device).eval()
    if module.lora:
        save_adapter(module.model, module.lora, run.paths.adapter)
        take_out_adapters(module.model, merge=True)
    results = {"recipe": recipe, "step": trainer.global_step} | polish_and_evaluate(module, data)
    results["peak_memory_gib"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)
    if "tokens_per_second" in trainer.callback_metrics:
        results["tokens_per_second"] = round(trainer.callback_metrics["tokens_per_second"].item())
    results["commit"] = json.loads(run.paths.environment.read_text())["commit"]
    check_results(results)
    save_exported(module.model, data.train.tokenizer, run.paths.model)
    run.add_results(results)
    show_sample(module.model.cpu(), data, run.settings.sample_prompt)
    print(f"model: {run.paths.model}", flush=True)
    print(as_json(results), flush=True)


def polish_and_evaluate(module: DenseLM, data: TextData) -> dict[str, Any]:
    """Polish the prototypes of a PRISM model, then return the evaluation on the validation split.

    The unexplained variance before polishing and the seconds that polishing took are added.
    """
    results: dict[str, Any] = {}
    if isinstance(module, PrismLM) and module.polish_steps:
        results["unexplained_variance_before_polish"] = evaluate(module, data)["unexplained_variance"]
        started = time.perf_counter()
        polish_prototypes(module, data)
        results["polish_seconds"] = round(time.perf_counter() - started, 1)
    return results | evaluate(module, data)


def check_results(results: dict[str, Any]) -> None:
    """Raise UserError where a number is NaN or infinite: the weights then are, too."""
    names = [name for name, value in results.items() if isinstance(value, float) and not math.isfinite(value)]
    if names:
        raise UserError(
            f"{', '.join(names)} of the trained model are not finite: train anew with a lower model.learning_rate in"
            " another run.dir"
        )


def show_sample(model: PrismForCausalLM, data: TextData, prompt: str | None) -> None:
    """Print the token that continues the recipe's prompt, with its explanation.

    An error is printed and not raised, since the run is finished and saved by now.
    """
    if not prompt or model.prototypes is None:
        return
    console.print(f"The model continues {prompt!r}:", markup=False)
    try:
        console.print(explanation_table(explain_prompt(model, data.train.tokenizer, prompt, 1)))
    except UserError as error:
        console.print(f"no sample: {error}", markup=False)


@torch.no_grad()
def evaluate(module: DenseLM, data: TextData) -> dict[str, float]:
    """Return loss (nats per token), perplexity, bits per byte and the prototypes' diagnostics of the validation split.

    docs/method.md, "Reported figures", defines them.
    """
    loader = data.validation_loader()
    with PhaseProgress() as progress:
        for number, batch in enumerate(loader):
            module.validation_step({name: value.to(module.device) for name, value in batch.items()}, number)
            progress("evaluating", number + 1, len(loader))
    return {name: round(value.item(), 6) for name, value in module.evaluation(data.validation.bytes_per_token).items()}


def polish_prototypes(module: PrismLM, data: TextData) -> None:
    """Fit the prototypes to hidden states of training blocks, with the decoder frozen (method, section 3)."""
    z_ND = module.sampled_hidden_states(step=0, tokens=module.polish_tokens, salt=2)
    head_VD = module.model.lm_head.weight
    steps = polish(module.layer, z_ND, module.polish_steps, module.polish_learning_rate, data.seed, head_VD)
    with PhaseProgress() as progress:
        for number, _ in enumerate(steps):
            progress("polishing prototypes", number + 1, module.polish_steps)
