"""The corpus of a recipe: where its text comes from, how it is prepared, and how it is cut into blocks."""

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
        path: Local files, folders or globs; they take precedence over `dataset`. Every row of a JSON, JSON Lines, CSV,
            TSV, Parquet or Arrow file is a document, as is every text file; .gz and .zst files are unpacked.
        dataset: Name of a Hugging Face data set, which is read as a stream.
        dataset_config: Configuration of the data set, where it has several.
        dataset_revision: Commit or tag of the data set; pin it for runs that must be repeatable.
        train_split: Split of the data set to train on.
        validation_split: Split of the data set to validate on; without one, `validation_fraction` applies.
        validation_path: Local files, folders or globs to validate on; without them, `validation_fraction` applies.
        validation_fraction: Share of documents held out for validation where no validation text is given; if there are
            too few documents, the end of the text is held out.
        text_column: Column that holds the text of a row; a dotted path, such as text.content, names a field inside it.
        chat_template: Jinja template, or a file with one, that turns a row's list of messages, each with role and
            content, into text; by default "role: content", with a blank line between messages.
        tokenizer: Folder, tokenizer.json or hub name; without one, a byte-level BPE is trained on the corpus.
        vocab_size: Number of tokens of a tokenizer that is trained on the corpus.
        max_tokens: Approximate number of training tokens after which preparation stops.
        block_size: Number of tokens in a block (T), at most the model's context length.
        cache_dir: Folder for prepared data, with a subfolder for each fingerprint of the inputs.
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
        """Return a line for each setting whose value cannot be used."""
        problems = [
            f"data.{name} is {getattr(self, name)}: give a positive number"
            for name in ("block_size", "vocab_size")
            if getattr(self, name) < 1
        ]
        if not 0 < self.validation_fraction < 1:
            problems.append(f"data.validation_fraction is {self.validation_fraction}: give a share between 0 and 1")
        return problems

    def open(self) -> None:
        """Open both splits as `train` and `validation`, after preparing them if that has not been done.

        Raises:
            UserError: as `prepare`, or a split has less than one block.
        """
        folder = self.prepare()
        self.train = TokenStore(folder, "train", self.block_size)
        self.validation = TokenStore(folder, "validation", self.block_size)
        for store in (self.train, self.validation):
            if len(store) == 0:
                advice = "give more text" if store is self.train else "give --data.validation_path, more text,"
                raise UserError(
                    f"the {store.split} split has {store.counts['tokens']} tokens, too few for one block of"
                    f" {self.block_size}: {advice} or lower data.block_size"
                )

    def prepare(self) -> Path:
        """Return the prepared folder; the sources are read and hashed in the first call only."""
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
