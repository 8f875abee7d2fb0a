"""Checkpoints that are whole or absent, and that cannot run code when loaded."""

from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from prism_lightning.errors import UserError, disk_is_full
from prism_lightning.models import PrismForCausalLM


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the target and renames, so that neither a kill nor a full disk harms an earlier checkpoint."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Save; UserError when the disk does not take it."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        try:
            with partial.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        except (OSError, RuntimeError) as error:  # torch wraps a failing write in a RuntimeError
            partial.unlink(missing_ok=True)
            reason = "the disk is full" if disk_is_full(error) else " ".join(str(error).split())[:120]
            raise UserError(
                f"checkpoint {path} could not be saved ({reason}): free space and run the same command;"
                " earlier checkpoints are whole"
            ) from error

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = None) -> dict[str, Any]:
        """Load tensors and plain values only; UserError for a damaged file or one that would run code."""
        return load_checkpoint(Path(path))


def load_checkpoint(path: Path) -> dict[str, Any]:
    """The contents of a checkpoint file.

    Raises:
        UserError: missing, truncated, or a pickle that would run code.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"checkpoint {path} not found: give a file under RUN/checkpoints") from error
    except pickle.UnpicklingError as error:
        raise UserError(
            f"checkpoint {path} was refused: it is damaged or would run code when loaded; use a checkpoint of `fit`"
        ) from error
    except (RuntimeError, EOFError, OSError) as error:
        raise UserError(
            f"checkpoint {path} is truncated or damaged: remove it, and `fit` resumes from the one before"
        ) from error


def load_model_weights(model: PrismForCausalLM, state: Mapping[str, torch.Tensor], path: Path) -> None:
    """Load the `model.` part of a module's weights; a tied head may be absent.

    Raises:
        UserError: names or shapes differ.
    """
    weights = {name.removeprefix("model."): value for name, value in state.items() if name.startswith("model.")}
    expected = model.state_dict()
    for name, source in model.tied_weights().items():
        weights.setdefault(name, weights.get(source, torch.empty(0)))
    wrong = [
        f"{name}: {tuple(weights[name].shape) if name in weights else 'absent'} there, {tuple(value.shape)} here"
        for name, value in expected.items()
        if name not in weights or weights[name].shape != value.shape
    ]
    wrong += [f"{name}: unknown here" for name in weights if name not in expected]
    if wrong:
        raise UserError(
            f"{path} is of another model ({'; '.join(wrong[:3])}; {len(wrong)} in all): give its own recipe"
        )
    model.load_state_dict(weights)


class Checkpoints(ModelCheckpoint):
    """Keeps the newest few checkpoints, also over restarts, and saves one of the very last step."""

    def __init__(self, folder: Path, interval: int, kept: int) -> None:
        super().__init__(
            dirpath=folder,
            filename="step-{step:08d}",
            auto_insert_metric_name=False,
            every_n_train_steps=interval,
            save_on_train_epoch_end=False,
            save_top_k=-1,
        )
        self.kept = kept

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The checkpoint that a run resumes from is not saved again.

        Lightning has forgotten it by then, and would after the first of several micro-batches write over it, in the
        middle of a step.
        """
        super().on_train_start(trainer, pl_module)
        self._last_global_step_saved = trainer.global_step

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        super()._save_checkpoint(trainer, filepath)
        if trainer.is_global_zero:
            for old in sorted(Path(filepath).parent.glob("step-*.ckpt"))[: -self.kept]:
                shutil.rmtree(old) if old.is_dir() else old.unlink()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the last step, where the interval did not fall on it."""
        if self._last_global_step_saved != trainer.global_step:
            self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))
