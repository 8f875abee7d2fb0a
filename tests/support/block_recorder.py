"""A callback that writes which blocks every optimiser step saw, for tests of the order."""

import json
import os
from pathlib import Path

from lightning.pytorch import Callback


class BlockRecorder(Callback):
    """One line per micro-batch and rank, under the folder that BLOCK_RECORDS names."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        path = Path(os.environ["BLOCK_RECORDS"]) / f"blocks_rank{trainer.global_rank}.jsonl"
        with path.open("a") as file:
            file.write(json.dumps({"step": trainer.global_step, "blocks": batch["block_ids"].tolist()}) + "\n")
