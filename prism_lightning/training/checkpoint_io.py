"""How Lightning writes and reads checkpoint files: whole or not at all, and never running code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO

from prism_lightning.common.errors import UserError, disk_is_full
from prism_lightning.common.files import partial_file
from prism_lightning.run.checkpoints import load_checkpoint


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the target and renames, so that neither a kill nor a full disk harms an earlier checkpoint."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Save; UserError when the disk does not take it."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with partial_file(path) as partial, partial.open("wb") as file:
                torch.save(checkpoint, file)
        except (OSError, RuntimeError) as error:  # torch wraps a failing write in a RuntimeError
            reason = "the disk is full" if disk_is_full(error) else " ".join(str(error).split())[:120]
            raise UserError(
                f"checkpoint {path} could not be saved ({reason}): free space and run the same command;"
                " earlier checkpoints are whole"
            ) from error

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = None) -> dict[str, Any]:
        """Load tensors and plain values only; UserError for a damaged file or one that would run code."""
        return load_checkpoint(Path(path))
