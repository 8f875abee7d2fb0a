"""What an intervention costs while generating: milliseconds a token with factors on prototypes and without.

python -m benchmarks.intervention_speed --ckpt_path runs/quickstart

Both take turns, each first in every other repeat, greedily, with a key-value cache, for as many tokens.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

from benchmarks.report import Spread, finish
from prism_lightning.exported import load_exported
from prism_lightning.models import PrismForCausalLM
from prism_lightning.models.steering import Scaling


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt_path", type=Path, required=True)
    parser.add_argument("--prototypes", type=int, default=32, help="with a factor")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16], help="prompts continued at once")
    parser.add_argument("--new_tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=60)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    model, _ = load_exported(options.ckpt_path, "auto")
    factors = dict.fromkeys(range(min(options.prototypes, model.config.num_prototypes)), 0.0)
    rows, results = [], {}
    for batch in options.batches:
        generator = torch.Generator().manual_seed(0)
        prompts = torch.randint(0, model.config.vocab_size, (batch, 16), generator=generator).to(model.device)
        times: dict[str, list[float]] = {"without": [], "with": []}
        for repeat in range(options.repeats + 1):
            turns = [("without", {}), ("with", factors)]
            for name, given in turns if repeat % 2 else turns[::-1]:
                model.intervene(Scaling(given))
                took = milliseconds(model, prompts, options.new_tokens)
                if repeat:  # the first warms up
                    times[name].append(took)
        ratios = [100 * (with_ / without - 1) for with_, without in zip(times["with"], times["without"], strict=True)]
        rows.append([str(batch), *(Spread.of(times[name]).show(2) for name in times), Spread.of(ratios).show(1)])
        results[str(batch)] = times | {"more_percent": ratios}
    columns = ["prompts", "ms a token without", "with", "more, %"]
    title = (
        f"Generating with {len(factors)} of {model.config.num_prototypes} prototypes scaled, {options.ckpt_path.name}"
    )
    finish("intervention_speed", title, columns, rows, results, options.out)


def milliseconds(model: PrismForCausalLM, prompts: torch.Tensor, new_tokens: int) -> float:
    """A token's time."""
    started = time.perf_counter()
    model.generate(  # type: ignore[misc]
        prompts,
        attention_mask=torch.ones_like(prompts),
        do_sample=False,
        min_new_tokens=new_tokens,
        max_new_tokens=new_tokens,
    )
    if prompts.is_cuda:
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - started) / new_tokens


if __name__ == "__main__":
    main()
