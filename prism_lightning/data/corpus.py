"""The corpus of a recipe: where its text comes from, how it is prepared, and how it is cut into blocks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from prism_lightning.common.errors import UserError
from prism_lightning.data.preparation import Preparation, prepare
from prism_lightning.data.sources import (
    CompletionRows,
    MessageRows,
    Rows,
    Source,
    TextRows,
    hub_dataset,
    local_files,
    standard_library,
)
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
        prompt_column: Column with the prompts of `completion_column`, which the model reads but is not trained on.
        completion_column: Column with completions: a row is a prompt followed by its completion, of which alone the
            tokens are targets.
        messages_column: Column with chats, lists of messages with role and content. The tokenizer's chat template
            renders them, and the assistant's turns alone are targets.
        chat_template: Jinja template, or a file with one, that renders the lists of messages in `messages_column`, in
            place of the tokenizer's own; or in `text_column`, where the default is "role: content", with a blank line
            between messages.
        isolate_documents: Whether attention stays inside a document where several share a block (default true for
            completions and chats, false for plain text).
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
    prompt_column: str | None = None
    completion_column: str | None = None
    messages_column: str | None = None
    chat_template: str | None = None
    isolate_documents: bool | None = None
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
        return problems + self._column_problems()

    def _column_problems(self) -> list[str]:
        names = ("prompt_column", "completion_column", "messages_column")
        prompt, completion, messages = names_set = [f"data.{n}" if getattr(self, n) else None for n in names]
        problems = []
        if bool(prompt) != bool(completion):
            missing = names[1] if prompt else names[0]
            problems.append(f"{prompt or completion} needs data.{missing}: give both, or data.text_column alone")
        if messages and (prompt or completion):
            problems.append(f"{messages} and {prompt or completion} exclude each other: give one of them")
        if any(names_set) and not (self.path or self.dataset):
            problems.append(f"{next(filter(None, names_set))} needs rows: give data.path or data.dataset")
        return problems

    @property
    def masked(self) -> bool:
        """Whether the data are prompts with completions, or chats, whose targets are partly masked."""
        return bool(self.completion_column or self.messages_column)

    @property
    def isolated(self) -> bool:
        """Whether attention stays inside a document where several share a block."""
        return self.masked if self.isolate_documents is None else self.isolate_documents

    def open(self) -> None:
        """Open both splits as `train` and `validation`, after preparing them if that has not been done.

        Raises:
            UserError: as `prepare`, or a split has less than one block.
        """
        folder = self.prepare()
        self.train = TokenStore(folder, "train", self.block_size, self.isolated)
        self.validation = TokenStore(folder, "validation", self.block_size, self.isolated)
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
        rows = self._rows()
        train, validation = self._sources(rows)
        fraction, template = self.validation_fraction, rows.chat_template if isinstance(rows, MessageRows) else None
        return prepare(
            Preparation(train, validation, fraction, self.tokenizer, self.vocab_size, self.max_tokens, template),
            Path(self.cache_dir),
        )

    def _rows(self) -> Rows:
        if self.messages_column:
            return MessageRows(self.messages_column, self.chat_template)
        if self.prompt_column and self.completion_column:
            return CompletionRows(self.prompt_column, self.completion_column)
        return TextRows(self.text_column, self.chat_template)

    def _sources(self, rows: Rows) -> tuple[Source, Source | None]:
        validation = None
        if self.validation_path:
            validation = local_files(self.validation_path, rows, "data.validation_path")
        if self.path:
            return local_files(self.path, rows), validation
        if self.dataset:
            splits = [
                hub_dataset(self.dataset, self.dataset_config, split, self.dataset_revision, rows)
                for split in (self.train_split, self.validation_split)
                if split
            ]
            return splits[0], validation or (splits[1] if len(splits) > 1 else None)
        return standard_library(), validation
