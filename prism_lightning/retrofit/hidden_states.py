"""Hidden states of a sample of training tokens, on disk: in bf16, written batch by batch, resumed after a stop.

Shape suffixes: N tokens of the sample, n of a batch, D hidden size, B blocks, T positions.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from prism_lightning.common.files import read_json, write_json
from prism_lightning.common.targets import IGNORED_TARGET
from prism_lightning.data.order import block_at
from prism_lightning.data.store import TokenStore
from prism_lightning.models import PrismForCausalLM
from prism_lightning.models.blocks import all_states, stacked
from prism_lightning.models.pursuit import LIKELIEST, Likeliest, likeliest_tokens

BF16_BYTES = 2
FILES = ("hidden_states.bin", "tokens.bin", "probabilities.bin")
BLOCKS_READ = 1024  # at a time, to see which targets are masked
SAVE_EVERY = 16  # batches; a stop loses at most these


class StateFile:
    """Hidden states [N, D] of a sample of tokens, and their likeliest next tokens, in memory-mapped files.

    The tokens are drawn from those with a target in random blocks. bf16 keeps 8 bits of each number: an error of 1e-6
    of the squared norm, where fits leave a hundredth unexplained.

    Args:
        folder: of the files, among them a .json that records how much is complete.
        store: the split.
        tokens: number of tokens in the blocks, rounded up to whole ones; at most all.
        largest: largest number of hidden states that are kept.
        hidden_size: D.
        seed: seed of the choice of blocks and tokens.
    """

    def __init__(self, folder: Path, store: TokenStore, tokens: int, largest: int, hidden_size: int, seed: int) -> None:
        self.folder, self.store = folder, store
        self.largest, self.hidden_size, self.seed = largest, hidden_size, seed
        count = min(len(store), -(-tokens // store.block_size))
        self.blocks = block_at(np.arange(count), len(store), seed).tolist()

    @cached_property
    def targets_n(self) -> np.ndarray:
        """Positions, counted through all blocks, of the tokens that have a target."""
        starts = range(0, len(self.blocks), BLOCKS_READ)
        blocks = (self.store.__getitems__(self.blocks[start : start + BLOCKS_READ]) for start in starts)
        has_target = [(item["targets"] != IGNORED_TARGET).numpy() for items in blocks for item in items]
        return np.concatenate(has_target).nonzero()[0]

    @cached_property
    def kept_N(self) -> np.ndarray:
        """Positions of the tokens whose hidden states are kept, ascending."""
        if len(self.targets_n) <= self.largest:
            return self.targets_n
        drawn = np.random.default_rng(self.seed).choice(len(self.targets_n), self.largest, replace=False)
        return self.targets_n[np.sort(drawn)]

    @property
    def tokens(self) -> int:
        """Number N of hidden states that are kept."""
        return len(self.kept_N)

    @property
    def shape(self) -> tuple[int, int]:
        """[N, D]."""
        return self.tokens, self.hidden_size

    @property
    def _sample(self) -> list[int]:
        return [len(self.blocks), *self.shape]

    @property
    def _facts(self) -> Path:
        return self.folder / "hidden_states.json"

    def blocks_done(self) -> int:
        """Return the number of complete blocks."""
        facts = read_json(self._facts) or {}
        complete = facts.get("sample") == self._sample and all((self.folder / name).is_file() for name in FILES)
        return int(facts.get("blocks_done", 0)) if complete else 0

    def _maps(self, mode: str, vocabulary: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return hidden states (bits of bf16), likeliest tokens and their probabilities."""
        likeliest = (self.tokens, min(LIKELIEST, vocabulary))
        kinds = (("u2", self.shape), ("u4", likeliest), ("f2", likeliest))
        states, tokens, probabilities = (
            np.memmap(self.folder / name, dtype=dtype, mode=mode, shape=shape)  # type: ignore[call-overload]
            for name, (dtype, shape) in zip(FILES, kinds, strict=True)
        )
        return states, tokens, probabilities

    @torch.no_grad()
    def fill(self, model: PrismForCausalLM, batch_blocks: int, report: Callable[[int, int], object]) -> None:
        """Compute the missing hidden states.

        Args:
            model: gives the hidden states.
            batch_blocks: number of blocks in one forward pass.
            report: called with the numbers of complete and of all tokens.
        """
        done = self.blocks_done()
        size = self.store.block_size
        head_VD = model.lm_head.weight.float()
        maps = self._maps("r+" if done else "w+", len(head_VD))
        for number, start in enumerate(range(done, len(self.blocks), batch_blocks)):
            batch = stacked(self.store.__getitems__(self.blocks[start : start + batch_blocks]), model.device)
            done = start + len(batch["input_ids"])
            first, last = np.searchsorted(self.kept_N, [start * size, done * size])
            rows_n = torch.from_numpy(self.kept_N[first:last] - start * size).to(model.device)
            z_nD = all_states(model, batch)[rows_n].bfloat16()
            parts = (z_nD.view(torch.uint16), *likeliest_tokens(head_VD, z_nD.float()))
            for file, tensor in zip(maps, parts, strict=True):
                file[first:last] = tensor.cpu().numpy()
            if number % SAVE_EVERY == SAVE_EVERY - 1 or done == len(self.blocks):
                for file in maps:
                    file.flush()  # type: ignore[attr-defined]
                write_json(self._facts, {"sample": self._sample, "blocks_done": done})
            report(done * size, len(self.blocks) * size)

    def rows(self, numbers_n: Tensor, head_VD: Tensor) -> tuple[Tensor, Likeliest]:
        """Return the hidden states [n, D] of some tokens in fp32, and their likeliest next tokens, on W's device."""
        states, tokens, probabilities = (
            torch.from_numpy(file[numbers_n.numpy()]).to(head_VD.device) for file in self._maps("r", len(head_VD))
        )
        return states.view(torch.bfloat16).float(), Likeliest(tokens.long(), probabilities.float())
