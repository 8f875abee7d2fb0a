"""Measure what an intervention costs during generation: milliseconds per token with scaled prototypes and without.

python -m benchmarks.interventions.speed --ckpt_path runs/quickstart

Generation is greedy with a key-value cache. The two conditions take turns; the first one changes from pair to pair.

Needs: a run with prototypes. Takes about two minutes with the quickstart's model on two CPU cores.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.common import Spread, finish
from benchmarks.interventions.timing import CONDITIONS, compare_generation
from prism_lightning.run.model_folder import load_exported


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt_path", type=Path, required=True, help="Run directory or exported model.")
    parser.add_argument("--prototypes", type=int, default=32, help="Number of scaled prototypes (default 32).")
    parser.add_argument(
        "--batches", type=int, nargs="+", default=[1, 16], help="Numbers of prompts continued at once (default 1 16)."
    )
    parser.add_argument("--new_tokens", type=int, default=64, help="New tokens of each prompt (default 64).")
    parser.add_argument("--repeats", type=int, default=60, help="Pairs of measurements of each batch (default 60).")
    parser.add_argument(
        "--out", type=Path, default=Path("benchmarks/results"), help="Folder of the JSON file (default %(default)s)."
    )
    options = parser.parse_args()
    model, _ = load_exported(options.ckpt_path, "auto")
    factors = dict.fromkeys(range(min(options.prototypes, model.config.num_prototypes)), 0.0)
    rows, results = [], {}
    for batch in options.batches:
        times = compare_generation(model, batch, factors, options.new_tokens, options.repeats)
        cells = [Spread.of(times[condition]).show(2) for condition in CONDITIONS]
        rows.append([str(batch), *cells, Spread.of(times["more_percent"]).show(1)])
        results[str(batch)] = times
    columns = ["prompts", "without, ms per token", "with, ms per token", "increase, %"]
    scaled = f"{len(factors)} of {model.config.num_prototypes} prototypes scaled"
    finish(
        "intervention_speed", f"Generation with {scaled}, {options.ckpt_path.name}", columns, rows, results, options.out
    )


if __name__ == "__main__":
    main()
