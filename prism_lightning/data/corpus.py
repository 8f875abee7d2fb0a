"""A corpus as a recipe names it: where its text comes from, how it is prepared and cut into blocks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from prism_lightning.common.errors import UserError
from prism_lightning.data.preparation import Preparation, prepare
from prism_lightning.data.sources import Source, hub_dataset, local_files, standard_library
from prism_lightning.data.store import TokenStore


@dataclass(eq=False)
class Corpus:
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
    cache_dir: str = "data_cache"

    def __post_init__(self) -> None:
        self._folder: Path | None = None
        if problems := self.problems():
            raise UserError(problems)

    def problems(self) -> list[str]:
        """One line for each setting whose value cannot be used."""
        problems = [
            f"data.{name} is {getattr(self, name)}: give a positive number"
            for name in ("block_size", "vocab_size")
            if getattr(self, name) < 1
        ]
        if not 0 < self.validation_fraction < 1:
            problems.append(f"data.validation_fraction is {self.validation_fraction}: give a share between 0 and 1")
        return problems

    def open(self) -> None:
        """Open both splits as `train` and `validation`; prepare them where that has not been done.

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
