"""Build an index: one forward pass over the training blocks, shard by shard, on one process or several.

Every step ends in a file that is whole or absent, so the same command resumes an interrupted build and gives the same
bytes. Rank r of W builds shards r, r + W, ...; the process that finds all shards finished merges them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import torch
from torch import Tensor

from prism_lightning.attribution.build.base import ShardBuilder
from prism_lightning.attribution.build.hidden import HiddenShardBuilder
from prism_lightning.attribution.build.logits import LogitShardBuilder
from prism_lightning.attribution.curvature.dictionary import (
    Dictionary,
    default_size,
    fitted_dictionary,
    own_dictionary,
)
from prism_lightning.attribution.index.base import FORMAT, curvature_is_current, part_checksums, shard_path
from prism_lightning.attribution.settings import IndexSettings
from prism_lightning.common.errors import UserError
from prism_lightning.common.files import integrity_error, map_file, read_json, write_file, write_json
from prism_lightning.common.manifests import mapping, problem_in, whole
from prism_lightning.data.store import TokenStore
from prism_lightning.models import PrismForCausalLM
from prism_lightning.models.blocks import BlockStates, block_states
from prism_lightning.models.isolation import check_isolation
from prism_lightning.run.fingerprints import model_fingerprint

SHARD_BUILDERS: dict[str, type[ShardBuilder[Any]]] = {"hidden": HiddenShardBuilder, "logits": LogitShardBuilder}
FIT_TOKENS_PER_PROTOTYPE, MIN_SAMPLE_TOKENS = 4, 131_072
Report = Callable[[str, int, int], None]  # name of the step, units done, units in all


class Builder:
    """Builds one index, or the missing parts of it.

    Args:
        model: in eval mode, on the device that computes.
        store: the training split.
        settings: of the index.
        folder: of the index.
        report: called with the progress.

    Raises:
        UserError: a folder that holds an index of another model, corpus or settings; a full disk.
    """

    def __init__(
        self, model: PrismForCausalLM, store: TokenStore, settings: IndexSettings, folder: Path, report: Report
    ) -> None:
        self.model, self.store, self.settings, self.folder, self.report = model, store, settings, folder, report
        self.tokens = len(store) * store.block_size
        self.targets = int(store.targets_in(range(len(store))).sum())
        if not self.targets:
            raise UserError(f"all targets of {store.folder} are masked: there is nothing to index")
        if store.isolated:
            check_isolation(model)
        self.shard_blocks = max(1, settings.shard_tokens // store.block_size)
        self.num_shards = -(-len(store) // self.shard_blocks)
        self.lock = filelock.FileLock(folder / "lock")
        try:
            (folder / "shards").mkdir(parents=True, exist_ok=True)
            self._claim()
        except OSError as error:
            raise UserError(f"{folder} cannot be written ({error.strerror}): choose another --index.dir") from error

    def _claim(self) -> None:
        """Write settings.json, or check that it names the same model, corpus and settings."""
        facts = {
            "format": FORMAT,
            "model": model_fingerprint(self.model),
            "data": self.store.manifest["fingerprint"],
            "block_size": self.store.block_size,
            "tokens": self.tokens,
            "settings": self.settings.recorded(),
        }
        if self.store.masked:
            facts |= {"targets": self.targets, "isolated": self.store.isolated}
        if self.model.dtype != torch.float32:  # of the decoder; shards of two types would belong to different models
            facts["dtype"] = str(self.model.dtype).removeprefix("torch.")
        with self.lock:
            stored = read_json(self.folder / "settings.json")
            damaged = stored is not None and problem_in(stored, {"settings": mapping({})})
            if damaged or (stored is None and (self.folder / "dictionary.json").is_file()):
                raise UserError(f"{self.folder}/settings.json is damaged: remove the folder and build the index again")
            if stored is None:
                write_json(self.folder / "settings.json", facts)
            elif stored != facts:
                names = dict.fromkeys([*facts, *stored])
                changed = [name for name in names if stored.get(name) != facts.get(name) and name != "settings"]
                stored_settings = stored.get("settings", {})
                changed += [f"index.{n}" for n, value in facts["settings"].items() if stored_settings.get(n) != value]
                raise UserError(
                    f"{self.folder} holds an index with another {', '.join(changed)}:"
                    " choose another --index.dir or remove it"
                )
        self.facts = facts

    def build(self, rank: int = 0, world_size: int = 1) -> bool:
        """Build this rank's shards; return whether the index is complete, or other ranks have shards to finish."""
        with self.lock:
            if integrity_error(self.folder / "dictionary.safetensors") or self._active_stored() is None:
                self.prepare_dictionary()
        shard_builder = self.shard_builder()
        missing = [n for n in range(rank, self.num_shards, world_size) if not self._finished(n)]
        total = sum(len(self.blocks_of(n)) for n in missing) * self.store.block_size
        tokens_done = 0
        for number in missing:
            tokens_done = self.write_shard(number, shard_builder, tokens_done, total)
        with self.lock:
            # This rank's own shards have just been checked or written.
            if not all(self._finished(n) for n in range(self.num_shards) if n % world_size != rank):
                return False
            if self._unfinished():
                self._merge(shard_builder)
        return True

    def _finished(self, shard: int) -> bool:
        """Whether a shard exists, is undamaged and was built with the dictionary on disk."""
        path = shard_path(self.folder, shard)
        facts = read_json(path.with_suffix(".json"))
        if facts is None or facts.get("dictionary") != self._dictionary_checksum():
            return False
        return not integrity_error(path)

    def _dictionary_checksum(self) -> int | None:
        return (read_json(self.folder / "dictionary.json") or {}).get("crc32")

    def _active_stored(self) -> int | None:
        """Number of active prototypes of the dictionary on disk; None where its record is damaged."""
        facts = read_json(self.folder / "dictionary.json")
        return None if facts is None or problem_in(facts, {"active": whole(1)}) else facts["active"]

    def _unfinished(self) -> bool:
        manifest = read_json(self.folder / "manifest.json")
        merged = manifest is not None and not integrity_error(self.folder / "curvature.safetensors")
        return not (merged and manifest == self._manifest() and curvature_is_current(self.folder, self.num_shards))

    def blocks_of(self, shard: int) -> range:
        """Return the numbers of a shard's blocks."""
        return range(shard * self.shard_blocks, min(len(self.store), (shard + 1) * self.shard_blocks))

    def hidden(self, blocks: list[int]) -> BlockStates:
        """Return the hidden states of some blocks."""
        return block_states(self.model, self.store.__getitems__(blocks))

    def _batches(self, blocks: list[int]) -> list[list[int]]:
        size = max(1, self.settings.batch_tokens // self.store.block_size)
        return [blocks[start : start + size] for start in range(0, len(blocks), size)]

    @torch.no_grad()
    def _sample(self) -> Tensor:
        """Hidden states [N, D] of blocks that are spread evenly over the corpus; none of masked targets."""
        tokens = self.settings.fit_tokens or max(MIN_SAMPLE_TOKENS, FIT_TOKENS_PER_PROTOTYPE * self._size())
        count = min(len(self.store), -(-tokens * len(self.store) // self.targets))
        chosen = np.linspace(0, len(self.store) - 1, count).astype(int).tolist()
        parts, total = [], int(self.store.targets_in(chosen).sum())
        for batch in self._batches(chosen):
            parts.append(self.hidden(batch).z_nD)
            self.report("sampling hidden states", sum(map(len, parts)), total)
        return torch.cat(parts)

    def _size(self) -> int:
        if self.settings.dictionary == "model":
            return self.model.config.num_prototypes
        return self.settings.prototypes or default_size(self.targets, self.settings.tokens_per_prototype)

    def prepare_dictionary(self) -> None:
        """Fit the dictionary and the bases of the records to a sample, and write dictionary.safetensors."""
        (self.folder / "manifest.json").unlink(missing_ok=True)  # shards of another dictionary no longer make an index
        if self.settings.dictionary == "model" and self.model.prototypes is None:
            raise UserError("this model is dense: it has no prototypes; set --index.dictionary fitted")
        sample_ND = self._sample()
        dictionary = self._dictionary(sample_ND)
        basis_tensors = SHARD_BUILDERS[self.settings.space].fit_basis(self.model, self.settings, sample_ND)
        tensors = {"prototypes": dictionary.prototypes_KD} | basis_tensors
        own = self.model.prototypes
        if self.settings.dictionary == "model" and own is not None and own.metric is not None:
            tensors["metric"] = own.metric
        arrays = {name: tensor.cpu().numpy() for name, tensor in tensors.items()}
        if self.settings.precision != "fp32":
            arrays["prototypes"] = arrays["prototypes"].astype(
                np.float16
            )  # tokens are assigned to the rounded prototypes
        write_file(self.folder / "dictionary.safetensors", arrays, active=dictionary.active)

    def _dictionary(self, sample_ND: Tensor) -> Dictionary:
        layer = self.model.prototypes
        if self.settings.dictionary == "model" and layer is not None:
            return own_dictionary(layer.weight.detach(), layer.active, layer.metric, self.model.lm_head.weight)
        size = self._size()
        if size > len(sample_ND) or self.settings.active_per_token > size:
            raise UserError(
                f"{size} prototypes, {self.settings.active_per_token} active, cannot be fitted to"
                f" {len(sample_ND)} hidden states: lower --index.prototypes or --index.active"
            )
        steps = self.settings.fit_steps
        return fitted_dictionary(
            sample_ND,
            size,
            self.settings.active_per_token,
            steps,
            self.settings.seed,
            lambda step: self.report("fitting prototypes", step, steps),
        )

    def shard_builder(self) -> ShardBuilder[Any]:
        """Return what builds shards with the dictionary and bases that are on disk."""
        path = self.folder / "dictionary.safetensors"
        active = self._active_stored()
        assert active is not None  # `build` has just made sure
        weight = self.model.lm_head.weight
        tensors = {
            name: torch.from_numpy(array.copy()).to(weight.device, weight.dtype)
            for name, array in map_file(path).items()
        }
        dictionary = own_dictionary(tensors.pop("prototypes"), active, tensors.pop("metric", None), weight)
        return SHARD_BUILDERS[self.settings.space](self.model, self.settings, dictionary, tensors)

    @torch.no_grad()
    def write_shard(self, number: int, shard_builder: ShardBuilder[Any], tokens_done: int, total: int) -> int:
        """Build and write one shard; return the tokens done so far, of a total that `report` is told."""
        shard_builder.begin()
        for batch in self._batches(list(self.blocks_of(number))):
            shard_builder.add(self.hidden(batch), len(batch) * self.store.block_size)
            tokens_done += len(batch) * self.store.block_size
            self.report("indexing", tokens_done, total)
        tokens = len(self.blocks_of(number)) * self.store.block_size
        path = shard_path(self.folder, number)
        shard_builder.finish().write(path, tokens=tokens, dictionary=self._dictionary_checksum())
        return tokens_done

    def _merge(self, shard_builder: ShardBuilder[Any]) -> None:
        """Write the curvature over all shards, then the manifest, which marks the index as complete."""
        self.report("merging", 0, self.num_shards)
        paths = [shard_path(self.folder, number) for number in range(self.num_shards)]
        shards = [shard_builder.shard_type.open(path) for path in paths]
        tensors = shard_builder.curvature(shards, self.targets)
        if self.store.masked:
            tensors["targets"] = np.array([self.targets])
        parts = part_checksums(self.folder, self.num_shards)
        write_file(self.folder / "curvature.safetensors", tensors, parts=parts)
        write_json(self.folder / "manifest.json", self._manifest())
        for partial in self.folder.rglob("*.partial"):  # of processes that were killed
            partial.unlink(missing_ok=True)
        self.report("merging", self.num_shards, self.num_shards)

    def _manifest(self) -> dict[str, Any]:
        """The content of manifest.json: what was indexed, and the sizes that reading needs."""
        return self.facts | {
            "shards": self.num_shards,
            "shard_tokens": self.shard_blocks * self.store.block_size,
            "prototypes": self._size(),
            "active": self._active_per_token(),
            "vocabulary": len(self.model.lm_head.weight),
            "documents": self.store.counts["documents"],
            "store": str(self.store.folder.absolute()),
        }

    def _active_per_token(self) -> int:
        own = self.settings.dictionary == "model"
        return self.model.config.active_prototypes if own else self.settings.active_per_token
