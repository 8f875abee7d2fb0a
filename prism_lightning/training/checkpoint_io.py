"""Lightning's reading and writing of checkpoint files: atomic, and without running code in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO

from prism_lightning.common.errors import UserError, disk_is_full
from prism_lightning.common.files import partial_file
from prism_lightning.run.checkpoints import load_checkpoint


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a file beside the target and renames it, so that a kill or a full disk damages no checkpoint."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Save a checkpoint.

        Raises:
            UserError: the disk is full or cannot be written.
        """
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with partial_file(path) as partial, partial.open("wb") as file:
                torch.save(checkpoint, file)
        except (OSError, RuntimeError) as error:  # torch wraps a failing write in a RuntimeError
            reason = "the disk is full" if disk_is_full(error) else " ".join(str(error).split())[:120]
            raise UserError(
                f"checkpoint {path} could not be saved ({reason}): free space and run the same command"
                " again; earlier checkpoints are complete"
            ) from error

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = None) -> dict[str, Any]:
        """Return a checkpoint's tensors and plain values.

        Raises:
            UserError: a damaged file, or one that would run code.
        """
        return load_checkpoint(Path(path))
