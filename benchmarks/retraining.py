"""Train a small PRISM model on random halves of a corpus, so that attributions can be held against retraining.

python -m benchmarks.retraining --path stories.jsonl --out runs/retraining

Trains one model on all documents and `--halves` models on random halves of them, each by `fit`, then writes the loss of
every query document under every model to `losses.safetensors`. Interrupted, the same command goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from rich.progress import track
from safetensors.torch import save_file

from prism_lightning.exported import load_exported
from prism_lightning.models import PrismForCausalLM

RECIPE = Path(__file__).with_name("retraining.yaml")
STEPS = 640  # of the model on all documents; a model on half of them takes half as many, so the same passes


def prepare_corpus(path: Path, out: Path, documents: int, queries: int, characters: int) -> None:
    """Write the first documents of a jsonl file, each cut to its first characters, and after them the queries."""
    out.mkdir(parents=True, exist_ok=True)
    with path.open() as file:
        texts = [json.loads(line)["text"][:characters] for line in islice(file, documents + queries)]
    for name, part in {"train": texts[:documents], "queries": texts[documents:]}.items():
        (out / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in part))


def halves(documents: int, count: int, seed: int) -> np.ndarray:
    """[count, documents] booleans: random halves of the documents."""
    generator = np.random.default_rng(seed)
    included = np.zeros((count, documents), dtype=bool)
    for row in included:
        row[generator.permutation(documents)[: documents // 2]] = True
    return included


def fit(run: Path, train: Path, queries: Path, steps: int, seed: int, tokenizer: Path | None) -> None:
    """Train one model with the product's own `fit`, on one thread; a finished run is left as it is."""
    command = [sys.executable, "-m", "prism_lightning", "fit", "--config", str(RECIPE), "--run.dir", str(run)]
    command += ["--data.path", str(train), "--data.validation_path", str(queries), "--seed_everything", str(seed)]
    command += ["--trainer.max_steps", str(steps), "--data.cache_dir", str(run.parent / "cache")]
    command += ["--data.tokenizer", str(tokenizer)] if tokenizer else []
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})


@torch.no_grad()
def losses_of(model: PrismForCausalLM, queries: list[list[int]]) -> torch.Tensor:
    """Summed loss in nats of every query document, as far as it fits into the context."""
    losses = []
    for query in queries:
        ids_T = torch.tensor(query[: model.config.context_length + 1])
        logits_TV = model(ids_T[None, :-1]).logits[0]
        losses.append(torch.nn.functional.cross_entropy(logits_TV.float(), ids_T[1:], reduction="sum"))
    return torch.stack(losses)


def main() -> None:
    """Train all models and write the losses."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--path", type=Path, required=True, help='jsonl file of {"text": ...} lines')
    parser.add_argument("--out", type=Path, default=Path("runs/retraining"), help="folder of the models and losses")
    parser.add_argument("--documents", type=int, default=1000, help="documents to train on (default 1000)")
    parser.add_argument("--queries", type=int, default=60, help="held-out documents to ask about (default 60)")
    parser.add_argument("--characters", type=int, default=400, help="of each document (default 400)")
    parser.add_argument("--halves", type=int, default=40, help="models to retrain (default 40)")
    parser.add_argument("--jobs", type=int, default=2, help="models trained at once, one thread each (default 2)")
    parser.add_argument("--seed", type=int, default=0, help="of the halves and of training (default 0)")
    options = parser.parse_args()
    out: Path = options.out
    prepare_corpus(options.path, out, options.documents, options.queries, options.characters)
    lines = (out / "train.jsonl").read_text().splitlines(keepends=True)
    included = halves(len(lines), options.halves, options.seed)
    queries_path = out / "queries.jsonl"
    fit(out / "whole", out / "train.jsonl", queries_path, STEPS, options.seed, None)

    def retrain(number: int) -> None:
        part = out / f"half-{number:03d}.jsonl"
        part.write_text("".join(line for line, kept in zip(lines, included[number], strict=True) if kept))
        fit(out / part.stem, part, queries_path, STEPS // 2, options.seed, out / "whole" / "model")

    with ThreadPoolExecutor(options.jobs) as pool:
        list(track(pool.map(retrain, range(options.halves)), "retraining", total=options.halves))
    whole, tokenizer = load_exported(out / "whole")
    queries = [tokenizer(json.loads(line)["text"])["input_ids"] for line in queries_path.open()]
    models = (load_exported(out / f"half-{number:03d}")[0] for number in range(options.halves))
    losses = torch.stack([losses_of(model, queries) for model in models])
    tensors = {"included": torch.from_numpy(included), "losses": losses, "whole": losses_of(whole, queries)}
    save_file(tensors, out / "losses.safetensors")
    print(f"wrote {out / 'losses.safetensors'}")


if __name__ == "__main__":
    main()
