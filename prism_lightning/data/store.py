"""The packed token store: a memory-mapped file of tokens for each split, cut into blocks that know their documents."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from transformers import PreTrainedTokenizerFast

from prism_lightning.common.targets import IGNORED_TARGET
from prism_lightning.data.integrity import TARGETS, read_prepared
from prism_lightning.data.token_text import token_text
from prism_lightning.data.tokenizer import open_tokenizer

COUNT_CHUNK = 2**22  # tokens whose flags are counted at a time
DOCUMENT_SCHEMA = pa.schema([("name", pa.string()), ("row", pa.int64()), ("start", pa.int64()), ("bytes", pa.int64())])


@dataclass(frozen=True)
class Location:
    """The place of a token: number, source name and row of its document, and its offset in tokens from the start."""

    document: int
    name: str
    row: int
    offset: int


class StoreWriter:
    """Writes the tokenised documents of one split into a new folder.

    Args:
        folder: of the split.
        dtype: of the tokens.
        masked: whether documents have masked targets; a file more then says which tokens are targets.
    """

    def __init__(self, folder: Path, dtype: str, masked: bool = False) -> None:
        folder.mkdir(parents=True)
        self.dtype, self.tokens, self.documents, self.bytes, self.max_id = dtype, 0, 0, 0, -1
        self.targets = 0
        self._token_file = (folder / "tokens.bin").open("wb")
        self._target_file = (folder / TARGETS).open("wb") if masked else None
        self._table = pa.OSFile(str(folder / "documents.arrow"), "wb")
        self._document_writer = pa.ipc.new_file(self._table, DOCUMENT_SCHEMA)

    def append(
        self,
        names: list[str],
        rows: list[int],
        sizes: list[int],
        ids: list[np.ndarray],
        targets: list[np.ndarray] | None = None,
    ) -> None:
        """Append documents.

        Args:
            names, rows: source and row of each document.
            sizes: UTF-8 length in bytes of each text that is to be predicted.
            ids: token ids of each document.
            targets: whether each token is a target, where the writer is `masked`.
        """
        starts = self.tokens + np.cumsum([0] + [len(document_ids) for document_ids in ids])
        all_ids = np.concatenate(ids)
        self._token_file.write(all_ids.astype(self.dtype))  # type: ignore[arg-type]
        if self._target_file is not None:
            assert targets is not None
            flags = np.concatenate(targets).astype(np.uint8)
            self._target_file.write(flags)  # type: ignore[arg-type]
            self.targets += int(flags.sum())
        self._document_writer.write_batch(pa.record_batch([names, rows, starts[:-1], sizes], schema=DOCUMENT_SCHEMA))
        self.tokens, self.documents, self.bytes = int(starts[-1]), self.documents + len(ids), self.bytes + sum(sizes)
        self.max_id = max(self.max_id, int(all_ids.max()))

    @property
    def counts(self) -> dict[str, int]:
        """Counts of what has been written: tokens, documents and bytes, the largest token id, and targets if masked."""
        counts = {"tokens": self.tokens, "documents": self.documents, "bytes": self.bytes, "max_id": self.max_id}
        return counts if self._target_file is None else counts | {"targets": self.targets}

    def close(self) -> None:
        """Complete and close the files."""
        for file in (self._document_writer, self._table, self._token_file, self._target_file):
            if file is not None:
                file.close()


class TokenStore(torch.utils.data.Dataset):
    """One split as blocks of T tokens. Block i predicts tokens i T + 1 to i T + T, so that each token is a target once.

    Args:
        folder: a prepared data folder.
        split: "train" or "validation".
        block_size: T.
        isolated: whether documents are to be independent inside a block: blocks then have positions that restart at
            every document, and the first token of a document is no target, since another document precedes it.

    Raises:
        DamagedDataError: a file is missing or has another size. `prepare` and `open_store` compare checksums.
        UserError: the folder cannot be read.
    """

    isolated = False

    def __init__(self, folder: Path, split: str, block_size: int, isolated: bool = False) -> None:
        self.folder, self.split, self.block_size, self.isolated = Path(folder), split, block_size, isolated
        self.manifest = read_prepared(self.folder, checksums=False)
        self.counts: dict[str, int] = self.manifest[split]

    @cached_property
    def tokens(self) -> np.ndarray:
        """All tokens of the split, memory-mapped."""
        return np.memmap(self.folder / self.split / "tokens.bin", dtype=self.manifest["dtype"], mode="r")

    @cached_property
    def target_flags(self) -> np.ndarray | None:
        """Whether each token of the split is a target, memory-mapped; None where all are."""
        if f"{self.split}/{TARGETS}" not in self.manifest["files"]:
            return None
        return np.memmap(self.folder / self.split / TARGETS, dtype=np.bool_, mode="r")

    @property
    def masked(self) -> bool:
        """Whether some tokens are no targets."""
        return self.isolated or "targets" in self.counts

    def are_targets(self, positions: np.ndarray) -> np.ndarray:
        """Return whether the tokens at some positions are targets, in the positions' shape."""
        flags = np.ones(positions.shape, bool) if self.target_flags is None else self.target_flags[positions]
        if self.isolated:
            flags = flags & (self.starts[self.documents_of(positions)] != positions)
        return flags

    def targets_in(self, blocks: np.ndarray | Sequence[int]) -> np.ndarray:
        """Return the number of targets in each of some blocks."""
        blocks = np.asarray(blocks, dtype=np.int64)
        if not self.masked:
            return np.full(len(blocks), self.block_size)
        counts = [
            self.are_targets(part[:, None] * self.block_size + np.arange(1, self.block_size + 1)).sum(1)
            for part in np.array_split(blocks, 1 + len(blocks) * self.block_size // COUNT_CHUNK)
        ]
        return np.concatenate(counts)

    @cached_property
    def documents(self) -> pa.Table:
        """A table with name, row, start and bytes of every document, memory-mapped."""
        return pa.ipc.open_file(pa.memory_map(str(self.folder / self.split / "documents.arrow"))).read_all()

    @cached_property
    def starts(self) -> np.ndarray:
        """Position of every document's first token."""
        # The column's own to_numpy imports pandas, which takes 0.3 s of an `attribute`.
        return np.concatenate([np.from_dlpack(chunk) for chunk in self.documents["start"].chunks])

    def documents_of(self, positions: np.ndarray | int) -> np.ndarray:
        """Return the numbers of the documents that contain the tokens at some positions."""
        return np.searchsorted(self.starts, positions, side="right") - 1

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The tokenizer that produced these tokens."""
        return open_tokenizer(self.folder / "tokenizer")

    @property
    def bytes_per_token(self) -> float:
        """Mean UTF-8 bytes per target, end-of-text tokens included; it converts nats per token into bits per byte."""
        return self.counts["bytes"] / self.counts.get("targets", self.counts["tokens"])

    def __len__(self) -> int:
        return max(0, (self.counts["tokens"] - 1) // self.block_size)

    def __getitem__(self, block: int) -> dict[str, torch.Tensor]:
        return self.__getitems__([block])[0]

    def __getitems__(self, blocks: list[int]) -> list[dict[str, torch.Tensor]]:
        """Return input_ids [T], targets [T] (each the next token) and block_ids of each block.

        Masked targets are IGNORED_TARGET. Where documents are isolated, position_ids [T] count from the start of the
        document or, where that lies before the block, of the block.
        """
        start = np.asarray(blocks, dtype=np.int64)[:, None] * self.block_size
        positions = start + np.arange(self.block_size + 1)
        window = torch.from_numpy(self.tokens[positions].astype(np.int64))
        items = [
            {"input_ids": row[:-1], "targets": row[1:], "block_ids": torch.tensor(block)}
            for row, block in zip(window, blocks, strict=True)
        ]
        if self.masked:
            for item, are_targets in zip(items, torch.from_numpy(self.are_targets(positions[:, 1:])), strict=True):
                item["targets"] = item["targets"].where(are_targets, IGNORED_TARGET)
        if self.isolated:
            offsets = positions - np.maximum(self.starts[self.documents_of(positions)], start)
            for item, position_ids in zip(items, torch.from_numpy(offsets[:, :-1]), strict=True):
                item["position_ids"] = position_ids
        return items

    def locate(self, position: int) -> Location:
        """Return the place of the token at a position of the split.

        Raises:
            IndexError: the position is outside the split.
        """
        if not 0 <= position < self.counts["tokens"]:
            raise IndexError(f"position {position} is outside the {self.counts['tokens']} tokens of {self.split}")
        document = int(self.documents_of(position))
        name, row = (self.documents[column][document].as_py() for column in ("name", "row"))
        return Location(document, name, row, position - int(self.starts[document]))

    def document_tokens(self, document: int) -> np.ndarray:
        """Return the tokens of one document, its end-of-text token included."""
        return self.tokens[self.span(document)]

    def span(self, document: int) -> slice:
        """Return the positions of a document's tokens."""
        end = self.starts[document + 1] if document + 1 < len(self.starts) else self.counts["tokens"]
        return slice(int(self.starts[document]), int(end))

    def texts(self, documents: Iterable[int] | None = None) -> list[str]:
        """Return the text of every document, or of the given ones by number, without special tokens."""
        numbers = range(len(self.documents)) if documents is None else documents
        ids = (self.document_tokens(number).tolist() for number in numbers)
        return [str(text) for text in self.tokenizer.batch_decode(list(ids), skip_special_tokens=True)]

    def sample_documents(self, count: int, seed: int = 0) -> list[int]:
        """Return the numbers of `count` random documents, or of all if there are fewer, in ascending order."""
        return sorted(np.random.default_rng(seed).permutation(len(self.starts))[:count].tolist())

    def sample(self, tokens: int, seed: int = 0) -> list[int]:
        """Return the numbers of random documents with at least so many tokens together, in ascending order.

        The last document drawn is the one that reaches the number, so that the excess is less than one document.
        """
        order = np.random.default_rng(seed).permutation(len(self.starts))
        lengths = np.diff(np.append(self.starts, self.counts["tokens"]))[order]
        return sorted(order[: 1 + np.searchsorted(np.cumsum(lengths), tokens)].tolist())

    def text_around(self, position: int, before: int = 20, after: int = 20) -> tuple[str, str, str]:
        """Return the texts before a token, of the token, and after it, from the same document.

        Parts of characters are shown as their bytes, see `token_text`.

        Args:
            position: of the token in the split.
            before, after: maximum number of tokens on each side.
        """
        location = self.locate(position)
        tokens, offset = self.document_tokens(location.document), location.offset
        ranges = (max(0, offset - before), offset), (offset, offset + 1), (offset + 1, offset + 1 + after)
        text_before, token, text_after = (token_text(self.tokenizer, tokens[start:end]) for start, end in ranges)
        return text_before, token, text_after
