"""The weights that a verb starts from: a checkpoint to resume, or a trained model to evaluate."""

from __future__ import annotations

from pathlib import Path

from prism_lightning.common.errors import UserError
from prism_lightning.lightning_modules.dense import DenseLM
from prism_lightning.models import PrismConfig, PrismForCausalLM
from prism_lightning.models.low_rank import take_out_adapters
from prism_lightning.run.checkpoints import load_checkpoint, load_model_weights, open_deepspeed
from prism_lightning.run.directory import RunDirectory, exported_folder, is_deepspeed
from prism_lightning.run.model_folder import load_exported


def find_checkpoint(run: RunDirectory, ckpt_path: str | None) -> Path | None:
    """Return the checkpoint that `fit` resumes from: `ckpt_path`, or the run's newest; None to start anew."""
    return Path(ckpt_path) if ckpt_path else run.last_checkpoint()


def completed_step(run: RunDirectory, max_steps: int) -> int | None:
    """Return the last step of a run that is complete; None where training, results or the model are missing.

    Raises:
        UserError: as `RunDirectory.last_results`.
    """
    results = run.last_results()
    if results and results["step"] >= max_steps and run.paths.model.is_dir():
        return results["step"]
    return None


def load_for_resuming(module: DenseLM, checkpoint: Path) -> None:
    """Check a checkpoint before Lightning opens it, and load the weights of a checkpoint file into the model.

    DeepSpeed loads its own folders.

    Raises:
        UserError: a damaged checkpoint, one of another model, or a folder that is no checkpoint.
    """
    if is_deepspeed(checkpoint):
        open_deepspeed(checkpoint)
    elif checkpoint.is_dir():
        raise UserError(f"{checkpoint} is no checkpoint to resume from: give a file under RUN/checkpoints")
    else:
        load_model_weights(module.model, load_checkpoint(checkpoint)["state_dict"], checkpoint)


def load_for_evaluation(module: DenseLM, run: RunDirectory, ckpt_path: str | None) -> None:
    """Load trained weights into the model.

    Args:
        module: its model gets the weights.
        run: its exported model is the default, and its newest checkpoint where it has no model yet.
        ckpt_path: an exported folder, a checkpoint file or a DeepSpeed folder, in place of the default.

    Raises:
        UserError: nothing to load, or weights of another model.
    """
    trained = run.paths.model if run.paths.model.is_dir() else run.last_checkpoint()
    path = Path(ckpt_path) if ckpt_path else trained
    if path is None:
        raise UserError(f"{run.paths.root} holds neither a model nor a checkpoint: run fit first or give --ckpt_path")
    if exported_folder(path):
        if module.lora:
            take_out_adapters(module.model, merge=False)  # those of the exported model are merged
        weights = {f"model.{name}": value for name, value in load_exported(path)[0].state_dict().items()}
        load_model_weights(module.model, weights, path)
    elif is_deepspeed(path):
        module.model = consolidated_model(module.model.config, path)
    elif path.is_dir():
        raise UserError(f"{path} holds neither an exported model nor a checkpoint: give a file under RUN/checkpoints")
    else:
        load_model_weights(module.model, load_checkpoint(path)["state_dict"], path)


def consolidated_model(config: PrismConfig, checkpoint: Path) -> PrismForCausalLM:
    """Return a model with the full fp32 weights of a DeepSpeed checkpoint folder, of any ZeRO stage.

    Raises:
        UserError: a damaged folder, or weights of another model.
    """
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    open_deepspeed(checkpoint)
    weights = get_fp32_state_dict_from_zero_checkpoint(str(checkpoint), tag="checkpoint")
    model = PrismForCausalLM(config)
    load_model_weights(model, weights, checkpoint)
    return model
