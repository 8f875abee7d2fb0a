"""What must be known on a GPU, in under nine minutes on one H100: training, index build, queries and generation.

python -m benchmarks.gpu --out results.json

Weights and tokens are random: what is computed in training and in a forward pass does not depend on them. How long a
query takes does, by the list entries that it reads, which are told beside its time.
`--smoke` runs every stage at a tiny size on the CPU; its numbers mean nothing.
"""

from __future__ import annotations

import argparse
import gc
import sys
import tempfile
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from benchmarks.common import Spread, finish
from benchmarks.index.query_process import spread, timed
from benchmarks.index.speed import build_pairs, quiet
from benchmarks.interventions.speed import TURNS, turns
from benchmarks.training.throughput import Trainee
from prism_lightning.attribution.attributor import Attributor
from prism_lightning.attribution.build.builder import Builder
from prism_lightning.attribution.index.opening import open_index
from prism_lightning.attribution.settings import IndexSettings
from prism_lightning.config.compose import compose
from prism_lightning.data.store import TokenStore
from prism_lightning.models import PrismConfig, PrismForCausalLM
from prism_lightning.models.flops import flops_per_token, peak_flops

RECIPES = Path(__file__).parents[2] / "recipes"
TRAINED = {"130M": "prism_130m.yaml", "1.6B": "prism_1b.yaml"}
GPUS = 8  # that the recipes' batch is shared by: an optimiser step has that many micro-batches fewer
SCALED = 32  # prototypes of the intervention
SEED = 0
TINY = [
    *("model.backbone.n_layer=1", "model.backbone.n_embd=32", "model.backbone.n_head=2", "model.num_prototypes=64"),
    *("model.backbone.vocab_size=300", "data.block_size=32", "data.micro_batch_size=2", "data.batch_size=32"),
]


@dataclass
class Sizes:
    """How much is done in each stage.

    Attributes:
        overrides: of the recipes.
        pairs, seconds: of a training comparison: pairs at most, seconds after which no further one begins.
        index_tokens, shard_tokens, fit_steps: of the index that is built.
        questions, sequence: asked of it at once, and tokens of each.
        batches, new_tokens, repeats: of generation.
    """

    overrides: list[str]
    pairs: int
    seconds: float
    index_tokens: int
    shard_tokens: int
    fit_steps: int
    questions: int
    sequence: int
    batches: tuple[int, ...]
    new_tokens: int
    repeats: int


FULL = Sizes([], 15, 75.0, 2**21, 2**19, 150, 64, 128, (1, 64), 64, 12)
SMOKE = Sizes(TINY, 2, 2.0, 2**12, 2**11, 2, 4, 16, (1, 2), 4, 2)


class RandomStore(TokenStore):
    """Random tokens, as unevenly used as words are, as a store without files; its tokenizer has a word for each."""

    def __init__(self, tokens: int, block_size: int, vocabulary: int, folder: Path) -> None:
        self.folder, self.split, self.block_size = folder, "train", block_size
        self.manifest, self.counts = {"fingerprint": "random"}, {"tokens": tokens + 1, "documents": 1}
        share_V = np.cumsum(1 / np.arange(10, vocabulary + 10))
        drawn = np.random.default_rng(SEED).random(tokens + 1) * share_V[-1]
        self.tokens = np.searchsorted(share_V, drawn).astype(np.uint32)
        words = Tokenizer(WordLevel({str(token): token for token in range(vocabulary)}, unk_token="0"))
        self.tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)


def configuration(recipe: str, overrides: list[str]) -> tuple[PrismConfig, dict[str, Any]]:
    """The model of a recipe, and its data settings."""
    settings = compose(RECIPES / recipe, overrides)
    model = settings["model"]["init_args"]
    names = ("num_prototypes", "active_prototypes")
    return PrismConfig(backbone_config=model["backbone"], **{n: model[n] for n in names}), settings["data"]


def training(recipe: str, sizes: Sizes, device: str) -> dict[str, Any]:
    """Tokens per second and MFU of a recipe's model with and without its prototypes, in turns.

    One decoder with one optimiser serves for both, since two of 1.6 B do not fit beside each other.
    """
    config, data = configuration(recipe, sizes.overrides)
    tokens = (data["micro_batch_size"], data["block_size"])
    trainee = Trainee(config, tokens, device, max(1, data["batch_size"] // data["micro_batch_size"] // GPUS))
    layer = trainee.model.prototypes
    rates: list[tuple[float, float]] = []

    def rate(prism: bool) -> float:
        trainee.model.prototypes = layer if prism else None
        return trainee.rate(1)

    rate(False), rate(True)  # warms up
    started = time.perf_counter()
    while len(rates) < sizes.pairs and (not rates or time.perf_counter() - started < sizes.seconds):
        rates.append((rate(False), rate(True)))
    flops = flops_per_token(trainee.model.matrix_parameters, config.get_text_config(), tokens[1])
    peak = peak_flops(torch.cuda.get_device_name()) if device == "cuda" else None
    found: dict[str, Any] = {"micro_batch": tokens, "accumulation": trainee.accumulation, "flops_per_token": flops}
    found |= {"parameters": sum(p.numel() for p in trainee.model.parameters()), "pairs": len(rates)}
    for name, values in (("dense", [d for d, _ in rates]), ("prism", [p for _, p in rates])):
        found[name] = asdict(Spread.of(values))
        found[f"{name}_mfu"] = None if peak is None else asdict(Spread.of([v * flops / peak for v in values]))
    found["ratio"] = asdict(Spread.of([p / d for d, p in rates]))
    if device == "cuda":
        found["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return found


def models(sizes: Sizes, device: str) -> tuple[dict[str, PrismForCausalLM], int]:
    """The 130M shape with random weights, its decoder in either type; and the block size."""
    config, data = configuration(TRAINED["130M"], sizes.overrides)
    torch.manual_seed(SEED)
    with torch.device(device):
        model: PrismForCausalLM = PrismForCausalLM(config).eval()
    narrow = deepcopy(model)
    narrow.narrow_decoder(torch.bfloat16, "random")
    return {"fp32": model, "bf16": narrow}, data["block_size"]


def index_build(model: PrismForCausalLM, block_size: int, sizes: Sizes, folder: Path) -> dict[str, Any]:
    """Tokens per second of an index's shards, beside those of a plain forward pass, and what its dictionary takes."""
    store = RandomStore(sizes.index_tokens, block_size, model.config.vocab_size, folder)
    settings = IndexSettings(shard_tokens=sizes.shard_tokens, fit_steps=sizes.fit_steps)
    return build_pairs(model, store, folder / "index", settings)


def queries(model: PrismForCausalLM, block_size: int, sizes: Sizes, folder: Path) -> dict[str, Any]:
    """Milliseconds of a question from token ids, forward pass and the top 100 included: one, and each of many."""
    store = RandomStore(sizes.index_tokens, block_size, model.config.vocab_size, folder)
    settings = IndexSettings(shard_tokens=sizes.shard_tokens, fit_steps=sizes.fit_steps)
    Builder(model, store, settings, folder / "index", quiet).build()  # merges the shards of `index_build`
    index = open_index(folder / "index", verify=False)
    attributor = Attributor(model, store.tokenizer, index, store, top=100)
    texts = [store[number % len(store)]["input_ids"][: sizes.sequence].tolist() for number in range(sizes.questions)]

    found: dict[str, Any] = {"tokens": index.tokens, "prototypes": index.num_prototypes}
    for kind, first in (("token", len(texts[0]) - 1), ("sequence", 1)):
        found[kind] = asked_of(attributor, texts, first)
    return found


def asked_of(attributor: Attributor, texts: list[list[int]], first: int) -> dict[str, Any]:
    """List entries and milliseconds of the question about a text's tokens from `first` on: alone, and of all."""

    def ask(number: int) -> None:
        asked = attributor.query_tokens(texts[number], first)
        attributor.hits(asked, slice(0, len(asked.positions)))[1].strongest(100)

    def ask_all(_: int) -> None:
        for number in range(len(texts)):
            ask(number)

    asked = [attributor.query_tokens(text, first) for text in texts]
    entries = [attributor.index.entries_read(attributor.query(one, slice(0, len(one.positions)))) for one in asked]
    together = [milliseconds / len(texts) for milliseconds in timed(ask_all, 1)]
    return {
        "entries_p50": float(np.median(entries)),
        "alone": spread(timed(ask, len(texts))),
        "of_all": spread(together),
        "questions": len(texts),
    }


def generation(model: PrismForCausalLM, sizes: Sizes) -> dict[str, Any]:
    """Milliseconds a token of batches of prompts, with factors on some prototypes and without, in turns."""
    factors = dict.fromkeys(range(min(SCALED, model.config.num_prototypes)), 0.0)
    found = {}
    for batch in sizes.batches:
        times = turns(model, batch, factors, sizes.new_tokens, sizes.repeats, sizes.seconds / 4)
        found[str(batch)] = {name: asdict(Spread.of(times[name])) for name in (*TURNS, "more_percent")}
    return found


def measured(sizes: Sizes, device: str) -> dict[str, Any]:
    """Every stage, one after the other; a stage that does not fit into memory says so."""
    results: dict[str, Any] = {}
    for name, recipe in TRAINED.items():
        _stage(results, f"training {name}", training, recipe, sizes, device)
    shapes, block_size = models(sizes, device)
    with tempfile.TemporaryDirectory() as work:
        for dtype, model in shapes.items():
            folder = Path(work) / dtype
            folder.mkdir()
            _stage(results, f"index {dtype}", index_build, model, block_size, sizes, folder)
            _stage(results, f"queries {dtype}", queries, model, block_size, sizes, folder)
            _stage(results, f"generation {dtype}", generation, model, sizes)
    return results


def _stage(results: dict[str, Any], name: str, run: Callable[..., dict[str, Any]], *given: Any) -> None:
    started = time.perf_counter()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try:
        results[name] = run(*given)
    except torch.OutOfMemoryError as error:
        results[name] = {"out_of_memory": str(error).splitlines()[0]}
    results[name]["stage_seconds"] = time.perf_counter() - started
    print(f"{name}: {results[name]['stage_seconds']:.0f} s", file=sys.stderr, flush=True)


def rows_of(results: dict[str, Any]) -> list[list[str]]:
    """Lines of the printed table."""
    rows = []
    for name, found in results.items():
        lines = [["out of memory", ""]] if "out_of_memory" in found else _lines(name.split()[0], found)
        rows += [[name if number == 0 else "", *line] for number, line in enumerate(lines)]
    return rows


def _lines(stage: str, found: dict[str, Any]) -> list[list[str]]:
    if stage == "training":
        lines = []
        for name in ("dense", "prism"):
            lines.append([f"{name}, tokens/s", Spread(**found[name]).show()])
            if found[f"{name}_mfu"] is not None:
                lines.append([f"{name}, MFU", Spread(**found[f"{name}_mfu"]).show(3)])
        return [*lines, ["PRISM / dense", Spread(**found["ratio"]).show(3)]]
    if stage == "index":
        lines = [["shards, tokens/s", Spread(**found["build_tokens_per_second"]).show()]]
        lines.append(["plain forward pass, tokens/s", Spread(**found["plain_tokens_per_second"]).show()])
        return [*lines, ["dictionary, s", f"{found['prepare_seconds']:.1f}"]]
    if stage == "queries":
        return [
            [
                f"{kind}, {'alone' if way == 'alone' else 'each of ' + str(found[kind]['questions'])},"
                f" {found[kind]['entries_p50']:,.0f} list entries",
                f"{found[kind][way]['p50_ms']:.2f}, p95 {found[kind][way]['p95_ms']:.2f} ms",
            ]
            for kind in ("token", "sequence")
            for way in ("alone", "of_all")
        ]
    batches = [batch for batch in found if batch != "stage_seconds"]
    return [
        [f"{batch} prompts, {said}", Spread(**found[batch][name]).show(2)]
        for batch in batches
        for name, said in {"without": "ms a token", "with": "scaled, ms a token", "more_percent": "more, %"}.items()
    ]


def main(arguments: list[str] | None = None) -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/gpu.json"), help="the JSON file")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes on the CPU, in seconds")
    options = parser.parse_args(arguments)
    if not (options.smoke or torch.cuda.is_available()):
        parser.error("no CUDA device that torch can use: give --smoke to see that everything runs")
    started = time.perf_counter()
    sizes, device = (SMOKE, "cpu") if options.smoke else (FULL, "cuda")
    results: dict[str, Any] = {"stages": measured(sizes, device), "sizes": asdict(sizes), "seed": SEED}
    results["seconds"] = time.perf_counter() - started
    title = f"{'CPU, tiny sizes' if options.smoke else torch.cuda.get_device_name()}, {results['seconds']:.0f} s"
    rows = rows_of(results["stages"])
    finish(options.out.stem, title, ["stage", "what", "median (low to high)"], rows, results, options.out.parent)


if __name__ == "__main__":
    main()
