"""Tokens per second of PRISM against its dense twin, in one interleaved run at three sizes; and of the loader alone.

python -m benchmarks.training.throughput
"""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import Spread, finish
from prism_lightning.lightning_modules.optimizer import parameter_groups
from prism_lightning.lightning_modules.prism import PROTOTYPE_GRADIENT_SCALE
from prism_lightning.lightning_modules.text_data import TextData
from prism_lightning.models import PrismConfig, PrismForCausalLM

# Layers, width, heads, prototypes; the first is the quickstart's.
CPU_SIZES = [(4, 128, 4, 2048), (6, 256, 8, 4096), (8, 384, 8, 8192)]
GPU_SIZES = [(12, 768, 12, 8192), (24, 1024, 16, 8192), (48, 1600, 25, 16384)]


def gpt2(size: tuple[int, int, int, int], prism: bool, context: int, vocab: int) -> PrismConfig:
    """The configuration of a size."""
    layers, width, heads, prototypes = size
    backbone = {"model_type": "gpt2", "n_layer": layers, "n_embd": width, "n_head": heads, "vocab_size": vocab}
    backbone |= {"n_positions": context, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return PrismConfig(backbone_config=backbone, num_prototypes=prototypes if prism else 0)


class Trainee:
    """A model with its optimiser, stepped on random tokens: what is computed does not depend on which they are.

    Args:
        config: of the model.
        tokens: blocks of a micro-batch, and their length.
        device: cpu or cuda.
        accumulation: micro-batches of an optimiser step.
    """

    def __init__(self, config: PrismConfig, tokens: tuple[int, int], device: str, accumulation: int = 1) -> None:
        torch.manual_seed(0)
        with torch.device(device):  # 1.6 B weights are drawn in a second there
            self.model: PrismForCausalLM = PrismForCausalLM(config)
            self.ids = torch.randint(config.vocab_size, tokens)
        groups = parameter_groups(self.model, 1e-3, 1e-2, 0.1)
        self.optimizer = torch.optim.AdamW(groups, fused=device != "cuda")  # as `fit` has it in mixed precision
        self.device, self.accumulation = device, accumulation

    def step(self) -> None:
        """One optimiser step, with the settings `fit` uses."""
        for _ in range(self.accumulation):
            with torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cuda"):
                result = self.model.objective(self.ids, self.ids, prototype_gradient_scale=PROTOTYPE_GRADIENT_SCALE)
            (result.loss / self.accumulation).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def rate(self, steps: int) -> float:
        """Tokens per second over some steps."""
        started = time.perf_counter()
        for _ in range(steps):
            self.step()
        if self.device == "cuda":
            torch.cuda.synchronize()
        return steps * self.accumulation * self.ids.numel() / (time.perf_counter() - started)


def compare(size: tuple[int, int, int, int], repeats: int, steps: int, device: str) -> dict[str, Any]:
    """Rates of both twins, taken in turn, and their ratio pair by pair."""
    tokens, vocab = ((8, 256), 4096) if device == "cpu" else ((16, 1024), 50304)
    dense, prism = (Trainee(gpt2(size, kind, tokens[1], vocab), tokens, device) for kind in (False, True))
    for trainee in (dense, prism):
        trainee.rate(2)
    pairs = [(dense.rate(steps), prism.rate(steps)) for _ in range(repeats)]
    return {
        "size": size,
        "tokens_per_step": tokens[0] * tokens[1],
        "dense": asdict(Spread.of([d for d, _ in pairs])),
        "prism": asdict(Spread.of([p for _, p in pairs])),
        "ratio": asdict(Spread.of([p / d for d, p in pairs])),
    }


def loader_rate(repeats: int) -> dict[str, float]:
    """Tokens per second of the loader alone, over one epoch of the quickstart corpus."""
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
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7, help="interleaved pairs per size (default 7)")
    parser.add_argument("--steps", type=int, default=4, help="optimiser steps per measurement (default 4)")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder of the JSON file")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    results = []
    for size in GPU_SIZES if device == "cuda" else CPU_SIZES:
        results.append(compare(size, options.repeats, options.steps, device))
        print(f"measured {size}", flush=True)
    loader = loader_rate(options.repeats)
    rows = [
        [
            "{} x {}, {} heads, K {:,}".format(*r["size"]),
            Spread(**r["dense"]).show(),
            Spread(**r["prism"]).show(),
            Spread(**r["ratio"]).show(3),
        ]
        for r in results
    ]
    times = loader["median"] / results[0]["prism"]["median"]
    rows.append(["loader alone", Spread(**loader).show(), "", f"{times:,.0f} x the first PRISM model's rate"])
    columns = ["layers x width", "dense tokens/s", "PRISM tokens/s", "PRISM / dense"]
    finish(
        "training", f"Training throughput on {device}", columns, rows, {"sizes": results, "loader": loader}, options.out
    )


if __name__ == "__main__":
    main()
