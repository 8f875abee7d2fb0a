"""Scores of every method on every decoder, cached one by one; damping and ranks chosen on queries of their own.

Shapes: S training sequences, Q queries.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.attribution.config import Settings, digest
from benchmarks.attribution.corpus import Corpus, open_corpus
from benchmarks.attribution.lds import predictions, rank_correlation
from benchmarks.attribution.methods.lists import ListMethod
from benchmarks.attribution.methods.prototypes import Prototypes
from benchmarks.attribution.pool import run_all
from benchmarks.attribution.registry import make
from benchmarks.attribution.retraining import Variant, decoder, half_path, halves, losses_of
from benchmarks.attribution.task import Method, Queries, Task
from prism_lightning.common.files import write_file, write_json
from prism_lightning.run.environment import environment


class Case(NamedTuple):
    """One method on one decoder."""

    variant: Variant
    size: int
    seed: int
    name: str
    settings: dict[str, Any]  # of the method, its kind among them

    def path(self, run: Settings) -> Path:
        """Return the path of its scores."""
        folder = run.folder / "scores" / str(self.variant) / str(self.size) / str(self.seed)
        several = [run.retraining.checkpoints] if self.settings.get("several") else []
        return folder / f"{self.name}-{digest([self.settings, *several])}.safetensors"


def token_targets(queries_QL: Tensor) -> Tensor:
    """Return a random target [Q] for one-token queries, from the last three quarters of each sequence."""
    last = queries_QL.shape[1] - 1
    return torch.randint(last // 4, last, (len(queries_QL),), generator=torch.Generator().manual_seed(0))


def truth(run: Settings, variant: Variant, size: int) -> dict[str, np.ndarray]:
    """Return retrained losses [seeds, Q, M] of "sequence", "token" and "tuning" queries, and "included" [M, size]."""
    corpus = open_corpus(run)
    included_MS = halves(size, run.retraining.halves)
    seeds = [
        seed
        for seed in range(run.retraining.seeds)
        if all(
            (run.folder / "models" / f"{half_path(variant, size, seed, half)}.safetensors").is_file()
            for half in range(len(included_MS))
        )
    ]
    losses = torch.stack(
        [
            torch.stack([losses_of(run, half_path(variant, size, seed, half)) for half in range(len(included_MS))], -1)
            for seed in seeds
        ]
    ).double()  # [seeds, Q + tuning, T, M]
    count = len(corpus.queries_QL)
    targets_Q = token_targets(corpus.queries_QL)
    return {
        "included": included_MS,
        "sequence": losses[:, :count].sum(2).numpy(),
        "token": losses[:, torch.arange(count), targets_Q].numpy(),
        "tuning": losses[:, count:].sum(2).numpy(),
    }


def task_of(run: Settings, corpus: Corpus, variant: Variant, size: int, seed: int) -> Task:
    """Return a decoder and its training sequences."""
    return Task(decoder(run, variant, size, seed), corpus.train_SL[:size])


def method_of(run: Settings, corpus: Corpus, case: Case, folder: Path) -> Method:
    """Return the method of a case, not fitted yet."""
    checkpoints = []
    if case.settings.get("several"):
        # The attributed one first, then others, as many for each decoder.
        seeds = sorted(range(run.retraining.checkpoints), key=lambda seed: seed != case.seed)
        checkpoints = [decoder(run, case.variant, case.size, seed) for seed in seeds]
    task = task_of(run, corpus, case.variant, case.size, case.seed)
    return make(task, folder, case.settings, corpus.tokenizer, checkpoints)


def score(run: Settings, case: Case) -> None:
    """Fit and query one method; write its scores [Q, S] for sequence and token queries, and facts beside them."""
    corpus, path = open_corpus(run), case.path(run)
    state = path.with_suffix(".state")
    shutil.rmtree(state, ignore_errors=True)
    method = method_of(run, corpus, case, state)
    method.fit()
    method.open()
    tokens = Queries.of_tokens(corpus.queries_QL, token_targets(corpus.queries_QL))
    queries_by_kind = {"sequence": Queries.of_sequences(corpus.queries_QL), "token": tokens}
    # All in one call: EK-FAC passes over the training sequences once for up to 512 queries.
    scores_QS = method.scores(Queries(*map(torch.cat, zip(*queries_by_kind.values(), strict=True)))).float()
    scores_by_kind = {
        n: part.numpy() for n, part in zip(queries_by_kind, scores_QS.split(len(corpus.queries_QL)), strict=True)
    }
    facts: dict[str, Any] = {"state_bytes": method.state_bytes(), "commit": environment()["commit"]}
    if isinstance(method, ListMethod):
        facts["share_read"] = {name: method.share_read(queries) for name, queries in queries_by_kind.items()}
    if isinstance(method, Prototypes):
        facts["unexplained_variance"] = method.unexplained_variance()
    shutil.rmtree(state)
    write_file(path, scores_by_kind, **facts)


def score_all(run: Settings, cases: list[Case]) -> None:
    """Score the cases whose scores are missing."""
    missing = [case for case in cases if not case.path(run).with_suffix(".json").is_file()]
    run_all(score, [(run, case) for case in missing], run.retraining.jobs, "scoring", len(cases) - len(missing))


def scores_of(run: Settings, case: Case) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Return scores [Q, S] of "sequence" and "token" queries, and the facts beside them."""
    path = case.path(run)
    return {n: t.numpy() for n, t in load_file(path).items()}, json.loads(path.with_suffix(".json").read_text())


def _sweep_path(run: Settings, name: str, method: dict[str, Any]) -> Path:
    return run.folder / "tuned" / f"{name}-{digest([method, run.choice()])}.json"


def tune(run: Settings, name: str, method: dict[str, Any]) -> None:
    """Score the alternatives of a method's `sweep` on the tuning queries; write their LDS, in order."""
    corpus, main = open_corpus(run), run.training.commitments[0]
    size = run.retraining.variant_size
    retrained = truth(run, main, size)
    fixed = {key: value for key, value in method.items() if key != "sweep"}
    path = _sweep_path(run, name, method)
    alternatives, fitted_with, current = [], None, None
    for alternative in method["sweep"]:
        settings = fixed | alternative
        refit = {key: value for key, value in settings.items() if key != "damping"} | {"own": "damping" in settings}
        if current is None or refit != fitted_with:
            state = path.with_suffix(".state")
            shutil.rmtree(state, ignore_errors=True)
            current = method_of(run, corpus, Case(main, size, 0, name, settings), state)
            current.fit()
            current.open()
            fitted_with = refit
        elif "damping" in settings:
            current.damping = settings["damping"]  # type: ignore[attr-defined]
        scores_QS = current.scores(Queries.of_sequences(corpus.tuning_QL)).numpy()
        predicted = predictions(retrained["included"], scores_QS)
        alternatives.append(
            alternative | {"lds": float(rank_correlation(predicted, retrained["tuning"].mean(0)).mean())}
        )
    shutil.rmtree(path.with_suffix(".state"))
    write_json(path, {"alternatives": alternatives})


def tuned(run: Settings, methods: dict[str, dict[str, Any]]) -> dict[str, tuple[dict[str, Any], list[dict[str, Any]]]]:
    """Return every method's settings with the best alternative of its sweep, and the LDS of all alternatives."""
    swept = {name: method for name, method in methods.items() if "sweep" in method}
    missing = [(run, n, m) for n, m in swept.items() if not _sweep_path(run, n, m).is_file()]
    run_all(tune, missing, run.retraining.jobs, "tuning", len(swept) - len(missing))
    chosen = {}
    for name, method in methods.items():
        settings, alternatives = {key: value for key, value in method.items() if key != "sweep"}, []
        if "sweep" in method:
            alternatives = json.loads(_sweep_path(run, name, method).read_text())["alternatives"]
            best = max(alternatives, key=lambda alternative: alternative["lds"])
            settings |= {key: value for key, value in best.items() if key != "lds"}
        chosen[name] = (settings, alternatives)
    return chosen
