"""Planted facts in the fine-tuning text of a pretrained decoder, by the whole program."""

import json

import pytest
import torch
from support.decoders import write_base
from support.runs import ROOT

from benchmarks.attribution.__main__ import main
from benchmarks.attribution.retraining import read_decoder
from prism_lightning.data.tokenizer import train_tokenizer
from prism_lightning.models.conversion import converted
from prism_lightning.models.pretrained import open_pretrained

CONFIG = str(ROOT / "benchmarks/attribution/finetuned.yaml")
SMALL = [
    "corpus.documents=90",
    "corpus.per_document=8",
    "corpus.sizes=[120]",
    "retraining.variant_size=120",
    "training.epochs=1",
    "model.warmup_steps=1",
    "methods.prototypes={kind: prototypes, prototypes: 32, active: 4, fit_steps: 5}",
    "methods.hidden-state prototypes={kind: prototypes, space: hidden, prototypes: 32, fit_steps: 5}",
]


@pytest.mark.parametrize("settings", [[], ["model.lora={rank: 2, alpha: 4}", "model.learning_rate=0.001"]])
def test_every_method_is_measured_on_the_fine_tuned_decoder(tmp_path, settings):
    torch.set_num_threads(1)
    base = write_base(tmp_path / "base", "llama", train_tokenizer(["the king of a country is called Bafo."] * 50, 300))
    paths = [f"out={tmp_path}/run", f"results={tmp_path}/results"]
    command = ["--config", CONFIG, *paths, f"model.pretrained={base}", *SMALL, *settings]
    assert main(command) == 0
    (report,) = (tmp_path / "results").glob("*.json")
    content = json.loads(report.read_text())
    assert str(tmp_path) not in report.read_text() and content["settings"]["model"]["pretrained"] == "base"
    rows = {row["method"]: row for row in content["results"]["planted"]}
    assert len(rows) == 7 and rows["BM25"]["mrr"] > 0.9  # every fact has words of its own
    assert rows["random"]["mrr"] < 0.5
    tuned = read_decoder(tmp_path / "run/planted/0.0/120/model").state_dict()
    start = converted(open_pretrained(str(base)), base_model="base", fused=False).state_dict()
    kept = {name.split(".")[-2] for name, tensor in tuned.items() if torch.equal(tensor, start[name])}
    assert not kept if not settings else kept >= {"k_proj", "down_proj"} and not kept & {"q_proj", "v_proj"}
