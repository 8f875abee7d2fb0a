"""Attribution finds the documents that state an invented fact, where the model was trained on 2,000 of them."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.bm25 import bm25_scores
from support.corpus_model import hidden_and_targets
from support.planted import planted_corpus
from support.processes import fit
from support.runs import ROOT

TOP = 10


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A model trained on the planted corpus, its index, and the facts."""
    from prism_lightning.cli.main import main

    folder = tmp_path_factory.mktemp("planted")
    facts = planted_corpus(folder / "train.jsonl")
    recipe = ["--config", str(ROOT / "tests/attribution/planted.yaml"), "--run.dir", str(folder / "run")]
    recipe += ["--data.path", str(folder / "train.jsonl"), "--data.cache_dir", str(folder)]
    # Every document is trained on: validation has a file of its own.
    (folder / "validation.jsonl").write_text(json.dumps({"text": "Anna walked to the park. " * 30}) + "\n")
    recipe += ["--data.validation_path", str(folder / "validation.jsonl")]
    fit(recipe)
    recipe += ["--index.fit_steps", "30"]
    assert main(["index", *recipe]) == 0
    assert main(["index", *recipe, "--index.space", "hidden", "--index.dir", str(folder / "hidden")]) == 0
    return folder, facts


def recall(rankings, facts):
    """Share of the documents that state a fact among the first ten of its ranking."""
    found = [len(set(ranking[:TOP]) & set(fact.documents)) for ranking, fact in zip(rankings, facts, strict=True)]
    return sum(found) / sum(len(fact.documents) for fact in facts)


def ranked(scores):
    return np.argsort(-np.asarray(scores), kind="stable").tolist()


def test_documents_that_state_a_fact_come_first(trained):
    from prism_lightning.attribution.attributor import Attributor

    folder, facts = trained
    attributors = {
        "space of logits": Attributor.open(folder / "run", top=TOP),
        "space of hidden states": Attributor.open(folder / "run", folder / "hidden", top=TOP),
    }
    texts = [json.loads(line)["text"] for line in (folder / "train.jsonl").open()]
    found, losses = {name: [] for name in attributors}, []
    for fact in facts:
        for name, attributor in attributors.items():
            question = attributor.tokenizer(fact.question)["input_ids"]
            ids = attributor.tokenizer(fact.question + fact.answer)["input_ids"]
            answer = attributor.attribute(ids, len(question))[-1]
            found[name].append([document.document for document in answer.documents])
        losses.append(answer.loss)
    rows = {name: recall(rankings, facts) for name, rankings in found.items()} | {
        "BM25": recall([ranked(row) for row in bm25_scores([f.question + f.answer for f in facts], texts)], facts),
        "hidden-state cosine": recall(cosine_rankings(attributor, facts), facts),
        "random": recall([np.random.default_rng(n).permutation(len(texts)).tolist() for n in range(len(facts))], facts),
    }
    print(f"\nmean loss of the answers {np.mean(losses):.2f} nats; recall@{TOP} of 3 documents in {len(texts):,}:")
    for name, value in rows.items():
        print(f"  {name:<24} {value:.3f}")
    assert all(rows[name] >= 0.9 for name in attributors)
    assert rows["random"] < 0.1


def cosine_rankings(attributor, facts):
    """Documents by the largest cosine of one of their hidden states to the one that predicts the answer."""
    store = attributor.describe.store
    z_ND, _ = hidden_and_targets(attributor.model, store)
    starts = store.documents["start"].to_numpy()
    document_N = torch.from_numpy(np.searchsorted(starts, np.arange(len(z_ND)) + 1, side="right") - 1)
    rankings = []
    for fact in facts:
        ids = attributor.tokenizer(fact.question, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            z_D = attributor.model.hidden_states(ids)[0, -1]
        cosine_N = F.cosine_similarity(z_ND, z_D[None])
        best = torch.full((len(starts),), -2.0).scatter_reduce_(0, document_N, cosine_N, "amax")
        rankings.append(ranked(best))
    return rankings
