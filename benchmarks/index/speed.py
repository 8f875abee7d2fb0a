"""Time, disk space and memory of building and querying an index, and their growth with the corpus.

python -m benchmarks.index.speed --ckpt_path runs/quickstart
python -m benchmarks.index.speed --ckpt_path runs/quickstart --name growth --fit_steps 0 \\
    --tokens_per_prototype 128 --sizes 262144 1048576 4194304 16777216
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common import Spread, finish
from benchmarks.index.query_process import resident, spread, timed
from prism_lightning.attribution.attributor import Attributor, QueryTokens
from prism_lightning.attribution.build.builder import Builder
from prism_lightning.attribution.index.opening import open_index
from prism_lightning.attribution.settings import IndexSettings
from prism_lightning.data.store import TokenStore
from prism_lightning.lightning_modules.text_data import TextData
from prism_lightning.models import PrismForCausalLM
from prism_lightning.run.model_folder import load_exported

PAIRS_TOKENS = 131_072  # of one shard in the interleaved comparison with a plain forward pass
PROMPT_TOKENS = 32


class Repeated(TokenStore):
    """A store of exactly `tokens_wanted` tokens, which repeats its blocks where it has too few."""

    tokens_wanted = 0

    def __len__(self) -> int:
        return self.tokens_wanted // self.block_size

    def __getitems__(self, blocks: list[int]) -> list[dict[str, torch.Tensor]]:
        return super().__getitems__([block % super(Repeated, self).__len__() for block in blocks])


def store_of(data: TextData, tokens: int) -> Repeated:
    """Return the training split at a size."""
    store = Repeated(data.train.folder, "train", data.block_size)
    store.tokens_wanted = tokens
    return store


def quiet(*_: object) -> None:
    """Discard a progress report."""


@torch.no_grad()
def plain_forward(builder: Builder, blocks: range) -> float:
    """Return seconds of a validation forward pass: hidden states, head and loss."""
    started = time.perf_counter()
    size = builder.settings.batch_tokens // builder.store.block_size
    for first in range(blocks.start, blocks.stop, size):
        z_ND, targets_N, _ = builder.hidden(list(range(first, min(first + size, blocks.stop))))
        loss = builder.model.lm_head(z_ND, targets_N)
    loss.item()  # a GPU has finished by then
    return time.perf_counter() - started


def build_pairs(model: PrismForCausalLM, store: TokenStore, folder: Path, settings: IndexSettings) -> dict[str, Any]:
    """Return tokens per second of the build and of a plain forward pass, shard by shard in turn."""
    shutil.rmtree(folder, ignore_errors=True)
    builder = Builder(model, store, settings, folder, quiet)
    started = time.perf_counter()
    builder.prepare_dictionary()
    prepared = time.perf_counter() - started
    shard_builder, pairs = builder.shard_builder(), []
    plain_forward(builder, builder.blocks_of(0))
    for shard in range(builder.num_shards):
        plain = plain_forward(builder, builder.blocks_of(shard))
        started = time.perf_counter()
        builder.write_shard(shard, shard_builder, 0, 0)
        pairs.append((plain, time.perf_counter() - started))
    tokens = settings.shard_tokens
    return {
        "plain_tokens_per_second": asdict(Spread.of([tokens / plain for plain, _ in pairs])),
        "build_tokens_per_second": asdict(Spread.of([tokens / build for _, build in pairs])),
        "ratio": asdict(Spread.of([plain / build for plain, build in pairs])),
        "prepare_seconds": prepared,
        "ratio_with_dictionary": sum(p for p, _ in pairs) / (prepared + sum(b for _, b in pairs)),
    }


def records_file(attributor: Attributor, store: TokenStore, path: Path, tokens: int) -> None:
    """Write records of held-out tokens, in the order of the text, for `benchmarks.index.query_process`."""
    query_tokens: list[QueryTokens] = []
    for block in np.linspace(0, len(store) - 1, -(-tokens // (store.block_size - 1))).astype(int).tolist():
        query_tokens.append(attributor.query_tokens(store[block]["input_ids"].tolist(), 1))
    arrays = [
        np.concatenate(parts) for parts in zip(*(a.records.arrays(slice(None)) for a in query_tokens), strict=True)
    ]
    np.savez(path, *arrays)


def from_text(attributor: Attributor, store: TokenStore) -> dict[str, float]:
    """Return milliseconds for one token from its prompt's ids to the top 100, the forward pass included."""
    prompts = [store[block]["input_ids"][: PROMPT_TOKENS + 1].tolist() for block in range(min(64, len(store)))]

    def ask(number: int) -> None:
        query_tokens = attributor.query_tokens(prompts[number], PROMPT_TOKENS)
        attributor.hits(query_tokens, slice(0, 1))[1].strongest(100)

    return spread(timed(ask, len(prompts)))


def measure(options: argparse.Namespace, data: TextData, size: int) -> dict[str, Any]:
    """Return all measurements at one corpus size."""
    model, tokenizer = load_exported(options.ckpt_path)
    store, folder = store_of(data, size), options.work / f"{options.name}-{size}"
    shutil.rmtree(folder, ignore_errors=True)
    prototypes = size // options.tokens_per_prototype if options.tokens_per_prototype else None
    settings = IndexSettings(prototypes=prototypes, fit_steps=options.fit_steps)
    started = time.perf_counter()
    Builder(model, store, settings, folder, quiet).build()
    result: dict[str, Any] = {"build_seconds": time.perf_counter() - started}
    index = open_index(folder, verify=False)
    files = {path: path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    result["bytes_per_token"] = sum(files.values()) / index.tokens
    attributor = Attributor(model, tokenizer, index, store, top=100)
    records_file(attributor, data.validation, folder / "records.npz", 2048)
    command = [sys.executable, "-m", "benchmarks.index.query_process", str(folder), str(folder / "records.npz")]
    result |= json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    result["from_text"] = from_text(attributor, data.validation)
    result["memory_with_model"] = resident()
    shutil.rmtree(folder)
    if options.pairs:
        shards = IndexSettings(
            prototypes=index.num_prototypes,
            fit_steps=options.fit_steps,
            shard_tokens=PAIRS_TOKENS,
        )
        result["build"] = build_pairs(model, store, folder, shards)
        shutil.rmtree(folder)
    return result


def rows_of(result: dict[str, Any]) -> list[list[str]]:
    """Return the lines of the printed table."""
    size = f"{result['tokens']:,}, K {result['prototypes']:,}"
    seconds = result["build_seconds"]
    rows = [
        [size, "list entries per query, p50 / p95", f"{result['entries_p50']:,.0f} / {result['entries_p95']:,.0f}"],
        ["", "build, whole", f"{seconds:.0f} s, {1e6 * seconds / result['tokens']:.1f} us/token"],
        ["", "bytes per token", f"{result['bytes_per_token']:.1f}"],
    ]
    if "build" in result:
        build = result["build"]
        rows.append(["", "build / plain forward pass, tokens/s", Spread(**build["ratio"]).show(2)])
        rows.append(["", "the same, with the fit of the dictionary", f"{build['ratio_with_dictionary']:.2f}"])
    for name in ("one_token", "each_of_64", "sequence_of_128", "from_text"):
        rows.append(["", f"{name}, p50 / p95", f"{result[name]['p50_ms']:.3f} / {result[name]['p95_ms']:.3f} ms"])
    memory, model = result["memory_after"], result["memory_with_model"]
    text = f"{memory['resident_mib']:.0f} MiB, {memory['private_mib']:.0f} without mapped files"
    rows.append(["", "query process from records", text])
    text = f"{model['resident_mib']:.0f} MiB, {model['private_mib']:.0f} without mapped files"
    rows.append(["", "process with model and libraries (and this build's)", text])
    return rows


def main() -> None:
    """Measure each size; print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--ckpt_path", type=Path, default=Path("runs/quickstart"), help="Run directory of recipes/quickstart.yaml."
    )
    parser.add_argument("--cache_dir", default="data_cache", help="Folder of its prepared data.")
    parser.add_argument(
        "--sizes", type=int, nargs="+", default=[2**20], help="Numbers of training tokens (default 1,048,576)."
    )
    parser.add_argument(
        "--tokens_per_prototype", type=int, help="Training tokens per prototype (default: as `index` chooses)."
    )
    parser.add_argument(
        "--fit_steps", type=int, default=IndexSettings.fit_steps, help="Number of fit steps of the dictionary."
    )
    parser.add_argument("--pairs", action="store_true", help="Compare the build with a plain forward pass.")
    parser.add_argument("--name", default="index_speed", help="Name of the JSON file.")
    parser.add_argument("--work", type=Path, default=Path("runs/benchmark"), help="Folder of the temporary indexes.")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="Folder of the JSON file.")
    options = parser.parse_args()
    data = TextData(cache_dir=options.cache_dir)
    data.setup()
    title = f"Attribution, {torch.get_num_threads()} threads"
    results: list[dict[str, Any]] = []
    for size in options.sizes:  # written after each, since the last may take an hour
        results.append(measure(options, data, size))
        rows = [row for result in results for row in rows_of(result)]
        finish(options.name, title, ["tokens", "quantity", "measured"], rows, results, options.out)


if __name__ == "__main__":
    main()
