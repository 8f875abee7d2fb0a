"""What an intervention costs while generating: milliseconds a token with factors on prototypes and without.

python -m benchmarks.interventions.speed --ckpt_path runs/quickstart

Both take turns, each first in every other repeat, greedily, with a key-value cache, for as many tokens.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import torch

from benchmarks.common import Spread, finish
from prism_lightning.models import PrismForCausalLM
from prism_lightning.models.steering import Scaling
from prism_lightning.run.model_folder import load_exported

TURNS = ("without", "with")


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
        found = turns(model, batch, factors, options.new_tokens, options.repeats)
        rows.append(
            [str(batch), *(Spread.of(found[n]).show(2) for n in TURNS), Spread.of(found["more_percent"]).show(1)]
        )
        results[str(batch)] = found
    columns = ["prompts", "ms a token without", "with", "more, %"]
    title = (
        f"Generating with {len(factors)} of {model.config.num_prototypes} prototypes scaled, {options.ckpt_path.name}"
    )
    finish("intervention_speed", title, columns, rows, results, options.out)


def turns(
    model: PrismForCausalLM,
    batch: int,
    factors: dict[int, float],
    new_tokens: int,
    repeats: int,
    seconds: float = math.inf,
) -> dict[str, list[float]]:
    """Milliseconds a token `without` and `with` factors, pair by pair, and by how much more that is.

    Args:
        model: a PRISM model, on its device.
        batch: prompts of 16 random tokens continued at once.
        factors: on prototypes.
        new_tokens: of each.
        repeats: pairs; fewer, but one at least, where they take longer than `seconds`.
    """
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(0, model.config.vocab_size, (batch, 16), generator=generator).to(model.device)
    times: dict[str, list[float]] = {name: [] for name in TURNS}
    started = time.perf_counter()
    for repeat in range(repeats + 1):
        if repeat > 1 and time.perf_counter() - started > seconds:
            break
        for name in TURNS if repeat % 2 else TURNS[::-1]:
            model.intervene(Scaling(factors if name == "with" else {}))
            took = milliseconds(model, prompts, new_tokens)
            if repeat:  # the first warms up
                times[name].append(took)
    model.intervene()
    more = [100 * (with_ / without - 1) for without, with_ in zip(*times.values(), strict=True)]
    return times | {"more_percent": more}


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
