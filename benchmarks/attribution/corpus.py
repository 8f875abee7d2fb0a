"""Training sequences and held-out queries of a benchmark run, cut from documents once and kept.

Shapes: S training sequences, Q queries, L = T + 1 tokens.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from benchmarks.attribution.config import CorpusSettings, Settings
from prism_lightning.common.errors import UserError
from prism_lightning.common.files import partial_file, write_json
from prism_lightning.data.sources import hub_dataset, local_files, standard_library
from prism_lightning.data.store import TokenStore
from prism_lightning.data.tokenizer import encode_batch, open_tokenizer, train_tokenizer
from prism_lightning.lightning_modules.text_data import TextData
from prism_lightning.run.model_tokenizer import model_tokenizer


@dataclass
class Corpus:
    """Sequences of L tokens for training, for the comparison of methods, and for tuning them."""

    train_SL: Tensor
    queries_QL: Tensor
    tuning_QL: Tensor
    tokenizer: PreTrainedTokenizerFast


def open_corpus(settings: Settings) -> Corpus:
    """Return the run's corpus; the first call makes it.

    Raises:
        UserError: too few documents, or a folder made with other settings.
    """
    folder = settings.folder
    folder.mkdir(parents=True, exist_ok=True)
    path, facts = folder / "corpus.safetensors", folder / "settings.json"
    identity = json.loads(json.dumps(settings.identity()))
    if facts.is_file() and json.loads(facts.read_text()) != identity:
        raise UserError(f"{folder} holds a run with other settings: give another out=FOLDER, or remove it")
    if not path.is_file():
        tokenizer, sequences = _sequences(settings)
        tokenizer.save_pretrained(folder / "tokenizer")
        with partial_file(path) as partial:
            save_file(sequences, partial)
    if not facts.is_file():  # processes that train at once read it
        write_json(facts, identity)
    tokenizer = open_tokenizer(folder / "tokenizer")
    tensors = load_file(path)
    return Corpus(tensors["train"].long(), tensors["queries"].long(), tensors["tuning"].long(), tokenizer)


def _sequences(run: Settings) -> tuple[PreTrainedTokenizerFast, dict[str, Tensor]]:
    settings = run.corpus
    texts = list(_texts(settings))
    random.Random(settings.seed).shuffle(texts)
    tokenizer = _tokenizer(run, texts)
    counts = {"queries": settings.queries, "tuning": settings.tuning, "train": max(settings.sizes)}
    windows = _windows(tokenizer, texts, settings)
    tensors: dict[str, Tensor] = {}
    for name, count in counts.items():
        rows: list[list[int]] = []
        while len(rows) < count:  # each document belongs to one part
            document = next(windows, None)
            if document is None:
                raise UserError(
                    f"the corpus has too few sequences of {settings.tokens + 1} tokens for {counts}:"
                    " lower corpus.sizes or raise corpus.per_document"
                )
            rows += document[: settings.per_document]
        tensors[name] = torch.tensor(rows[:count], dtype=torch.int32)
    return tokenizer, tensors


def _tokenizer(run: Settings, texts: list[str]) -> PreTrainedTokenizerFast:
    if "pretrained" in run.model:
        return model_tokenizer(run.model["pretrained"], run.model.get("gguf_file"))
    return train_tokenizer(texts, run.corpus.vocab_size)


def _texts(settings: CorpusSettings) -> Iterator[str]:
    if settings.path:
        source = local_files(settings.path, "text")
    elif settings.dataset:
        source = hub_dataset(settings.dataset, None, "train", None, "text")
    else:
        source = standard_library()
    return (document.text for document in islice(source.documents(), settings.documents))


def _windows(
    tokenizer: PreTrainedTokenizerFast, texts: list[str], settings: CorpusSettings
) -> Iterator[list[list[int]]]:
    """Windows of each document that is long enough, without end-of-text tokens."""
    length = settings.tokens + 1
    for start in range(0, len(texts), 64):
        for ids in (encoded.tolist() for encoded in encode_batch(tokenizer, texts[start : start + 64])):
            windows = [ids[first : first + length] for first in range(0, len(ids) - length + 1, length)]
            if windows:
                yield windows


class SequenceStore(TokenStore):
    """A token store over sequences: block i is sequence i, and token i T + t is its target t."""

    def __init__(self, ids_SL: Tensor, folder: Path, vocab_size: int) -> None:
        self.ids_SL, self.folder, self.block_size = ids_SL, folder, ids_SL.shape[1] - 1
        self.counts = {"tokens": ids_SL.numel(), "documents": len(ids_SL)}
        self.manifest = {"fingerprint": f"{len(ids_SL)} sequences", "tokenizer_size": vocab_size}

    def __len__(self) -> int:
        return len(self.ids_SL)

    def __getitems__(self, blocks: list[int]) -> list[dict[str, Tensor]]:
        rows = self.ids_SL[blocks]
        return [
            {"input_ids": row[:-1], "targets": row[1:], "block_ids": torch.tensor(block)}
            for row, block in zip(rows, blocks, strict=True)
        ]


class SequenceData(TextData):
    """A data module over sequences in memory."""

    def __init__(self, store: SequenceStore, batch_size: int, seed: int) -> None:
        super().__init__(block_size=store.block_size, batch_size=batch_size, micro_batch_size=batch_size, seed=seed)
        self.train = store

    def prepare_data(self) -> None:
        """Nothing to prepare."""

    def setup(self, stage: str | None = None) -> None:
        """Nothing to open."""
