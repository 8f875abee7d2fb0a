"""The DataModule of every model: blocks of a corpus in training order, for any number of devices."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, Subset

from prism_lightning.common.errors import UserError
from prism_lightning.common.stops import ignore_stops
from prism_lightning.data.corpus import Corpus
from prism_lightning.data.order import TrainingOrder, block_at
from prism_lightning.data.store import TokenStore


class TrainingLoader(DataLoader):
    """Batches of one rank in training order. Its state is the global position alone, the same on every rank."""

    batch_sampler: TrainingOrder  # type: ignore[assignment]

    def __init__(self, store: TokenStore, order: TrainingOrder, num_workers: int) -> None:
        super().__init__(store, batch_sampler=order, num_workers=num_workers, worker_init_fn=ignore_stops)  # type: ignore[arg-type]
        self.position = 0

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:  # type: ignore[override]
        for batch in super().__iter__():
            self.position += self.batch_sampler.blocks_per_batch
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Return the number of blocks read so far over all ranks, which suffices to resume at any world size."""
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue after the blocks already read."""
        self.position = self.batch_sampler.start = state["position"]


@dataclass(eq=False)
class TextData(Corpus, LightningDataModule):
    """Documents packed into blocks of tokens, in batches; `Corpus` has the settings of the text itself.

    Without `path` and `dataset`, the documents are those of the running Python's standard library.

    Args:
        batch_size: number of blocks per optimiser step over all devices.
        micro_batch_size: largest number of blocks in one forward pass of one device.
        validation_blocks: largest number of blocks in one validation, spread evenly over the split; null takes all.
        seed: seed of the order of training blocks; the documents held out are the same for all seeds.
        num_workers: number of loader processes; 0 reads in the training process, which is fast enough for local disks.
    """

    batch_size: int = 8
    micro_batch_size: int = 8
    validation_blocks: int | None = None
    seed: int = 0
    num_workers: int = 0

    def __post_init__(self) -> None:
        LightningDataModule.__init__(self)
        super().__post_init__()

    def problems(self) -> list[str]:
        """Return one line for each setting whose value cannot be used."""
        problems = super().problems() + [
            f"data.{name} is {getattr(self, name)}: give a positive number"
            for name in ("batch_size", "micro_batch_size")
            if getattr(self, name) < 1
        ]
        if self.num_workers < 0:
            problems.append(f"data.num_workers is {self.num_workers}: give 0 or more")
        if self.validation_blocks is not None and self.validation_blocks < 1:
            problems.append(f"data.validation_blocks is {self.validation_blocks}: give a positive number, or null")
        return problems

    def prepare_data(self) -> None:
        """Prepare the token store, unless it is in the cache."""
        self.prepare()

    def setup(self, stage: str | None = None) -> None:
        """Open both splits; raises as `Corpus.open`."""
        self.open()

    @property
    def accumulation(self) -> int:
        """Number of forward passes per optimiser step on each device."""
        return self.batch_size // (self._micro_batch_size * self._world_size)

    def targets_in_step(self, step: int) -> int:
        """Return the number of targets in an optimiser step, over all micro-batches and ranks."""
        positions = step * self.batch_size + np.arange(self.batch_size)
        return int(self.train.targets_in(block_at(positions, len(self.train), self.seed)).sum())

    @property
    def _world_size(self) -> int:
        return self.trainer.world_size if self.trainer else 1

    @property
    def _micro_batch_size(self) -> int:
        """Number of blocks in one forward pass: at most a device's share of a step.

        Raises:
            UserError: a step cannot be divided evenly.
        """
        size = min(self.micro_batch_size, max(1, self.batch_size // self._world_size))
        if self.batch_size % (size * self._world_size):
            raise UserError(
                f"data.batch_size {self.batch_size} is no multiple of {self._world_size} devices x"
                f" data.micro_batch_size {size}: change one of them"
            )
        return size

    def train_dataloader(self) -> TrainingLoader:
        """Return the loader of training blocks, whose order depends on the seed and the position alone."""
        order = TrainingOrder(
            num_blocks=len(self.train),
            seed=self.seed,
            batch_size=self.batch_size,
            micro_batch_size=self._micro_batch_size,
            rank=self.trainer.global_rank if self.trainer else 0,
            world_size=self._world_size,
            steps=self.trainer.max_steps if self.trainer else len(self.train) // self.batch_size,
        )
        return TrainingLoader(self.train, order, self.num_workers)

    def val_dataloader(self) -> DataLoader:
        """Return the loader of this rank's validation blocks; each block is on one rank."""
        return self.validation_loader(self.trainer.global_rank if self.trainer else 0, self._world_size)

    def validation_loader(self, rank: int = 0, world_size: int = 1) -> DataLoader:
        """Return the loader of one rank's share of the validation blocks; by default of all of them.

        Raises:
            UserError: fewer blocks than ranks.
        """
        count = min(self.validation_blocks or len(self.validation), len(self.validation))
        if count < world_size:
            raise UserError(
                f"{count} validation blocks are fewer than {world_size} devices: raise data.validation_blocks or"
                " data.validation_fraction"
            )
        block_ids = np.linspace(0, len(self.validation) - 1, count).astype(int)
        blocks = Subset(self.validation, block_ids[rank::world_size].tolist())
        return DataLoader(
            blocks, batch_size=self.micro_batch_size, num_workers=self.num_workers, worker_init_fn=ignore_stops
        )

    test_dataloader = val_dataloader
    predict_dataloader = val_dataloader

    def state_dict(self) -> dict[str, Any]:
        """Return the data's fingerprint, by which a resumed run notices other data."""
        return {"fingerprint": self.train.manifest["fingerprint"]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Check that a checkpoint was trained on these data.

        Raises:
            UserError: the fingerprint differs.
        """
        fingerprint = self.train.manifest["fingerprint"]
        if state["fingerprint"] != fingerprint:
            raise UserError(
                f"the checkpoint was trained on data {state['fingerprint']}, not {fingerprint}:"
                " restore the data or choose another --run.dir"
            )
