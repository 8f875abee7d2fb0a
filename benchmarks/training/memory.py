"""Peak memory of the prototype layer, forward and backward: measured, and calculated for the full size.

python -m benchmarks.training.memory

Each case runs in a process of its own, whose peak resident size is compared with a process that only holds the
inputs. The layer must grow as (tokens + prototypes) x width, never as tokens x prototypes.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.common import finish
from prism_lightning.models.prototypes import SEARCH_CHUNK_BYTES, PrototypeLayer

CASES = [(8192, 2048, 256), (8192, 16384, 256), (32768, 2048, 256), (32768, 16384, 256)]
FULL_SIZE = (32768, 16384, 1600)  # 1.6B parameters: 32k tokens in one forward pass, K, D
# Whole fp32 copies of z and of P alive at the peak, fitted: with these and one search block the two largest cases
# come out within 5 % of the measurement, the smaller ones too high.
COPIES = 5


def predicted(tokens: int, prototypes: int, width: int) -> float:
    """MiB by calculation: whole copies of z and P, and one search block."""
    return (4 * COPIES * (tokens + prototypes) * width + SEARCH_CHUNK_BYTES) / 2**20


def child(tokens: int, prototypes: int, width: int, run: bool) -> None:
    """Print the peak resident size in MiB of a process that holds the inputs, or also runs the layer."""
    torch.manual_seed(0)
    warm = PrototypeLayer(64, width, 4)
    for layer, z in ((warm, torch.randn(128, width)), (None, torch.randn(tokens, width))):
        z.requires_grad_()
        layer = layer or PrototypeLayer(prototypes, width, 4)
        if run or layer is warm:
            _, terms = layer(z, commitment=1.0)
            (terms.reconstruction + terms.prototype_to_token + terms.token_to_prototype).backward()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def peak(case: tuple[int, int, int], run: bool) -> float:
    """Peak of one child process."""
    arguments = [*map(str, case), str(int(run))]
    command = [sys.executable, "-m", "benchmarks.training.memory", "--child", *arguments]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder of the JSON file")
    parser.add_argument("--child", nargs=4, type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        tokens, prototypes, width, run = options.child
        child(tokens, prototypes, width, bool(run))
        return
    rows, results = [], []
    for case in CASES:
        measured = peak(case, run=True) - peak(case, run=False)
        whole = 4 * case[0] * case[1] / 2**20
        results.append(
            {"case": case, "measured_mib": measured, "calculated_mib": predicted(*case), "one_N_by_K_mib": whole}
        )
        rows.append([*(f"{n:,}" for n in case), f"{measured:,.0f}", f"{predicted(*case):,.0f}", f"{whole:,.0f}"])
    full = {
        "case": FULL_SIZE,
        "calculated_mib": predicted(*FULL_SIZE),
        "one_N_by_K_mib": 4 * FULL_SIZE[0] * FULL_SIZE[1] / 2**20,
    }
    rows.append(
        [*(f"{n:,}" for n in FULL_SIZE), "", f"{full['calculated_mib']:,.0f}", f"{full['one_N_by_K_mib']:,.0f}"]
    )
    columns = ["tokens", "prototypes", "width", "measured MiB", "calculated MiB", "a single [N, K] matrix, MiB"]
    finish(
        "memory",
        "Peak memory of the prototype layer, forward and backward",
        columns,
        rows,
        [*results, full],
        options.out,
    )


if __name__ == "__main__":
    main()
