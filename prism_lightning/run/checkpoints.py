"""Reading checkpoints without running code in them, and comparing them with their checksums."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from prism_lightning.common.errors import UserError
from prism_lightning.models import PrismForCausalLM
from prism_lightning.run.model_folder import check_finite


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Return the contents of a checkpoint file, tensors on the CPU.

    Raises:
        UserError: a file that is missing, truncated or damaged, or a pickle that would run code.
    """
    if path.is_file():
        check_archive(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(content, dict) or "state_dict" not in content:
            raise UserError(f"{path} is no checkpoint of a training run: give a file under RUN/checkpoints")
        return content
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


def check_archive(path: Path) -> None:
    """Compare every record of a `torch.save` file with its checksum, which torch writes but does not compare.

    Files that are no zip archives have no checksums; `torch.load` reads or refuses them.

    Raises:
        UserError: a record differs.
    """
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, OSError) as error:
        damaged = str(error)
    if damaged:
        raise UserError(f"checkpoint {path} is damaged ({damaged}): remove it, and `fit` resumes from the one before")


def open_deepspeed(folder: Path) -> None:
    """Check every file of a DeepSpeed checkpoint and let weights-only loading read it; raises as `check_archive`."""
    for path in sorted(folder.rglob("*.pt")):
        check_archive(path)
    trust_deepspeed_types()


def load_model_weights(model: PrismForCausalLM, state: Mapping[str, torch.Tensor], path: Path) -> None:
    """Load the weights of a checkpoint whose names start with `model.`.

    Args:
        model: gets the weights.
        state: the weights of a Lightning module; a tied head may be absent.
        path: of the checkpoint, for error messages.

    Raises:
        UserError: names or shapes differ, or values are not finite.
    """
    weights = {name.removeprefix("model."): value for name, value in state.items() if name.startswith("model.")}
    expected = {name: value.shape for name, value in model.state_dict().items()}
    for name, source in model.tied_weights().items():
        weights.setdefault(name, weights.get(source, torch.empty(0)))
    differences = [
        f"{name}: {tuple(weights[name].shape) if name in weights else 'absent'} in the file, expected {tuple(shape)}"
        for name, shape in expected.items()
        if name not in weights or weights[name].shape != shape
    ]
    differences += [f"{name}: not in this model" for name in weights if name not in expected]
    if differences:
        raise UserError(
            f"{path} is of another model ({'; '.join(differences[:3])}; {len(differences)} in all): give the recipe"
            " that it was trained with"
        )
    check_finite(weights, path)
    model.load_state_dict(weights)


def trust_deepspeed_types() -> None:
    """Let weights-only loading construct the few plain classes in DeepSpeed's checkpoints, and no others."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    torch.serialization.add_safe_globals([LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address])
