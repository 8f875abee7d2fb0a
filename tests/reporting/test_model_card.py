"""Model cards: every number is the run's, nothing of the machine or the user leaks, and no text becomes markup."""

import getpass
import json
from pathlib import Path

import pytest
import yaml
from markdown_it import MarkdownIt

from prism_lightning.evaluation.results import TaskResult, write_result
from prism_lightning.interventions.intervention import Intervention
from prism_lightning.models.steering import Scaling
from prism_lightning.reporting.model_card import model_card
from prism_lightning.run.fingerprints import model_fingerprint
from prism_lightning.run.model_folder import save_exported

RESULTS = {
    "recipe": "/home/alice/recipes/own.yaml",
    "step": 70,
    "loss": 3.1415926,
    "perplexity": 23.14,
    "bits_per_byte": None,
    "prediction_recovered": 0.98765,
    "prediction_divergence": 0.0123,
    "top1_agreement": 0.75,
    "unexplained_variance": 0.0876,
    "unexplained_centred_variance": 0.0987,
    "commit": "0123abc",
}
HOSTILE = "# x | <script>alert(1)</script> [a](http://b) `c` *d*\n## Injected\r\n## Again"


@pytest.fixture
def model(make_model):
    return make_model(num_prototypes=8, active_prototypes=3)


@pytest.fixture
def run(model, byte_tokenizer, tmp_path):
    """A run directory whose files say all that a card can hold."""
    folder = tmp_path / "my_run"
    save_exported(model, byte_tokenizer, folder / "model")
    cache = tmp_path / "secret_cache"
    recipe = {
        "seed_everything": 11,
        "trainer": {"precision": "bf16-mixed"},
        "model": {"init_args": {"learning_rate": 0.00125, "weight_decay": 0.1}},
        "data": {
            "path": ["/home/alice/plans/a.jsonl", "${oc.env:SECRET_FOLDER}/b.jsonl"],
            "dataset": None,
            "tokenizer": "openai-community/gpt2",
            "cache_dir": str(cache),
            "batch_size": 6,
            "block_size": 32,
        },
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    environment = {"data_fingerprint": "feedbeef", "packages": {"torch": "9.8.7"}, "machine": "alices-laptop"}
    (folder / "environment.json").write_text(json.dumps(environment))
    (folder / "results.jsonl").write_text('{"step": 1}\n' + json.dumps(RESULTS) + "\n")
    (cache / "feedbeef").mkdir(parents=True)
    splits = {"train": {"tokens": 123456, "documents": 789}, "validation": {"tokens": 2345, "documents": 67}}
    (cache / "feedbeef" / "manifest.json").write_text(json.dumps(splits))
    return folder


def change_recipe(run, **data):
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    recipe["data"] |= data
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))


def metadata_of(card):
    _, metadata, text = card.text.split("---\n", 2)
    return yaml.safe_load(metadata), text


def rows_of(card):
    """The rows of all tables: cells by the first one, as a reader of Markdown sees them."""
    rows, cells = {}, []
    for token in MarkdownIt().enable("table").parse(metadata_of(card)[1]):
        if token.type == "tr_open":
            cells = []
        elif token.type == "inline":
            cells.append("".join(child.content for child in token.children or ()))
        elif token.type == "tr_close":
            rows[cells[0]] = cells[1:]
    return rows


def headings_of(card):
    tokens = MarkdownIt().enable("table").parse(metadata_of(card)[1])
    return [tokens[i + 1].content for i, token in enumerate(tokens) if token.type == "heading_open"]


def test_every_number_is_that_of_the_run(model, run):
    rows = rows_of(model_card(model, run, []))
    expected = {
        "Recipe": "own.yaml",
        "Hidden size": "32",
        "Vocabulary": "300",
        "Optimiser steps": "70",
        "Tokens of a step": "192",
        "Tokens in all": "13,440",
        "Learning rate": "0.00125",
        "Precision": "bf16-mixed",
        "Seed": "11",
        "Commit of prism_lightning": "0123abc",
        "Version of torch": "9.8.7",
        "Version of lightning": "not known",
        "Source": "local files: a.jsonl, b.jsonl",
        "Tokens, train split": "123,456",
        "Documents, train split": "789",
        "Tokens, validation split": "2,345",
        "Documents, validation split": "67",
        "Tokenizer": "openai-community/gpt2",
        "loss": "3.142",
        "bits per byte": "not known",
        "prediction recovered": "0.9877",
        "prediction divergence": "0.0123",
        "top1 agreement": "0.75",
        "unexplained variance": "0.0876",
        "unexplained centred variance": "0.0987",
    }
    assert {name: rows[name][0] for name in expected} == expected


def test_nothing_of_the_user_or_the_machine_leaks(model, run, tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET_FOLDER", "/mnt/codename")
    monkeypatch.setenv("HOME", "/home/carol")
    change_recipe(run, tokenizer="/home/alice/tokenizers/bytes", path=["/home/carol", "/home/alice/plans/a.jsonl"])
    card = model_card(model, run, [])
    assert rows_of(card)["Source"] == ["local files: a local folder, a.jsonl"]
    assert rows_of(card)["Tokenizer"] == ["bytes"]
    for secret in ("alice", "carol", "plans", "secret_cache", "codename", "laptop", str(tmp_path), "/home"):
        assert secret not in card.text + " ".join(card.summary), secret
    change_recipe(run, path=f"/data/{getpass.getuser()}")
    assert rows_of(model_card(model, run, []))["Source"] == ["local files: a local folder"]


def test_text_of_a_run_is_no_markup(model, run):
    plain = headings_of(model_card(model, run, []))
    change_recipe(run, path=HOSTILE.replace("/", "-"), tokenizer=HOSTILE)
    (run / "results.jsonl").write_text(json.dumps(RESULTS | {"recipe": HOSTILE, "commit": HOSTILE}) + "\n")
    card = model_card(model, run, [])
    assert headings_of(card) == plain
    tokens = [
        child
        for token in MarkdownIt().enable("table").parse(metadata_of(card)[1])
        for child in token.children or [token]
    ]
    assert not [token for token in tokens if token.type in ("html_inline", "html_block")]
    links = {token.attrs["href"] for token in tokens if token.type == "link_open"}
    assert links == {"https://github.com/huggingface/transformers", "https://arxiv.org/abs/2607.00510"}
    assert rows_of(card)["Commit of prism_lightning"] == [HOSTILE.replace("\n", "\\n").replace("\r", "\\r")]


@pytest.mark.parametrize("content", [None, "", "[1]", "\0{"])
def test_what_is_not_known_is_said(model, run, content):
    for name in ("recipe.yaml", "environment.json", "results.jsonl"):
        path = run / name
        path.unlink() if content is None else path.write_text(content)
    card = model_card(model, run, [])
    rows = rows_of(card)
    known = {"Hidden size", "Vocabulary", "Context", "Setting", "Data", "Figure"}
    assert {name for name, cells in rows.items() if cells[0] != "not known"} == known
    assert "No results are known" in card.text and "License: not known" in card.text
    assert metadata_of(card)[0].keys() == {"library_name", "pipeline_tag", "tags"}


def test_metadata_name_what_is_on_the_hub(model, run, monkeypatch, tmp_path):
    metadata, _ = metadata_of(model_card(model, run, []))
    assert metadata["library_name"] == "transformers" and "prototype-language-model" in metadata["tags"]
    assert not {"base_model", "datasets", "license"} & metadata.keys()
    model.config.base_model = "someone/small"
    change_recipe(run, path=None, dataset="roneneldan/TinyStories", dataset_config="v2", tokenizer=None)
    card = model_card(model, run, [])
    metadata, _ = metadata_of(card)
    assert metadata["base_model"] == "someone/small" and metadata["datasets"] == ["roneneldan/TinyStories"]
    rows = rows_of(card)
    assert rows["Pretrained model"] == ["someone/small"] and rows["Source"] == ["roneneldan/TinyStories v2"]
    assert rows["Tokenizer"] == ["not known"]  # it is the pretrained model's, and the recipe does not name it
    monkeypatch.chdir(tmp_path)
    Path("roneneldan/TinyStories").mkdir(parents=True)  # a folder of that name is what the recipe means
    model.config.base_model = "checkpoint_folder"
    card = model_card(model, run, [])
    assert not {"base_model", "datasets"} & metadata_of(card)[0].keys()
    assert rows_of(card)["Pretrained model"] == ["checkpoint_folder"]


def test_interventions_and_their_evaluation(model, run):
    scaling = Scaling({1: 0.0, 4: 2.0})
    intervention = Intervention(model_fingerprint(model), scaling, {"verb": "suppress"})
    intervention.write(run / "interventions" / "no_errors.json")
    numbers = {"documents": 50, "requests": 100, "cut": 0, "seconds": 1.0, "model_seconds": 1.0}
    for folder, value in ((run / "evaluation", 0.25), (run / "evaluation" / "no_errors", 0.5)):
        write_result(folder, TaskResult("arc", "acc", 0.25, {"acc": value}, {"acc": 0.0625}, **numbers), [])
    assert rows_of(model_card(model, run, []))["arc"] == ["acc", "0.25", "0.0625", "0.25", "50"]
    assert "None: the logits" in model_card(model, run, []).text
    model.intervene(scaling)
    card = model_card(model, run, ["no_errors"])
    assert rows_of(card)["arc"][1] == "0.5" and rows_of(card)["no_errors"] == ["suppress"]
    assert "terms of 2 prototypes are scaled in some or all logits, those of 1 by 0" in card.text


def test_a_folder_from_elsewhere_keeps_its_card(model, run, byte_tokenizer, tmp_path):
    folder = tmp_path / "elsewhere"
    save_exported(model, byte_tokenizer, folder)
    assert "not known" in model_card(model, folder, []).text
    (folder / "README.md").write_text("---\nlicense: mit\n---\nTheir own words.\n")
    card = model_card(model, folder, [])
    assert card.text == (folder / "README.md").read_text() and "card is kept" in card.summary[0]
    file = tmp_path / "mild.json"
    Intervention(model_fingerprint(model), Scaling({1: 0.5}), {"verb": "calibrate"}).write(file)
    model.intervene(Scaling({1: 0.5}))
    card = model_card(model, folder, [str(file)])
    assert card.text.startswith("---\nlicense: mit\n---\nTheir own words.\n") and rows_of(card)["mild"] == ["calibrate"]


def test_a_dense_model(make_model, byte_tokenizer, tmp_path):
    model = make_model()
    save_exported(model, byte_tokenizer, tmp_path / "run" / "model")
    card = model_card(model, tmp_path / "run", [], "alice/dense")
    assert "Faithfulness" not in headings_of(card) and "model.prototypes" not in card.text
    assert "prism generate --ckpt_path runs/pulled --prompt" in card.text
    assert metadata_of(card)[0]["tags"] == ["prism_lightning", "custom_code", "arxiv:2607.00510"]
