"""Methods without a curvature: hidden-state cosine, BM25, random."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import numpy as np
import scipy.sparse
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from benchmarks.attribution.task import BATCH, Method, Queries, Task
from prism_lightning.common.files import map_file, write_file


class HiddenCosine(Method):
    """Cosine of mean final hidden states, centred on the corpus; a query's mean is over its targets."""

    @torch.no_grad()
    def fit(self) -> None:
        parts = [
            self.task.model.hidden_states(ids_BL[:, :-1]).mean(1).numpy() for ids_BL in self.task.train_SL.split(BATCH)
        ]
        write_file(self.folder / "means.safetensors", {"means": np.concatenate(parts).astype(np.float16)})

    def open(self) -> None:
        means_SD = torch.from_numpy(np.asarray(map_file(self.folder / "means.safetensors")["means"], dtype=np.float32))
        self.centre_D = means_SD.mean(0)
        self.means_SD = F.normalize(means_SD - self.centre_D, dim=-1)

    @torch.no_grad()
    def scores(self, queries: Queries) -> Tensor:
        z_QTD = self.task.model.hidden_states(queries.ids_QL[:, :-1])
        weights_QT1 = queries.weights_QT[..., None]
        mean_QD = (z_QTD * weights_QT1).sum(1) / weights_QT1.sum(1)
        return F.normalize(mean_QD - self.centre_D, dim=-1) @ self.means_SD.T


class Bm25(Method):
    """Okapi BM25 of whole words. A token query is its words up to the target and the target.

    Args:
        task, folder: see `Method`.
        tokenizer: turns sequences back into text.
        k1, b: saturation of repeated words, and normalisation by length.
    """

    def __init__(
        self, task: Task, folder: Path, tokenizer: PreTrainedTokenizerFast, k1: float = 1.2, b: float = 0.75
    ) -> None:
        super().__init__(task, folder)
        self.tokenizer, self.k1, self.b = tokenizer, k1, b

    def fit(self) -> None:
        counts = [words(text) for text in self.tokenizer.batch_decode(self.task.train_SL)]
        vocabulary = sorted({word for count in counts for word in count})
        matrix = bm25_matrix(counts, {word: n for n, word in enumerate(vocabulary)}, self.k1, self.b)
        scipy.sparse.save_npz(self.folder / "bm25.npz", matrix)
        (self.folder / "vocabulary.txt").write_text("\n".join(vocabulary))

    def open(self) -> None:
        self.matrix_SW = scipy.sparse.load_npz(self.folder / "bm25.npz").tocsc()
        vocabulary = (self.folder / "vocabulary.txt").read_text().split("\n")
        self.column = {word: number for number, word in enumerate(vocabulary)}

    def scores(self, queries: Queries) -> Tensor:
        last_Q = (queries.weights_QT > 0).int() * torch.arange(1, queries.weights_QT.shape[1] + 1)
        rows = [ids[: last + 1] for ids, last in zip(queries.ids_QL.tolist(), last_Q.amax(1).tolist(), strict=True)]
        scores = []
        for text in self.tokenizer.batch_decode(rows):
            frequencies = {self.column[word]: times for word, times in words(text).items() if word in self.column}
            scores.append(self.matrix_SW[:, list(frequencies)] @ np.array(list(frequencies.values()), dtype=np.float32))
        return torch.from_numpy(np.stack(scores))


def words(text: str) -> Counter[str]:
    """Return the words of a text and their counts."""
    return Counter(re.findall(r"\w+", text.lower()))


def bm25_matrix(counts: list[Counter[str]], column: dict[str, int], k1: float, b: float) -> scipy.sparse.csr_matrix:
    """Return the contribution [S, W] of each word of a query to the score of each document."""
    row, col, frequency = (
        np.array(values)
        for values in zip(
            *((n, column[word], times) for n, count in enumerate(counts) for word, times in count.items()), strict=True
        )
    )
    lengths = np.array([sum(count.values()) for count in counts])
    containing = np.bincount(col, minlength=len(column))
    rarity = np.log(1 + (len(counts) - containing + 0.5) / (containing + 0.5))
    saturation = frequency + k1 * (1 - b + b * lengths[row] / lengths.mean())
    values = (rarity[col] * frequency * (k1 + 1) / saturation).astype(np.float32)
    return scipy.sparse.csr_matrix((values, (row, col)), shape=(len(counts), len(column)))


class Random(Method):
    """Random scores, different for each query: the lower end of every table."""

    def fit(self) -> None:
        """Do nothing."""

    def open(self) -> None:
        """Do nothing."""

    def scores(self, queries: Queries) -> Tensor:
        generator = torch.Generator().manual_seed(int(queries.ids_QL.sum()))
        return torch.rand(len(queries.ids_QL), len(self.task.train_SL), generator=generator)
