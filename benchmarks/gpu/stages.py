"""The stages of the GPU benchmark: training, index build, queries and generation."""

from __future__ import annotations

import time
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from benchmarks.common import Spread
from benchmarks.index.query_process import spread, timed
from benchmarks.index.speed import build_pairs, quiet
from benchmarks.interventions.timing import CONDITIONS, compare_generation
from benchmarks.training.trainee import Trainee
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
GPUS = 8  # share the recipes' batch: on one GPU an optimiser step has an eighth of the micro-batches
SCALED_PROTOTYPES = 32  # of the intervention
SEED = 0
TINY_MODEL = [
    *("model.backbone.n_layer=1", "model.backbone.n_embd=32", "model.backbone.n_head=2", "model.num_prototypes=64"),
    *("model.backbone.vocab_size=300", "data.block_size=32", "data.micro_batch_size=2", "data.batch_size=32"),
]


@dataclass
class Sizes:
    """Amount of work in each stage.

    Attributes:
        overrides: Overrides of the recipes.
        pairs, seconds: Largest number of pairs of a training comparison, and seconds after which no other pair begins.
        index_tokens, shard_tokens, fit_steps: Settings of the index.
        questions, sequence: Number of questions, and tokens of each sequence that is asked about.
        batches, new_tokens, repeats: Settings of generation.
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
SMOKE = Sizes(TINY_MODEL, 2, 2.0, 2**12, 2**11, 2, 4, 16, (1, 2), 4, 2)


class RandomStore(TokenStore):
    """Random tokens with the uneven frequencies of words, as a store without files; its tokenizer has a word for each.

    The frequency of token v is proportional to 1 / (v + 10).
    """

    def __init__(self, tokens: int, block_size: int, vocabulary: int, folder: Path) -> None:
        self.folder, self.split, self.block_size = folder, "train", block_size
        self.manifest, self.counts = {"fingerprint": "random"}, {"tokens": tokens + 1, "documents": 1}
        cumulative_V = np.cumsum(1 / np.arange(10, vocabulary + 10))
        uniform_N = np.random.default_rng(SEED).random(tokens + 1) * cumulative_V[-1]
        self.tokens = np.searchsorted(cumulative_V, uniform_N).astype(np.uint32)
        words = Tokenizer(WordLevel({str(token): token for token in range(vocabulary)}, unk_token="0"))
        self.tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)


def configuration(recipe: str, overrides: list[str]) -> tuple[PrismConfig, dict[str, Any]]:
    """Return the model configuration of a recipe and its data settings."""
    settings = compose(RECIPES / recipe, overrides)
    model = settings["model"]["init_args"]
    names = ("num_prototypes", "active_prototypes")
    return PrismConfig(backbone_config=model["backbone"], **{n: model[n] for n in names}), settings["data"]


def measure_training(recipe: str, sizes: Sizes, device: str) -> dict[str, Any]:
    """Return tokens per second and MFU of a recipe's model with and without its prototypes, measured in turns.

    One decoder with one optimiser serves both variants, since 80 GB do not hold two of 1.6B parameters. MFU (model
    FLOPs utilisation) is the share of the device's peak; it is None if the peak is not known.
    """
    config, data = configuration(recipe, sizes.overrides)
    tokens = (data["micro_batch_size"], data["block_size"])
    trainee = Trainee(config, tokens, device, max(1, data["batch_size"] // data["micro_batch_size"] // GPUS))
    prototypes = trainee.model.prototypes
    pairs: list[tuple[float, float]] = []

    def rate(prism: bool) -> float:
        trainee.model.prototypes = prototypes if prism else None
        return trainee.rate(1)

    rate(False), rate(True)  # warm up
    started = time.perf_counter()
    while len(pairs) < sizes.pairs and (not pairs or time.perf_counter() - started < sizes.seconds):
        pairs.append((rate(False), rate(True)))
    flops = flops_per_token(trainee.model.matrix_parameters, config.get_text_config(), tokens[1])
    peak = peak_flops(torch.cuda.get_device_name()) if device == "cuda" else None
    result: dict[str, Any] = {"micro_batch": tokens, "accumulation": trainee.accumulation, "flops_per_token": flops}
    result |= {"parameters": sum(p.numel() for p in trainee.model.parameters()), "pairs": len(pairs)}
    for name, rates in (("dense", [dense for dense, _ in pairs]), ("prism", [prism for _, prism in pairs])):
        result[name] = asdict(Spread.of(rates))
        result[f"{name}_mfu"] = None if peak is None else asdict(Spread.of([rate * flops / peak for rate in rates]))
    result["ratio"] = asdict(Spread.of([prism / dense for dense, prism in pairs]))
    if device == "cuda":
        result["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return result


def random_models(sizes: Sizes, device: str) -> tuple[dict[str, PrismForCausalLM], int]:
    """Return the 130M model with random weights, by the type of its decoder's weights, and the block size."""
    config, data = configuration(TRAINED["130M"], sizes.overrides)
    torch.manual_seed(SEED)
    with torch.device(device):
        model: PrismForCausalLM = PrismForCausalLM(config).eval()
    narrow = deepcopy(model)
    narrow.narrow_decoder(torch.bfloat16, "random")
    return {"fp32": model, "bf16": narrow}, data["block_size"]


def measure_index_build(model: PrismForCausalLM, block_size: int, sizes: Sizes, folder: Path) -> dict[str, Any]:
    """Return tokens per second of an index's shards and of a plain forward pass, and the dictionary's seconds."""
    store = RandomStore(sizes.index_tokens, block_size, model.config.vocab_size, folder)
    settings = IndexSettings(shard_tokens=sizes.shard_tokens, fit_steps=sizes.fit_steps)
    return build_pairs(model, store, folder / "index", settings)


def measure_queries(model: PrismForCausalLM, block_size: int, sizes: Sizes, folder: Path) -> dict[str, Any]:
    """Return the times of questions about one token and about a sequence: one question alone, and each of many.

    A question starts from token ids; its time includes the forward pass and the selection of the top 100.
    """
    store = RandomStore(sizes.index_tokens, block_size, model.config.vocab_size, folder)
    settings = IndexSettings(shard_tokens=sizes.shard_tokens, fit_steps=sizes.fit_steps)
    Builder(model, store, settings, folder / "index", quiet).build()  # merges the shards of `measure_index_build`
    index = open_index(folder / "index", verify=False)
    attributor = Attributor(model, store.tokenizer, index, store, top=100)
    texts = [store[number % len(store)]["input_ids"][: sizes.sequence].tolist() for number in range(sizes.questions)]
    result: dict[str, Any] = {"tokens": index.tokens, "prototypes": index.num_prototypes}
    for kind, first_token in (("token", len(texts[0]) - 1), ("sequence", 1)):
        result[kind] = _time_questions(attributor, texts, first_token)
    return result


def _time_questions(attributor: Attributor, texts: list[list[int]], first_token: int) -> dict[str, Any]:
    """Return list entries and milliseconds of the questions about each text's tokens from `first_token` on."""

    def answer(number: int) -> None:
        query = attributor.query_tokens(texts[number], first_token)
        attributor.hits(query, slice(0, len(query.positions)))[1].strongest(100)

    def answer_all(_: int) -> None:
        for number in range(len(texts)):
            answer(number)

    queries = [attributor.query_tokens(text, first_token) for text in texts]
    entries = [
        attributor.index.entries_read(attributor.query(query, slice(0, len(query.positions)))) for query in queries
    ]
    together = [milliseconds / len(texts) for milliseconds in timed(answer_all, 1)]
    return {
        "entries_p50": float(np.median(entries)),
        "alone": spread(timed(answer, len(texts))),
        "of_all": spread(together),
        "questions": len(texts),
    }


def measure_generation(model: PrismForCausalLM, sizes: Sizes) -> dict[str, Any]:
    """Return milliseconds per token for each batch size, with factors on some prototypes and without, in turns."""
    factors = dict.fromkeys(range(min(SCALED_PROTOTYPES, model.config.num_prototypes)), 0.0)
    result = {}
    for batch in sizes.batches:
        times = compare_generation(model, batch, factors, sizes.new_tokens, sizes.repeats, sizes.seconds / 4)
        result[str(batch)] = {name: asdict(Spread.of(times[name])) for name in (*CONDITIONS, "more_percent")}
    return result
