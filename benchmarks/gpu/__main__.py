"""Measure training, index build, queries and generation on one GPU.

python -m benchmarks.gpu --out results.json

Weights and tokens are random, since the work of training and of a forward pass does not depend on them. The time of a
query depends on the number of list entries that it reads, which the table shows next to the time.
With --smoke every stage runs at a tiny size on the CPU. It yields no meaningful numbers; it shows that everything runs.

Needs: one GPU with 80 GB, or --smoke. Takes less than nine minutes on one H100; with --smoke less than one minute on
two CPU cores.
"""

from __future__ import annotations

import argparse
import gc
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import Spread, finish
from benchmarks.gpu.stages import (
    FULL,
    SEED,
    SMOKE,
    TRAINED,
    Sizes,
    measure_generation,
    measure_index_build,
    measure_queries,
    measure_training,
    random_models,
)


def run_stages(sizes: Sizes, device: str) -> dict[str, Any]:
    """Run all stages in order and return their results by stage name."""
    results: dict[str, Any] = {}
    for name, recipe in TRAINED.items():
        _run_stage(results, f"training {name}", measure_training, recipe, sizes, device)
    models, block_size = random_models(sizes, device)
    with tempfile.TemporaryDirectory() as work:
        for dtype, model in models.items():
            folder = Path(work) / dtype
            folder.mkdir()
            _run_stage(results, f"index {dtype}", measure_index_build, model, block_size, sizes, folder)
            _run_stage(results, f"queries {dtype}", measure_queries, model, block_size, sizes, folder)
            _run_stage(results, f"generation {dtype}", measure_generation, model, sizes)
    return results


def _run_stage(results: dict[str, Any], name: str, stage: Callable[..., dict[str, Any]], *arguments: Any) -> None:
    """Run a stage and store its result and duration; a stage that runs out of memory stores that."""
    started = time.perf_counter()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try:
        results[name] = stage(*arguments)
    except torch.OutOfMemoryError as error:
        results[name] = {"out_of_memory": str(error).splitlines()[0]}
    results[name]["stage_seconds"] = time.perf_counter() - started
    print(f"{name}: {results[name]['stage_seconds']:.0f} s", file=sys.stderr, flush=True)


def table_rows(results: dict[str, Any]) -> list[list[str]]:
    """Return the rows of the printed table; a stage's name stands in its first row only."""
    cells_of = {"training": _training_cells, "index": _index_cells, "queries": _query_cells}
    rows = []
    for name, result in results.items():
        cells = cells_of.get(name.split()[0], _generation_cells)
        lines = [["out of memory", ""]] if "out_of_memory" in result else cells(result)
        rows += [[name if number == 0 else "", *line] for number, line in enumerate(lines)]
    return rows


def _training_cells(result: dict[str, Any]) -> list[list[str]]:
    lines = []
    for name in ("dense", "prism"):
        lines.append([f"{name}, tokens/s", Spread(**result[name]).show()])
        if result[f"{name}_mfu"] is not None:
            lines.append([f"{name}, MFU", Spread(**result[f"{name}_mfu"]).show(3)])
    return [*lines, ["PRISM / dense", Spread(**result["ratio"]).show(3)]]


def _index_cells(result: dict[str, Any]) -> list[list[str]]:
    return [
        ["shards, tokens/s", Spread(**result["build_tokens_per_second"]).show()],
        ["plain forward pass, tokens/s", Spread(**result["plain_tokens_per_second"]).show()],
        ["dictionary, s", f"{result['prepare_seconds']:.1f}"],
    ]


def _query_cells(result: dict[str, Any]) -> list[list[str]]:
    return [
        [
            f"{kind}, {'alone' if mode == 'alone' else 'each of ' + str(result[kind]['questions'])},"
            f" {result[kind]['entries_p50']:,.0f} list entries",
            f"{result[kind][mode]['p50_ms']:.2f}, p95 {result[kind][mode]['p95_ms']:.2f} ms",
        ]
        for kind in ("token", "sequence")
        for mode in ("alone", "of_all")
    ]


def _generation_cells(result: dict[str, Any]) -> list[list[str]]:
    labels = {
        "without": "unchanged, ms per token",
        "with": "scaled prototypes, ms per token",
        "more_percent": "increase, %",
    }
    return [
        [f"{batch} prompts, {label}", Spread(**result[batch][name]).show(2)]
        for batch in result
        if batch != "stage_seconds"
        for name, label in labels.items()
    ]


def main(arguments: list[str] | None = None) -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=Path("benchmarks/results/gpu.json"), help="JSON file (default %(default)s)."
    )
    parser.add_argument("--smoke", action="store_true", help="Run tiny sizes on the CPU.")
    options = parser.parse_args(arguments)
    if not (options.smoke or torch.cuda.is_available()):
        parser.error("torch can use no CUDA device: give --smoke to check that everything runs")
    started = time.perf_counter()
    sizes, device = (SMOKE, "cpu") if options.smoke else (FULL, "cuda")
    results: dict[str, Any] = {"stages": run_stages(sizes, device), "sizes": asdict(sizes), "seed": SEED}
    results["seconds"] = time.perf_counter() - started
    title = f"{'CPU, tiny sizes' if options.smoke else torch.cuda.get_device_name()}, {results['seconds']:.0f} s"
    rows = table_rows(results["stages"])
    finish(options.out.stem, title, ["stage", "measurement", "median (low to high)"], rows, results, options.out.parent)


if __name__ == "__main__":
    main()
