"""Runs as a report finds them, without training."""

import json

import numpy as np
import yaml

from prism_lightning.evaluation.results import TaskResult, write_result
from support.runs import BACKBONES


def make_run(folder, name, variant, seed=0, steps=10, width=32, loss=4.0, answers=None, data="f", path=None, **changed):
    """A finished run's files, without weights."""
    run = folder / name
    (run / "model").mkdir(parents=True)
    settings = {"backbone": BACKBONES["gpt2"] | {"n_embd": width}}
    settings |= {"num_prototypes": 64} if variant == "PrismLM" else {}
    settings |= changed
    config = {"seed_everything": seed, "model": {"class_path": variant, "init_args": settings}}
    config |= {"data": {"batch_size": 4, "block_size": 32, "path": path}, "trainer": {"max_steps": steps}}
    (run / "recipe.yaml").write_text(yaml.safe_dump(config))
    (run / "environment.json").write_text(json.dumps({"data_fingerprint": data}))
    facts = {"step": steps, "loss": loss, "perplexity": float(np.exp(loss)), "bits_per_byte": loss / 2}
    facts |= {"tokens_per_second": 900 if variant == "PrismLM" else 1000, "commit": "c0ffee<b>"}
    facts |= {"unexplained_variance": 0.1, "peak_memory_gib": 1.0} if variant == "PrismLM" else {}
    (run / "results.jsonl").write_text(json.dumps({"step": 1}) + "\n" + json.dumps(facts) + "\n")
    if answers is not None:
        mean = float(np.mean(answers))
        result = TaskResult("guess", "acc", 0.25, {"acc": mean}, {"acc": 0.05}, len(answers), 4, 0, 1.0, 1.0)
        rows = [{"doc_id": n, "doc_hash": n, "acc": answer} for n, answer in enumerate(answers)]
        write_result(run / "evaluation", result, rows)
    return run
