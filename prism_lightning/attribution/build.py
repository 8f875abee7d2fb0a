"""Build an index: one forward pass over the training blocks, shard by shard, on one process or several.

Every step ends in a file that is whole or absent, so the same command goes on where an interrupted one stopped and
gives the same bytes. Rank r of W builds shards r, r + W, ...; whoever finds all shards finished merges them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import torch
from torch import Tensor

from prism_lightning.attribution.dictionary import Dictionary, default_size, fitted_dictionary
from prism_lightning.attribution.files import damage, map_file, read_json, write_file, write_json
from prism_lightning.attribution.frame import Frame, preconditioner
from prism_lightning.attribution.hessian import HessianSums, eigenbasis, mean_curvature
from prism_lightning.attribution.identity import model_fingerprint
from prism_lightning.attribution.index import made_from, parts_of, shard_path
from prism_lightning.attribution.postings import posting_lists
from prism_lightning.attribution.quantisation import quantised
from prism_lightning.attribution.records import head_chunks, loss_gradient, records_of
from prism_lightning.attribution.settings import IndexSettings
from prism_lightning.data.store import TokenStore
from prism_lightning.errors import UserError
from prism_lightning.models import PrismForCausalLM

FORMAT = 1
CURVATURE_TOKENS = 65_536  # of the sample, for the basis in which records are stored; S itself is summed over all
FIT_TOKENS_PER_PROTOTYPE, LEAST_SAMPLE = 4, 131_072
Report = Callable[[str, int, int], None]  # what is done, how much of it, of how much


class Builder:
    """Builds one index, or what is missing of it.

    Args:
        model: in eval mode, on the device that computes.
        store: the training split.
        settings: of the index.
        folder: where it goes.
        report: called as the work goes on.

    Raises:
        UserError: a folder that holds an index of another model, corpus or settings; a full disk.
    """

    def __init__(
        self, model: PrismForCausalLM, store: TokenStore, settings: IndexSettings, folder: Path, report: Report
    ) -> None:
        self.model, self.store, self.settings, self.folder, self.report = model, store, settings, folder, report
        self.tokens = len(store) * store.block_size
        self.shard_blocks = max(1, settings.shard_tokens // store.block_size)
        self.num_shards = -(-len(store) // self.shard_blocks)
        self.lock = filelock.FileLock(folder / "lock")
        try:
            (folder / "shards").mkdir(parents=True, exist_ok=True)
            self._claim()
        except OSError as error:
            raise UserError(f"{folder} cannot be written ({error.strerror}): choose another --index.dir") from error

    def _claim(self) -> None:
        """Say what this folder is an index of, or see that it says the same already."""
        facts = {
            "format": FORMAT,
            "model": model_fingerprint(self.model),
            "data": self.store.manifest["fingerprint"],
            "block_size": self.store.block_size,
            "tokens": self.tokens,
            "settings": {name: value for name, value in asdict(self.settings).items() if name != "dir"},
        }
        with self.lock:
            found = read_json(self.folder / "settings.json")
            if found is None and (self.folder / "dictionary.json").is_file():
                raise UserError(f"{self.folder}/settings.json is damaged: remove the folder and build the index again")
            if found is None:
                write_json(self.folder / "settings.json", facts)
            elif found != facts:
                changed = [name for name in facts if found.get(name) != facts[name] and name != "settings"]
                old = found.get("settings", {})
                changed += [f"index.{n}" for n, value in facts["settings"].items() if old.get(n) != value]
                raise UserError(
                    f"{self.folder} holds an index with another {', '.join(changed)}:"
                    " choose another --index.dir or remove it"
                )
        self.facts = facts

    def build(self, rank: int = 0, world_size: int = 1) -> bool:
        """Do this rank's share; True once the index is whole, False while other ranks have shards to finish."""
        with self.lock:
            if damage(self.folder / "dictionary.safetensors"):
                self.prepare_frame()
        frame = self.frame()
        missing = [n for n in range(rank, self.num_shards, world_size) if not self._finished(n)]
        total = sum(len(self.blocks_of(n)) for n in missing) * self.store.block_size
        done = 0
        for number in missing:
            done = self.write_shard(number, frame, done, total)
        with self.lock:
            # This rank's own shards have just been checked or written.
            if not all(self._finished(n) for n in range(self.num_shards) if n % world_size != rank):
                return False
            if self._unfinished():
                self._merge(frame)
        return True

    def _finished(self, shard: int) -> bool:
        """Whether a shard is there, undamaged, and assigned to this very dictionary."""
        path = shard_path(self.folder, shard)
        facts = read_json(path.with_suffix(".json"))
        return facts is not None and facts["dictionary"] == self._dictionary_checksum() and not damage(path)

    def _dictionary_checksum(self) -> int | None:
        return (read_json(self.folder / "dictionary.json") or {}).get("crc32")

    def _unfinished(self) -> bool:
        manifest = read_json(self.folder / "manifest.json")
        whole = manifest is not None and not damage(self.folder / "curvature.safetensors")
        return not (whole and manifest == self._manifest() and made_from(self.folder, self.num_shards))

    def blocks_of(self, shard: int) -> range:
        return range(shard * self.shard_blocks, min(len(self.store), (shard + 1) * self.shard_blocks))

    def hidden(self, blocks: list[int]) -> tuple[Tensor, Tensor]:
        """z [N, D] and targets [N] of some blocks."""
        items = self.store.__getitems__(blocks)
        ids_BT, targets_BT = (
            torch.stack([item[name] for item in items]).to(self.model.device) for name in ("input_ids", "targets")
        )
        return self.model.hidden_states(ids_BT).flatten(0, 1), targets_BT.flatten()

    def _batches(self, blocks: list[int]) -> list[list[int]]:
        size = max(1, self.settings.batch_tokens // self.store.block_size)
        return [blocks[start : start + size] for start in range(0, len(blocks), size)]

    @torch.no_grad()
    def _sample(self) -> Tensor:
        """Hidden states of blocks spread evenly over the corpus."""
        tokens = self.settings.fit_tokens or max(LEAST_SAMPLE, FIT_TOKENS_PER_PROTOTYPE * self._size())
        count = min(len(self.store), -(-tokens // self.store.block_size))
        chosen = np.linspace(0, len(self.store) - 1, count).astype(int).tolist()
        parts, total = [], count * self.store.block_size
        for batch in self._batches(chosen):
            parts.append(self.hidden(batch)[0])
            self.report("sampling hidden states", sum(map(len, parts)), total)
        return torch.cat(parts)

    def _size(self) -> int:
        if self.settings.dictionary == "model":
            return self.model.config.num_prototypes
        return self.settings.prototypes or default_size(self.tokens)

    def prepare_frame(self) -> None:
        """Sample hidden states, fit the dictionary, find the basis that records are stored in."""
        (self.folder / "manifest.json").unlink(missing_ok=True)  # shards of another dictionary are no index any more
        sample_ND = self._sample()
        dictionary = self._dictionary(sample_ND)
        head_VD = self.model.lm_head.weight.detach()
        step = max(1, len(sample_ND) // CURVATURE_TOKENS)
        rank = min(self.settings.rank or head_VD.shape[1], head_VD.shape[1])
        values_m, basis_Dm = eigenbasis(mean_curvature(head_VD, sample_ND[::step]), rank)
        tensors = {"prototypes": dictionary.prototypes_KD, "basis": basis_Dm, "eigenvalues": values_m}
        if self.settings.hidden_rank:
            second_DD = (sample_ND.T @ sample_ND).double() / len(sample_ND)
            hidden_h, hidden_Dh = eigenbasis(second_DD, min(self.settings.hidden_rank, len(second_DD)))
            tensors["hidden"] = hidden_Dh / hidden_h.sqrt()
        arrays = {name: tensor.cpu().numpy() for name, tensor in tensors.items()}
        if self.settings.precision != "fp32":
            arrays["prototypes"] = arrays["prototypes"].astype(np.float16)  # assigned to as they are stored
        write_file(
            self.folder / "dictionary.safetensors",
            arrays,
            active=dictionary.active,
            mean_square_norm=sample_ND.square().sum(-1).mean().item(),
        )

    def _dictionary(self, sample_ND: Tensor) -> Dictionary:
        if self.settings.dictionary == "model":
            layer = self.model.prototypes
            if layer is None:
                raise UserError("this model is dense: it has no prototypes; set --index.dictionary fitted")
            return Dictionary(layer.weight.detach(), layer.active)
        size = self._size()
        if size > len(sample_ND) or self.settings.active > size:
            raise UserError(
                f"{size} prototypes, {self.settings.active} active, cannot be fitted to {len(sample_ND)} hidden states:"
                " lower --index.prototypes or --index.active"
            )
        steps = self.settings.fit_steps
        return fitted_dictionary(
            sample_ND,
            size,
            self.settings.active,
            steps,
            self.settings.seed,
            lambda step: self.report("fitting prototypes", step, steps),
        )

    def frame(self) -> Frame:
        path = self.folder / "dictionary.safetensors"
        facts = read_json(path.with_suffix(".json")) or {}
        weight = self.model.lm_head.weight
        tensors = {
            name: torch.from_numpy(array.copy()).to(weight.device, weight.dtype)
            for name, array in map_file(path).items()
        }
        scale = 0.0
        if self.settings.objective == "training":
            scale = 2 * self.model.config.reconstruction_weight / facts["mean_square_norm"]
        return Frame(
            Dictionary(tensors["prototypes"], facts["active"]),
            tensors["basis"],
            tensors["eigenvalues"],
            tensors.get("hidden"),
            scale,
        )

    @torch.no_grad()
    def write_shard(self, number: int, frame: Frame, done: int, total: int) -> int:
        head_VD = self.model.lm_head.weight.detach()
        eigenvalues = self.settings.curvature == "eigenvalues"
        sums = HessianSums(head_VD, len(frame.dictionary.unit_KD), frame.basis_Dm if eigenvalues else None)
        parts: list[dict[str, np.ndarray]] = []
        for batch in self._batches(list(self.blocks_of(number))):
            z_ND, targets_N = self.hidden(batch)
            parts.append(self._part(frame, sums, z_ND, targets_N))
            done += len(z_ND)
            self.report("indexing", done, total)
        tensors = {name: np.concatenate([part.pop(name) for part in parts]) for name in list(parts[0])}
        tensors |= posting_lists(
            tensors.pop("prototypes"),
            tensors.pop("activations"),
            len(frame.dictionary.unit_KD),
            self.settings.activation_path,
        )
        tensors |= {
            "sum_activation": _array(sums.activation_K.float()),
            "sum_curvature": _array(sums.gauss_newton_DD()),
        }
        if sums.eigenvalue_Km is not None:
            tensors["sum_eigenvalues"] = _array(sums.eigenvalue_Km.float())
        write_file(shard_path(self.folder, number), tensors, tokens=sums.tokens, dictionary=self._dictionary_checksum())
        return done

    def _part(self, frame: Frame, sums: HessianSums, z_ND: Tensor, targets_N: Tensor) -> dict[str, np.ndarray]:
        """What a shard keeps of one batch."""
        dictionary, head_VD = frame.dictionary, self.model.lm_head.weight.detach()
        chunks_delta = []
        indices_Nk, activations_Nk = dictionary.assign(z_ND)
        for chunk in head_chunks(head_VD, z_ND):
            sums.add(chunk, indices_Nk[chunk.rows], activations_Nk[chunk.rows])
            chunks_delta.append(loss_gradient(head_VD, chunk.mean_CD, targets_N[chunk.rows]))
        assigned = (indices_Nk, activations_Nk)
        path, scale = self.settings.activation_path, frame.reconstruction_scale
        records = records_of(dictionary, z_ND, torch.cat(chunks_delta), path, scale, assigned)
        narrow = np.float32 if self.settings.precision == "fp32" else np.float16
        coordinates, scales = quantised(
            _array((records.vectors_NrD @ frame.whitening_Dm).flatten(0, 1)), self.settings.precision
        )
        part = {
            "coordinates": coordinates,
            "prototypes": _array(records.prototypes_Nk).astype(np.uint32),
            "activations": _array(records.activations_Nk).astype(narrow),
        }
        if scales is not None:
            part["scales"] = scales
        if frame.hidden_Dh is not None:
            hidden, hidden_scales = quantised(_array(z_ND @ frame.hidden_Dh), "int8")
            assert hidden_scales is not None
            part |= {"hidden": hidden, "hidden_scales": hidden_scales}
        return part

    def _merge(self, frame: Frame) -> None:
        """The curvature over all shards, and the manifest, which makes the index whole."""
        self.report("merging", 0, self.num_shards)
        shards = [map_file(shard_path(self.folder, number)) for number in range(self.num_shards)]
        tensors = preconditioner(frame, shards, self.tokens, self.settings.damping)
        parts = parts_of(self.folder, self.num_shards)
        write_file(self.folder / "curvature.safetensors", tensors, parts=parts)
        write_json(self.folder / "manifest.json", self._manifest())
        for left in self.folder.rglob("*.partial"):  # by processes that were killed
            left.unlink(missing_ok=True)
        self.report("merging", self.num_shards, self.num_shards)

    def _manifest(self) -> dict[str, Any]:
        """What the index is of, and what reading it needs."""
        return self.facts | {
            "shards": self.num_shards,
            "shard_tokens": self.shard_blocks * self.store.block_size,
            "prototypes": self._size(),
            "active": self._active(),
            "documents": self.store.counts["documents"],
            "store": str(self.store.folder.absolute()),
        }

    def _active(self) -> int:
        own = self.settings.dictionary == "model"
        return self.model.config.active_prototypes if own else self.settings.active


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().numpy()
