"""How fast suites are evaluated, and how much of the time goes to anything but the model.

python -m benchmarks.evaluation.speed --ckpt_path runs/quickstart --data_dir downloaded

Tasks take turns, repeat by repeat; data are read and prompts built before. The share outside the model is what the
harness and the bridge take for tokenising, batching, metrics and standard errors.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.common import Spread, finish
from prism_lightning.evaluation.evaluator import run_task
from prism_lightning.evaluation.harness import PrismHarnessModel
from prism_lightning.evaluation.suites import load_suites
from prism_lightning.evaluation.tasks import build_tasks
from prism_lightning.run.directory import RunPaths
from prism_lightning.run.model_folder import load_exported
from prism_lightning.run.training_data import data_of


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt_path", type=Path, required=True)
    parser.add_argument("--suites", nargs="+", type=Path, default=sorted(Path("evals").glob("*.yaml")))
    parser.add_argument("--data_dir", type=Path, help="folder with TASK/SPLIT.jsonl (default: the hub)")
    parser.add_argument("--limit", type=int, default=200, help="documents of each task")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    model, tokenizer = load_exported(options.ckpt_path, "auto")
    store = data_of(RunPaths.of(options.ckpt_path).root).validation
    bridge = PrismHarnessModel(model=model, tokenizer=tokenizer)
    suites = load_suites(options.suites)
    tasks = build_tasks(suites, options.data_dir, store.texts)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in suites}
    for repeat in range(options.repeats + 1):
        for name, settings in suites.items():
            with tempfile.TemporaryDirectory() as folder:
                one = run_task(bridge, name, settings, tasks[name], Path(folder), {}, options.limit)
            if repeat:  # the first warms up
                facts = {"seconds": one.seconds, "outside": 1 - one.model_seconds / one.seconds}
                found[name].append(facts | {"documents": one.documents, "requests": one.requests})
    rows = [row(name, repeats) for name, repeats in found.items()]
    columns = ["task", "documents", "requests", "documents/s", "outside the model, %"]
    title = f"Evaluating {options.ckpt_path.name}, up to {options.limit} documents a task"
    finish("evaluation_speed", title, columns, rows, found, options.out)


def row(name: str, repeats: list[dict[str, Any]]) -> list[str]:
    """A task's line."""
    speed = Spread.of([one["documents"] / one["seconds"] for one in repeats])
    outside = Spread.of([100 * one["outside"] for one in repeats])
    return [name, str(repeats[0]["documents"]), str(repeats[0]["requests"]), speed.show(1), outside.show(1)]


if __name__ == "__main__":
    main()
