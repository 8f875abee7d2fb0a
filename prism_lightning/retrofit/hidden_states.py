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

BF16_BYTES = 2
BLOCKS_READ = 1024  # at a time, to see which targets are masked
SAVE_EVERY = 16  # batches; a stop loses at most these


class StateFile:
    """Hidden states [N, D] of tokens in random blocks of a split, in a memory-mapped file.

    bf16 keeps 8 bits of each number: an error of 1e-6 of the squared norm, where fits leave a hundredth unexplained.

    Args:
        path: of the file; a .json beside it records how much is complete.
        store: the split.
        tokens: number of tokens, rounded up to whole blocks; at most all.
        hidden_size: D.
        seed: seed of the choice of blocks.
    """

    def __init__(self, path: Path, store: TokenStore, tokens: int, hidden_size: int, seed: int) -> None:
        self.path, self.store = path, store
        count = min(len(store), -(-tokens // store.block_size))
        self.blocks = block_at(np.arange(count), len(store), seed).tolist()
        self.shape = (count * store.block_size, hidden_size)

    @cached_property
    def kept_n(self) -> np.ndarray:
        """Numbers of the rows whose tokens have a target."""
        rows, size = np.arange(self.shape[0]), self.store.block_size
        starts = range(0, len(self.blocks), BLOCKS_READ)
        blocks = (self.store.__getitems__(self.blocks[start : start + BLOCKS_READ]) for start in starts)
        has_target = [(item["targets"] != IGNORED_TARGET).numpy() for items in blocks for item in items]
        return rows[np.concatenate(has_target)] if has_target else rows[:size]

    @property
    def tokens(self) -> int:
        """Number N of hidden states, those of masked targets left out."""
        return len(self.kept_n)

    @property
    def _facts(self) -> Path:
        return self.path.with_suffix(".json")

    def blocks_done(self) -> int:
        """Return the number of complete blocks."""
        facts = read_json(self._facts) or {}
        complete = facts.get("shape") == list(self.shape) and self.path.is_file()
        return int(facts.get("blocks_done", 0)) if complete else 0

    def _map(self, mode: str) -> np.ndarray:
        return np.memmap(self.path, dtype=np.uint16, mode=mode, shape=self.shape)  # type: ignore[call-overload]

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
        states = self._map("r+" if done else "w+")
        for number, start in enumerate(range(done, len(self.blocks), batch_blocks)):
            batch = stacked(self.store.__getitems__(self.blocks[start : start + batch_blocks]), model.device)
            z_nD = all_states(model, batch)
            done = start + len(batch["input_ids"])
            states[start * size : done * size] = z_nD.bfloat16().cpu().view(torch.uint16).numpy()
            if number % SAVE_EVERY == SAVE_EVERY - 1 or done == len(self.blocks):
                states.flush()  # type: ignore[attr-defined]
                write_json(self._facts, {"shape": list(self.shape), "blocks_done": done})
            report(done * size, self.shape[0])

    def rows(self, numbers_n: Tensor, device: torch.device) -> Tensor:
        """Return the hidden states [n, D] of some tokens in fp32."""
        values = self._map("r")[self.kept_n[numbers_n.numpy()]]
        return torch.from_numpy(values).view(torch.bfloat16).to(device).float()
