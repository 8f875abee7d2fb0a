"""Two checks of the sequences that methods rank first: retraining without them, and one training step on them."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.attribution.config import Settings, digest
from benchmarks.attribution.corpus import open_corpus
from benchmarks.attribution.pool import run_all
from benchmarks.attribution.retraining import FIRST_SEED, Job, losses_of, retrain
from benchmarks.attribution.scoring import Case, scores_of, task_of
from benchmarks.attribution.task import Queries, query_loss
from prism_lightning.common.files import write_json


def removal_jobs(
    run: Settings, cases: list[Case], queries: int, count: int, draws: int, seeds: int
) -> dict[str, list[Job]]:
    """Return jobs without the `count` best sequences of each query, and without `draws` random sets of that size."""
    size, variant = cases[0].size, cases[0].variant
    removed_by_name: dict[str, list[list[int]]] = {}
    for case in cases:
        scores_QS = scores_of(run, case)[0]["sequence"]
        removed_by_name[case.name] = np.argsort(-scores_QS[:queries], axis=1)[:, :count].tolist()
    generator = np.random.default_rng(0)
    removed_by_name["random removal"] = [generator.permutation(size)[:count].tolist() for _ in range(draws)]
    jobs: dict[str, list[Job]] = {}
    for name, removed in removed_by_name.items():
        jobs[name] = []
        for rows in removed:
            kept = sorted(set(range(size)) - set(rows))
            for seed in range(seeds):
                path = f"{variant}/{size}/without-{seed}-{digest(sorted(rows))}"
                jobs[name].append(Job(path, variant, FIRST_SEED + seed, kept, False))
    return jobs


def removal(run: Settings, cases: list[Case], queries: int, count: int, draws: int, seeds: int) -> list[dict[str, Any]]:
    """Return the rise of a query's loss (nats per token) over random removals: mean and standard error.

    The error is that of the mean over queries and that of the random models, which all queries share.
    """
    jobs = removal_jobs(run, cases, queries, count, draws, seeds)
    retrain(run, list({job.path: job for group in jobs.values() for job in group}.values()), "retraining without")
    tokens = run.corpus.tokens

    def losses(name: str) -> np.ndarray:
        """Losses [sets, seeds, queries] in nats per token."""
        losses_by_set = [losses_of(run, job.path)[:queries].sum(1) / tokens for job in jobs[name]]
        return torch.stack(losses_by_set).view(-1, seeds, queries).numpy()

    random_DsQ = losses("random removal")
    base_sQ = random_DsQ.mean(0)
    base_error = float(random_DsQ.mean((1, 2)).std(ddof=1) / draws**0.5)
    rows = []
    for case in cases:
        rise_sQ = losses(case.name)[np.arange(queries), :, np.arange(queries)].T - base_sQ
        rise_Q = rise_sQ.mean(0)
        error = (float(rise_Q.var(ddof=1)) / queries + base_error**2) ** 0.5
        rows.append({"method": case.name, "rise": float(rise_Q.mean()), "standard_error": error})
    rows.append({"method": "random removal", "rise": 0.0, "standard_error": base_error})
    return rows


def _patched(run: Settings, case: Case, queries: int, count: int, rate: float, path: Any) -> None:
    corpus = open_corpus(run)
    task = task_of(run, corpus, case.variant, case.size, case.seed)
    model, parameters = task.model, [p for n, p in task.model.named_parameters() if not n.startswith("prototypes")]
    before = [p.detach().clone() for p in parameters]
    scores_QS = scores_of(run, case)[0]["sequence"]
    gains: list[float] = []
    for number in range(queries):
        query = Queries.of_sequences(corpus.queries_QL[number : number + 1])
        with torch.no_grad():
            base = query_loss(model, query).item()
        for row in np.argsort(-scores_QS[number])[:count].tolist():
            loss = query_loss(model, Queries.of_sequences(task.train_SL[row : row + 1])).sum() / run.corpus.tokens
            gradients: tuple[Tensor, ...] = torch.autograd.grad(loss, parameters)
            with torch.no_grad():
                for parameter, gradient in zip(parameters, gradients, strict=True):
                    parameter.sub_(rate * gradient)
                gains.append((base - query_loss(model, query).item()) / run.corpus.tokens)
                for parameter, old in zip(parameters, before, strict=True):
                    parameter.copy_(old)
    gains_Q = np.array(gains).reshape(queries, count).mean(1)
    error = float(gains_Q.std(ddof=1) / queries**0.5)
    write_json(path, {"method": case.name, "gain": float(gains_Q.mean()), "standard_error": error})


def tail_patch(run: Settings, cases: list[Case], queries: int, count: int, rate: float) -> list[dict[str, Any]]:
    """Return the mean fall of a query's loss (nats per token) after a gradient step on one of its best sequences.

    Args:
        run: of the benchmark.
        cases: methods on one decoder, scored.
        queries, count: how many queries, and sequences of each.
        rate: of the step on the sequence's mean loss (plain gradient descent).
    """
    folder = run.folder / "tail_patch"
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{case.name}-{digest([*case, queries, count, rate])}.json" for case in cases]
    missing = [
        (run, case, queries, count, rate, path) for case, path in zip(cases, paths, strict=True) if not path.is_file()
    ]
    run_all(_patched, missing, run.retraining.jobs, "tail-patch", len(cases) - len(missing))
    return [json.loads(path.read_text()) for path in paths]
