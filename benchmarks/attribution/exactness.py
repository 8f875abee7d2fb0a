"""Effect of the index's separable curvature: a comparison with the whole Gauss-Newton matrix of the same prototypes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file

from benchmarks.attribution.config import Settings, digest
from benchmarks.attribution.corpus import open_corpus
from benchmarks.attribution.lds import bootstrap, predictions, rank_correlation
from benchmarks.attribution.methods.exact import ExactPrototypes
from benchmarks.attribution.methods.prototypes import Prototypes
from benchmarks.attribution.pool import run_all
from benchmarks.attribution.scoring import task_of, truth
from benchmarks.attribution.task import Queries
from prism_lightning.common.files import write_file

DICTIONARIES: dict[str, dict[str, Any]] = {
    "own": {"dictionary": "model"},
    "fitted, 1 per 32 tokens, k 3": {"tokens_per_prototype": 32, "active": 3},
}


def _solve(run: Settings, name: str, path: Path) -> None:
    assert run.quality is not None
    corpus = open_corpus(run)
    task = task_of(run, corpus, run.training.commitments[0], run.corpus.sizes[0], 0)
    queries = Queries.of_sequences(corpus.queries_QL[: run.quality.exact_queries])
    state = path.with_suffix(".state")
    settings = {"fit_steps": run.quality.fit_steps} | DICTIONARIES[name]
    exact = ExactPrototypes(task, state, precision="fp32", **settings)
    exact.fit()
    exact.open()
    separable = Prototypes(task, state, space="hidden", precision="fp32", **settings)
    separable.open()
    scores = {"exact": exact.scores(queries).numpy(), "index": separable.scores(queries).numpy()}
    shutil.rmtree(state)
    write_file(path, scores, steps=max(exact.steps))


def compared(run: Settings) -> list[dict[str, Any]]:
    """Return the LDS of both on the smallest corpus, and their rank correlation."""
    assert run.quality is not None
    folder, size, main = run.folder / "exact", run.corpus.sizes[0], run.training.commitments[0]
    folder.mkdir(parents=True, exist_ok=True)
    paths = {
        name: folder / f"{name}-{digest([main, size, run.quality.exact_queries, run.quality.fit_steps])}.safetensors"
        for name in DICTIONARIES
    }
    missing = [(run, name, path) for name, path in paths.items() if not path.with_suffix(".json").is_file()]
    run_all(_solve, missing, run.retraining.jobs, "whole curvature", len(paths) - len(missing))
    retrained, rows = truth(run, main, size), []
    losses_QM = retrained["sequence"].mean(0)[: run.quality.exact_queries]
    for name, path in paths.items():
        scores = {kind: tensor.numpy() for kind, tensor in load_file(path).items()}
        row: dict[str, Any] = {"dictionary": name} | json.loads(path.with_suffix(".json").read_text())
        for kind, scores_QS in scores.items():
            row[kind] = bootstrap([(predictions(retrained["included"], scores_QS), losses_QM)])
        row["spearman"] = float(np.mean(rank_correlation(scores["exact"], scores["index"])))
        rows.append(row)
    return rows
