"""One DataModule for every model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, Subset

from prism_lightning.common.stops import ignore_stops
from prism_lightning.data.order import TrainingOrder
from prism_lightning.data.prepare import Preparation, prepare
from prism_lightning.data.sources import (
    Source,
    hub_dataset,
    local_files,
    standard_library,
)
from prism_lightning.data.store import TokenStore
from prism_lightning.errors import UserError


class TrainingLoader(DataLoader):
    """Batches of one rank in training order; its state is the global position alone, the same on every rank."""

    batch_sampler: TrainingOrder  # type: ignore[assignment]

    def __init__(self, store: TokenStore, order: TrainingOrder, num_workers: int) -> None:
        super().__init__(store, batch_sampler=order, num_workers=num_workers, worker_init_fn=ignore_stops)  # type: ignore[arg-type]
        self.position = 0

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:  # type: ignore[override]
        for batch in super().__iter__():
            self.position += self.batch_sampler.blocks_per_batch
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Blocks handed out so far over all ranks: what resumes at any world size."""
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue behind the blocks already handed out."""
        self.position = self.batch_sampler.start = state["position"]


@dataclass(eq=False)
class TextData(LightningDataModule):
    """Documents packed into blocks of tokens. Without `path` and `dataset`: the running Python's standard library.

    Args:
        path: local files, folders or globs; wins over `dataset`. JSON, JSON Lines, CSV, TSV, Parquet and Arrow files
            give a document per row, text files one each; .gz and .zst are unpacked.
        dataset: name of a Hugging Face dataset, read as a stream.
        dataset_config: its configuration, where it has several.
        dataset_revision: its commit or tag; pin it for runs that must be repeatable.
        train_split: its split to train on.
        validation_split: its split to validate on; without one, documents are held out by `validation_fraction`.
        validation_path: local files to validate on; without them, documents are held out by `validation_fraction`.
        validation_fraction: share of documents held out where there is no validation source of its own; of too few
            documents, the end of the text is held out.
        text_column: the column of rows that holds the text; a dotted path, as text.content, names a field inside one.
        chat_template: Jinja template, or a file of it, that turns a row's list of messages, each with role and content,
            into text; by default "role: content", with a blank line between messages.
        tokenizer: folder, tokenizer.json or hub name; without one, a byte-level BPE is trained on the corpus.
        vocab_size: tokens of the tokenizer that is trained.
        max_tokens: stop preparing after about this many training tokens.
        block_size: T, tokens in a block; at most the model's context.
        batch_size: blocks per optimiser step over all devices; devices and accumulation share them out.
        micro_batch_size: blocks in one forward pass of one device, at most.
        validation_blocks: at most this many blocks in one validation, spread evenly over the split.
        seed: decides the order of blocks; which documents are held out is the same for all seeds.
        num_workers: loader processes; 0 reads in the training process, fast enough for local disks.
        cache_dir: where prepared data are kept, one folder for each fingerprint of the inputs.
    """

    path: str | list[str] | None = None
    dataset: str | None = None
    dataset_config: str | None = None
    dataset_revision: str | None = None
    train_split: str = "train"
    validation_split: str | None = None
    validation_path: str | list[str] | None = None
    validation_fraction: float = 0.05
    text_column: str = "text"
    chat_template: str | None = None
    tokenizer: str | None = None
    vocab_size: int = 4096
    max_tokens: int | None = None
    block_size: int = 256
    batch_size: int = 8
    micro_batch_size: int = 8
    validation_blocks: int | None = None
    seed: int = 0
    num_workers: int = 0
    cache_dir: str = "data_cache"

    def __post_init__(self) -> None:
        super().__init__()
        self._folder: Path | None = None
        problems = [
            f"data.{name} is {getattr(self, name)}: give a positive number"
            for name in ("block_size", "batch_size", "micro_batch_size", "vocab_size")
            if getattr(self, name) < 1
        ]
        if self.num_workers < 0:
            problems.append(f"data.num_workers is {self.num_workers}: give 0 or more")
        if self.validation_blocks is not None and self.validation_blocks < 1:
            problems.append(f"data.validation_blocks is {self.validation_blocks}: give a positive number, or null")
        if not 0 < self.validation_fraction < 1:
            problems.append(f"data.validation_fraction is {self.validation_fraction}: give a share between 0 and 1")
        if problems:
            raise UserError(problems)

    def prepare_data(self) -> None:
        """Prepare the token store, or find it in the cache."""
        self.prepare()

    def setup(self, stage: str | None = None) -> None:
        """Open both splits.

        Raises:
            UserError: a split without one whole block.
        """
        folder = self.prepare()
        self.train = TokenStore(folder, "train", self.block_size)
        self.validation = TokenStore(folder, "validation", self.block_size)
        for store in (self.train, self.validation):
            if len(store) == 0:
                more = "give more text" if store is self.train else "give --data.validation_path, more text,"
                raise UserError(
                    f"the {store.split} split has {store.counts['tokens']} tokens, too few for one block of"
                    f" {self.block_size}: {more} or lower data.block_size"
                )

    def prepare(self) -> Path:
        """The prepared folder; the sources are read and hashed once."""
        self._folder = self._folder or self._prepared()
        return self._folder

    def _prepared(self) -> Path:
        train, validation = self._sources()
        return prepare(
            Preparation(train, validation, self.validation_fraction, self.tokenizer, self.vocab_size, self.max_tokens),
            Path(self.cache_dir),
        )

    def _sources(self) -> tuple[Source, Source | None]:
        column, chat = self.text_column, self.chat_template
        validation = None
        if self.validation_path:
            validation = local_files(self.validation_path, column, "data.validation_path", chat)
        if self.path:
            return local_files(self.path, column, chat_template=chat), validation
        if self.dataset:
            splits = [
                hub_dataset(self.dataset, self.dataset_config, split, self.dataset_revision, column, chat)
                for split in (self.train_split, self.validation_split)
                if split
            ]
            return splits[0], validation or (splits[1] if len(splits) > 1 else None)
        return standard_library(), validation

    @property
    def accumulation(self) -> int:
        """Forward passes per optimiser step on each device."""
        return self.batch_size // (self._micro_batch_size * self._world_size)

    @property
    def _world_size(self) -> int:
        return self.trainer.world_size if self.trainer else 1

    @property
    def _micro_batch_size(self) -> int:
        """Blocks in one forward pass: never more than a device's share of a step.

        Raises:
            UserError: a step that cannot be shared out evenly.
        """
        size = min(self.micro_batch_size, max(1, self.batch_size // self._world_size))
        if self.batch_size % (size * self._world_size):
            raise UserError(
                f"data.batch_size {self.batch_size} is no multiple of {self._world_size} devices x"
                f" data.micro_batch_size {size}: change one of them"
            )
        return size

    def train_dataloader(self) -> TrainingLoader:
        """Training blocks in an order that depends on the seed and the position alone."""
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
        """Validation blocks in order, each on one rank."""
        return self.validation_loader(self.trainer.global_rank if self.trainer else 0, self._world_size)

    def validation_loader(self, rank: int = 0, world_size: int = 1) -> DataLoader:
        """One rank's share of the validation blocks; by default all of them.

        Raises:
            UserError: fewer blocks than ranks.
        """
        count = min(self.validation_blocks or len(self.validation), len(self.validation))
        if count < world_size:
            raise UserError(
                f"{count} validation blocks are fewer than {world_size} devices: raise data.validation_blocks or"
                " data.validation_fraction"
            )
        chosen = np.linspace(0, len(self.validation) - 1, count).astype(int)
        mine = Subset(self.validation, chosen[rank::world_size].tolist())
        return DataLoader(
            mine, batch_size=self.micro_batch_size, num_workers=self.num_workers, worker_init_fn=ignore_stops
        )

    test_dataloader = val_dataloader
    predict_dataloader = val_dataloader

    def state_dict(self) -> dict[str, Any]:
        """Identity of the data, so that a resumed run notices when they changed."""
        return {"fingerprint": self.train.manifest["fingerprint"]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Refuse to continue on other data.

        Raises:
            UserError: the fingerprint differs.
        """
        fingerprint = self.train.manifest["fingerprint"]
        if state["fingerprint"] != fingerprint:
            raise UserError(
                f"the checkpoint was trained on data {state['fingerprint']}, not {fingerprint}:"
                " restore the data or choose another --run.dir"
            )
