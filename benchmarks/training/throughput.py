"""Measure training throughput: PRISM models against their dense twins at three sizes, and the data loader alone.

python -m benchmarks.training.throughput

The twins take turns within one process. Weights and tokens are random, with seed 0. The loader reads the quickstart
corpus, which is prepared on the first run. On a GPU the sizes are larger than on a CPU.

Needs: about 4 GiB of memory on a CPU. On a GPU the largest comparison holds two models of 1.6B parameters and their
optimisers, which 80 GB do not hold. Takes about three minutes on two CPU cores.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import Spread, finish
from benchmarks.training.trainee import Trainee
from prism_lightning.lightning_modules.text_data import TextData
from prism_lightning.models import PrismConfig

# Layers, width, heads, prototypes; the first size is the quickstart's.
CPU_SIZES = [(4, 128, 4, 2048), (6, 256, 8, 4096), (8, 384, 8, 8192)]
GPU_SIZES = [(12, 768, 12, 8192), (24, 1024, 16, 8192), (48, 1600, 25, 16384)]


def gpt2_config(size: tuple[int, int, int, int], prism: bool, context: int, vocab: int) -> PrismConfig:
    """Return the configuration of a GPT-2 model of a size, with or without prototypes."""
    layers, width, heads, prototypes = size
    backbone = {"model_type": "gpt2", "n_layer": layers, "n_embd": width, "n_head": heads, "vocab_size": vocab}
    backbone |= {"n_positions": context, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return PrismConfig(backbone_config=backbone, num_prototypes=prototypes if prism else 0)


def compare_twins(size: tuple[int, int, int, int], repeats: int, steps: int, device: str) -> dict[str, Any]:
    """Return the rates of both twins, measured in turns, and the ratio of each pair."""
    tokens, vocab = ((8, 256), 4096) if device == "cpu" else ((16, 1024), 50304)
    dense, prism = (Trainee(gpt2_config(size, kind, tokens[1], vocab), tokens, device) for kind in (False, True))
    for trainee in (dense, prism):
        trainee.rate(2)
    pairs = [(dense.rate(steps), prism.rate(steps)) for _ in range(repeats)]
    return {
        "size": size,
        "tokens_per_step": tokens[0] * tokens[1],
        "dense": asdict(Spread.of([dense_rate for dense_rate, _ in pairs])),
        "prism": asdict(Spread.of([prism_rate for _, prism_rate in pairs])),
        "ratio": asdict(Spread.of([prism_rate / dense_rate for dense_rate, prism_rate in pairs])),
    }


def loader_rate(repeats: int) -> dict[str, float]:
    """Return the tokens per second of the data loader alone, over one epoch of the quickstart corpus."""
    data = TextData()
    data.setup()
    rates = []
    for _ in range(repeats):
        started = time.perf_counter()
        tokens = sum(batch["input_ids"].numel() for batch in data.train_dataloader())
        rates.append(tokens / (time.perf_counter() - started))
    return asdict(Spread.of(rates))


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7, help="Pairs of measurements of each size (default 7).")
    parser.add_argument("--steps", type=int, default=4, help="Optimiser steps of each measurement (default 4).")
    parser.add_argument(
        "--out", type=Path, default=Path("benchmarks/results"), help="Folder of the JSON file (default %(default)s)."
    )
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    results = []
    for size in GPU_SIZES if device == "cuda" else CPU_SIZES:
        results.append(compare_twins(size, options.repeats, options.steps, device))
        print(f"measured {size}", flush=True)
    loader = loader_rate(options.repeats)
    rows = [
        [
            "{} x {}, {} heads, K {:,}".format(*result["size"]),
            Spread(**result["dense"]).show(),
            Spread(**result["prism"]).show(),
            Spread(**result["ratio"]).show(3),
        ]
        for result in results
    ]
    loader_over_model = loader["median"] / results[0]["prism"]["median"]
    rows.append(
        ["loader alone", Spread(**loader).show(), "", f"{loader_over_model:,.0f} x the rate of the first PRISM model"]
    )
    columns = ["layers x width", "dense, tokens/s", "PRISM, tokens/s", "PRISM / dense"]
    title = f"Training throughput on {device}"
    finish("training", title, columns, rows, {"sizes": results, "loader": loader}, options.out)


if __name__ == "__main__":
    main()
