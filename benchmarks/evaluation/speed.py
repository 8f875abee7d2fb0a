"""Measure the speed of evaluation, and the share of the time that is spent outside the model.

python -m benchmarks.evaluation.speed --ckpt_path runs/quickstart --data_dir downloaded

The tasks take turns, repeat by repeat. Data are read and prompts built before the measurement. The time outside the
model goes to tokenisation, batching, metrics and standard errors in the harness and in its bridge to the model.

Needs: a run, and the tasks' data in --data_dir or a connection to the Hugging Face hub. Takes about two minutes with
the quickstart's model on two CPU cores.
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

COLUMNS = ["task", "documents", "requests", "documents/s", "outside the model, %"]


def main() -> None:
    """Measure, print and write."""
    options = parse_options()
    repeats_by_task = measure(options)
    rows = [table_row(task, repeats) for task, repeats in repeats_by_task.items()]
    title = f"Evaluation of {options.ckpt_path.name}, up to {options.limit} documents of each task"
    finish("evaluation_speed", title, COLUMNS, rows, repeats_by_task, options.out)


def parse_options() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt_path", type=Path, required=True, help="Run directory with a model and its data.")
    parser.add_argument(
        "--suites",
        nargs="+",
        type=Path,
        default=sorted(Path("evals").glob("*.yaml")),
        help="Suite files (default: evals/*.yaml).",
    )
    parser.add_argument("--data_dir", type=Path, help="Folder with TASK/SPLIT.jsonl (default: the Hugging Face hub).")
    parser.add_argument(
        "--limit", type=int, default=200, help="Largest number of documents of each task (default 200)."
    )
    parser.add_argument("--repeats", type=int, default=5, help="Measurements of each task (default 5).")
    parser.add_argument(
        "--out", type=Path, default=Path("benchmarks/results"), help="Folder of the JSON file (default %(default)s)."
    )
    return parser.parse_args()


def measure(options: argparse.Namespace) -> dict[str, list[dict[str, float]]]:
    """Return the measurements of every task: seconds, share outside the model, documents and requests."""
    model, tokenizer = load_exported(options.ckpt_path, "auto")
    store = data_of(RunPaths.of(options.ckpt_path).root).validation
    bridge = PrismHarnessModel(model=model, tokenizer=tokenizer)
    suites = load_suites(options.suites)
    tasks = build_tasks(suites, options.data_dir, store.texts)
    repeats_by_task: dict[str, list[dict[str, float]]] = {name: [] for name in suites}
    for repeat in range(options.repeats + 1):
        for name, settings in suites.items():
            with tempfile.TemporaryDirectory() as folder:
                result = run_task(bridge, name, settings, tasks[name], Path(folder), {}, options.limit)
            if repeat:  # the first one warms up
                facts = {"seconds": result.seconds, "outside": 1 - result.model_seconds / result.seconds}
                repeats_by_task[name].append(facts | {"documents": result.documents, "requests": result.requests})
    return repeats_by_task


def table_row(task: str, repeats: list[dict[str, Any]]) -> list[str]:
    """Return a task's row of the table."""
    speed = Spread.of([repeat["documents"] / repeat["seconds"] for repeat in repeats])
    outside = Spread.of([100 * repeat["outside"] for repeat in repeats])
    return [task, str(repeats[0]["documents"]), str(repeats[0]["requests"]), speed.show(1), outside.show(1)]


if __name__ == "__main__":
    main()
