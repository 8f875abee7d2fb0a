"""What `benchmarks.retraining` wrote, and how well scores of documents agree with it (LDS)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file
from scipy.stats import spearmanr
from torch import Tensor

from prism_lightning.attribution.dictionary import Dictionary, fitted_dictionary
from prism_lightning.attribution.hessian import mean_curvature
from prism_lightning.attribution.records import head_chunks, loss_gradient
from prism_lightning.data.store import TokenStore
from prism_lightning.exported import load_exported
from prism_lightning.models import PrismForCausalLM

DAMPING = 1e-3


class Tokens(NamedTuple):
    """Hidden states and loss gradients of some tokens, and the number of the document (or query) each is of."""

    z_ND: Tensor
    delta_ND: Tensor
    group_N: Tensor


class Trial:
    """The model on all documents, the retrained losses, and everything that scores are made of."""

    def __init__(self, folder: Path) -> None:
        self.model, tokenizer = load_exported(folder / "whole")
        losses = load_file(folder / "losses.safetensors")
        self.included_MS, self.losses_MQ = losses["included"].double(), losses["losses"].double()
        prepared = next(path for path in (folder / "cache").iterdir() if self._is_whole(path))
        block_size = self.model.config.context_length
        self.store = TokenStore(prepared, "train", block_size)
        self.query_texts = [json.loads(line)["text"] for line in (folder / "queries.jsonl").open()]
        self.document_texts = [json.loads(line)["text"] for line in (folder / "train.jsonl").open()]
        ids = [tokenizer(text)["input_ids"][: block_size + 1] for text in self.query_texts]
        self.train = self._train_tokens()
        self.queries = self._joined([self._tokens(torch.tensor(i)[None], q) for q, i in enumerate(ids)])
        self.head_VD = self.model.lm_head.weight.detach()
        self.curvature_DD = mean_curvature(self.head_VD, self.train.z_ND)
        self._fitted: dict[tuple[int, int, int], Dictionary] = {}

    def _is_whole(self, path: Path) -> bool:
        manifest = path / "manifest.json"
        documents = self.included_MS.shape[1]
        return manifest.is_file() and json.loads(manifest.read_text())["train"]["documents"] == documents

    @torch.no_grad()
    def _tokens(self, ids_BT: Tensor, group: int | Tensor) -> Tokens:
        model: PrismForCausalLM = self.model
        z_ND, head_VD = model.hidden_states(ids_BT[:, :-1]).flatten(0, 1), model.lm_head.weight.detach()
        mean_ND = torch.cat([chunk.mean_CD for chunk in head_chunks(head_VD, z_ND)])
        delta_ND = loss_gradient(head_VD, mean_ND, ids_BT[:, 1:].flatten())
        return Tokens(z_ND, delta_ND, torch.as_tensor(group).expand(len(z_ND)))

    def _train_tokens(self) -> Tokens:
        parts = []
        for first in range(0, len(self.store), 64):
            blocks = list(range(first, min(first + 64, len(self.store))))
            items = self.store.__getitems__(blocks)
            ids_BT = torch.stack([torch.cat([item["input_ids"], item["targets"][-1:]]) for item in items])
            count = len(blocks) * self.store.block_size
            positions = np.arange(count) + first * self.store.block_size + 1
            parts.append(self._tokens(ids_BT, torch.from_numpy(self.store.documents_of(positions))))
        return self._joined(parts)

    @staticmethod
    def _joined(parts: list[Tokens]) -> Tokens:
        return Tokens(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))

    def lds(self, scores_QS: Tensor) -> list[float]:
        """Rank correlation of each query with the retrained losses."""
        predicted_MQ = -(self.included_MS @ scores_QS.double().T)
        return [float(spearmanr(*pair).statistic) for pair in zip(predicted_MQ.T, self.losses_MQ.T, strict=True)]

    def by_document(self, scores_N: Tensor) -> Tensor:
        """Token scores summed over documents."""
        return torch.zeros(self.included_MS.shape[1]).index_add_(0, self.train.group_N, scores_N.float())

    def fit(self, size: int, active: int, steps: int) -> Dictionary:
        """A dictionary of this model's hidden states."""
        if (size, active, steps) not in self._fitted:
            self._fitted[size, active, steps] = fitted_dictionary(self.train.z_ND, size, active, steps, 0)
        return self._fitted[size, active, steps]
