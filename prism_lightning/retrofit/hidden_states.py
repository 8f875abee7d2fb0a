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
    """Hidden states [N, D] of tokens in random blocks, and their likeliest next tokens, in memory-mapped files.

    bf16 keeps 8 bits of each number: an error of 1e-6 of the squared norm, where fits leave a hundredth unexplained.

    Args:
        folder: of the files, among them a .json that records how much is complete.
        store: the split.
        tokens: number of tokens, rounded up to whole blocks; at most all.
        hidden_size: D.
        seed: seed of the choice of blocks.
    """

    def __init__(self, folder: Path, store: TokenStore, tokens: int, hidden_size: int, seed: int) -> None:
        self.folder, self.store = folder, store
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
        return self.folder / "hidden_states.json"

    def blocks_done(self) -> int:
        """Return the number of complete blocks."""
        facts = read_json(self._facts) or {}
        complete = facts.get("shape") == list(self.shape) and all((self.folder / name).is_file() for name in FILES)
        return int(facts.get("blocks_done", 0)) if complete else 0

    def _maps(self, mode: str, vocabulary: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return hidden states (bits of bf16), likeliest tokens and their probabilities."""
        likeliest = (self.shape[0], min(LIKELIEST, vocabulary))
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
            z_nD = all_states(model, batch)
            done = start + len(batch["input_ids"])
            z_nD = z_nD.bfloat16()
            for file, tensor in zip(
                maps, (z_nD.view(torch.uint16), *likeliest_tokens(head_VD, z_nD.float())), strict=True
            ):
                file[start * size : done * size] = tensor.cpu().numpy()
            if number % SAVE_EVERY == SAVE_EVERY - 1 or done == len(self.blocks):
                for file in maps:
                    file.flush()  # type: ignore[attr-defined]
                write_json(self._facts, {"shape": list(self.shape), "blocks_done": done})
            report(done * size, self.shape[0])

    def rows(self, numbers_n: Tensor, head_VD: Tensor) -> tuple[Tensor, Likeliest]:
        """Return the hidden states [n, D] of some tokens in fp32, and their likeliest next tokens, on W's device."""
        rows_n = self.kept_n[numbers_n.numpy()]
        states, tokens, probabilities = (
            torch.from_numpy(file[rows_n]).to(head_VD.device) for file in self._maps("r", len(head_VD))
        )
        return states.view(torch.bfloat16).float(), Likeliest(tokens.long(), probabilities.float())
