"""The bridge gives the log-likelihoods of the harness's own Hugging Face model."""

import os
from pathlib import Path

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from prism_lightning.data.tokenizer import train_tokenizer
from prism_lightning.evaluation.harness import PrismHarnessModel
from prism_lightning.evaluation.suites import load_suite
from prism_lightning.evaluation.tasks import build_tasks
from prism_lightning.run.model_folder import save_exported

ROOT = Path(__file__).parents[2]
QUESTIONS = [
    ("Question: is a door made of wood?\nAnswer:", [" yes", " no"]),
    ("The cat sat", [" on the mat and slept", " under", " by the door of the house"]),
    ("", [" beginning"]),
    ("word " * 90, [" end", " stop it now"]),  # longer than the context
]


@pytest.fixture(scope="module", params=["prism", "dense"])
def models(request, tmp_path_factory):
    """The bridge and the harness's model on one exported folder."""
    from support.runs import BACKBONES

    from prism_lightning.models import PrismConfig, PrismForCausalLM

    torch.manual_seed(3)
    backbone = BACKBONES["gpt2"] | {"initializer_range": 0.3}
    prototypes = {"num_prototypes": 16, "active_prototypes": 2} if request.param == "prism" else {"num_prototypes": 0}
    model = PrismForCausalLM(PrismConfig(backbone_config=backbone, **prototypes))
    tokenizer = train_tokenizer([context + choice for context, choices in QUESTIONS for choice in choices], 300)
    folder = tmp_path_factory.mktemp("exported") / "model"
    save_exported(model, tokenizer, folder)
    theirs = HFLM(pretrained=str(folder), device="cpu", batch_size=3, max_length=64, dtype="float32")
    return PrismHarnessModel(checkpoint=folder, batch_tokens=150), theirs


def instances(kind, arguments):
    return [Instance(kind, {}, args, number, task_name="t") for number, args in enumerate(arguments)]


def close(ours, theirs):
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]
    assert [score for score, _ in ours] == pytest.approx([score for score, _ in theirs], abs=1e-4)


def test_loglikelihoods_are_the_harness_models(models):
    ours, theirs = models
    pairs = [(context, choice) for context, choices in QUESTIONS for choice in choices]
    close(
        ours.loglikelihood(instances("loglikelihood", pairs)), theirs.loglikelihood(instances("loglikelihood", pairs))
    )
    assert ours.cut == 2 and ours.model_seconds > 0


def test_rolling_loglikelihoods_are_the_harness_models(models):
    ours, theirs = models
    texts = [("a short text",), ("the door of the house is made of wood " * 30,)]
    values = [m.loglikelihood_rolling(instances("loglikelihood_rolling", texts)) for m in models]
    assert values[0] == pytest.approx(values[1], abs=1e-3)
    assert theirs.max_length == ours.max_length == 64


def test_the_same_input_is_computed_once(models, monkeypatch):
    ours, _ = models
    rows, hidden_states = [], ours.prism.hidden_states
    monkeypatch.setattr(ours.prism, "hidden_states", lambda ids: rows.extend(ids.tolist()) or hidden_states(ids))
    values = ours._loglikelihood_tokens([(None, [5, 6], [7]), (None, [9], [8]), (None, [5, 6], [8])])
    assert sorted(rows) == [[5, 6], [9, 0]]
    assert values[0][0] != values[2][0]


def test_real_items_of_every_suite(models):
    """On the first items of each task, from local files in the official schema."""
    data = os.environ.get("PRISM_TEST_DATA")
    if not data or not (Path(data) / "hellaswag").is_dir():
        pytest.skip("PRISM_TEST_DATA names no folder with the suites' data")
    suite = load_suite(ROOT / "evals/downstream.yaml") | load_suite(
        ROOT / "evals/language_modeling.yaml", ["lambada_openai"]
    )
    ours, theirs = models
    for name, task in build_tasks(suite, Path(data), list).items():
        task.build_all_requests(limit=3)
        requests = [instance for instance in task.instances if len(ours.tok_encode(instance.args[1])) <= 60]
        assert requests, name
        close(ours.loglikelihood(requests), theirs.loglikelihood(requests))
