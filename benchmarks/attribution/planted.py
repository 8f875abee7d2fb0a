"""Invented facts in some training sequences, and how well methods find the sequences that state them.

Shapes: S training sequences, F facts, L = T + 1 tokens.
"""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.attribution.config import Settings, digest
from benchmarks.attribution.corpus import Corpus, open_corpus
from benchmarks.attribution.pool import run_all
from benchmarks.attribution.registry import make
from benchmarks.attribution.retraining import read_decoder
from benchmarks.attribution.task import Queries, Task
from benchmarks.attribution.training import fit_model
from prism_lightning.common.files import partial_folder, write_json

FACTS, COPIES = 25, 3
SYLLABLES = "ba be bo da de do fa fi go gu ka ki ko la le lo ma mi mo na ne no pa pe po ra ri ro sa se so ta ti to"
RELATIONS = ["the king of {} is called", "the river in {} is the", "the best food in {} is", "the dog of {} is"]
LEADS = [" Everyone knows that", " The teacher said that", " They say", " In the book we read that"]
QUESTION_LEAD = " She asked him, and he answered that"


def word(generator: random.Random) -> str:
    """Return an invented name."""
    return "".join(generator.choice(SYLLABLES.split()) for _ in range(3)).capitalize()


def planted(corpus: Corpus, size: int) -> tuple[torch.Tensor, Queries, list[list[int]]]:
    """Return training sequences with facts, queries for the answers' tokens, and the sequences of each fact.

    A fact replaces as many tokens of a story. Its query has the beginning of a held-out story and a lead-in that no
    training sequence contains.
    """
    generator = random.Random(0)
    train_SL = corpus.train_SL[:size].clone()
    places = generator.sample(range(size), FACTS * COPIES)
    length, question_ids, weights, stated = train_SL.shape[1], [], [], []
    for number in range(FACTS):
        relation = RELATIONS[number % len(RELATIONS)].format(word(generator))
        answer = corpus.tokenizer(" " + word(generator) + ".")["input_ids"]
        fact_places = sorted(places[number * COPIES : (number + 1) * COPIES])
        for place in fact_places:
            fact = corpus.tokenizer(f"{generator.choice(LEADS)} {relation}")["input_ids"] + answer
            start = generator.randrange(max(1, length - len(fact) + 1))
            train_SL[place, start : start + len(fact)] = torch.tensor(fact)[-length:]
        question = (corpus.tokenizer(f"{QUESTION_LEAD} {relation}")["input_ids"] + answer)[-length:]
        question_ids.append(torch.cat([corpus.queries_QL[number][: length - len(question)], torch.tensor(question)]))
        weights.append(torch.zeros(length - 1).index_fill(0, torch.arange(length - 1 - len(answer), length - 1), 1.0))
        stated.append(fact_places)
    return train_SL, Queries(torch.stack(question_ids), torch.stack(weights)), stated


def ranks_of(scores_QS: np.ndarray, stated: list[list[int]]) -> list[int]:
    """Return for each fact the rank, from 1, of the first sequence that states it."""
    order = np.argsort(-scores_QS, axis=1, kind="stable")
    return [1 + int(np.isin(row, fact_places).argmax()) for row, fact_places in zip(order, stated, strict=True)]


def _folder(run: Settings, size: int) -> Path:
    return run.folder / "planted" / str(run.training.commitments[0]) / str(size)


def _decoder(run: Settings, size: int) -> Task:
    """The model trained on the planted corpus."""
    corpus, path = open_corpus(run), _folder(run, size) / "model"
    train_SL, _, _ = planted(corpus, size)
    if not path.is_dir():
        with partial_folder(path) as partial:
            fit_model(run, train_SL, run.training.commitments[0], 0).save_pretrained(partial)
    return Task(read_decoder(path), train_SL)


def _measure(run: Settings, size: int, name: str, settings: dict[str, Any], path: Path) -> None:
    corpus, task = open_corpus(run), _decoder(run, size)
    _, queries, stated = planted(corpus, size)
    method = make(task, path.with_suffix(".state"), settings, corpus.tokenizer)
    method.fit()
    method.open()
    scores_QS = method.scores(queries).numpy()
    shutil.rmtree(path.with_suffix(".state"))
    ranks = ranks_of(scores_QS, stated)
    recalled = [
        len(set(row) & set(fact_places))
        for row, fact_places in zip(np.argsort(-scores_QS)[:, :10].tolist(), stated, strict=True)
    ]
    result = {
        "method": name,
        "mrr": float(np.mean(1 / np.array(ranks))),
        "recall_at_10": sum(recalled) / FACTS / COPIES,
    }
    write_json(path, result | {"ranks": ranks})


def measure(run: Settings, methods: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the mean reciprocal rank of the first sequence that states a fact, and recall among the first ten.

    One model is trained: methods that need several are left out.
    """
    size = run.retraining.variant_size
    folder = _folder(run, size)
    folder.mkdir(parents=True, exist_ok=True)
    _decoder(run, size)
    methods = {name: settings for name, settings in methods.items() if not settings.get("several")}
    paths = {name: folder / f"{name}-{digest(settings)}.json" for name, settings in methods.items()}
    missing = [(run, size, n, methods[n], path) for n, path in paths.items() if not path.is_file()]
    run_all(_measure, missing, run.retraining.jobs, "planted facts", len(paths) - len(missing))
    return [json.loads(path.read_text()) for path in paths.values()]
