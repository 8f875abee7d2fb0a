"""Wrong input of the verb retrofit: one line that names the thing and a fix, exit code 2."""

import json

import pytest
from support.decoders import REFUSED, write_base
from support.refusals import refused

CASES = {
    "too few texts": ({"data__path": "short.txt"}, "too few for one block of 32"),
    "few tokens": ({"fit_tokens": 32, "prototypes": 64}, "32 training tokens are too few to fit 64 prototypes"),
    "long blocks": ({"data__block_size": 65}, "data.block_size 65 is longer than the model's context of 64: lower it"),
    "k above K": ({"active": 65}, "--active 65 is more than --prototypes 64: lower it"),
    "no prototypes": ({"prototypes": 0, "active": 0}, "--prototypes is 0: give a positive number"),
    "encoder": ({"encoder": "linear"}, "'cosine', 'pursuit'"),
    "no folder": ({"model": "runs/no/such/model"}, "model runs/no/such/model: no such folder"),
    "no model in it": ({"model": "."}, "model folder . has no config.json"),
    "no gguf": ({"gguf_file": "weights.gguf"}, "has no weights.gguf"),
    "a number": ({"fit_steps": "many"}, "fit_steps"),
    "negative steps": ({"fit_steps": -1}, "--fit_steps is -1"),
    "learning rate": ({"learning_rate": 0}, "--learning_rate is 0.0: give a positive number"),
    "dtype": ({"dtype": "fp8"}, "--dtype fp8: give fp32 or bf16"),
    "device": ({"device": "tpu"}, "--device tpu: give auto, cpu"),
    "no data": ({"data__path": "no/such/file.txt"}, "data.path no/such/file.txt: no such file"),
    "unknown option": ({"protypes": 3}, "--protypes"),
    "tokenizer": ({"data__tokenizer": "x"}, "--data.tokenizer"),  # it is the model's
    "no --model": ({"model": None}, "give --model"),
}


@pytest.mark.parametrize("case", CASES)
def test_one_line_names_what_is_wrong(cli, arguments_of, tmp_path, case):
    changed, words = CASES[case]
    if changed.get("data__path") == "short.txt":
        (tmp_path / "short.txt").write_text("import os")
        changed = {"data__path": tmp_path / "short.txt"}
    out = tmp_path / "run"
    result = cli(*arguments_of(out, **changed))
    refused(result, words)
    assert not (out / "model").exists() and not (out / "retrofit").exists()


def test_a_corrected_command_is_not_refused_for_what_a_wrong_one_left(cli, arguments_of, tmp_path):
    out = tmp_path / "run"
    refused(cli(*arguments_of(out, prototypes=64, fit_tokens=32)), "too few")
    cli(*arguments_of(out, fit_steps=1), check=0)


def test_out_is_needed(cli, bases):
    refused(cli("retrofit", "--model", bases / "llama"), "give --out")


def test_out_that_is_a_file_is_named(cli, arguments_of, tmp_path):
    (tmp_path / "file").write_text("x")
    refused(cli(*arguments_of(tmp_path / "file")), "choose another --out")


@pytest.mark.parametrize("name", ["phi", "opt with a projection"])
def test_families_whose_logits_are_no_product_are_refused_by_name(cli, arguments_of, tokenizer, tmp_path, name):
    family, settings, reason = REFUSED[name]
    base = write_base(tmp_path / "base", family, tokenizer, settings=settings)
    refused(cli(*arguments_of(tmp_path / "run", model=base)), f"{family} models are not supported with {reason}")
    assert not (tmp_path / "run").exists()


def test_a_tokenizer_with_more_ids_than_the_model_is_refused(cli, arguments_of, bases, tokenizer, tmp_path):
    base = write_base(tmp_path / "base", "llama", tokenizer)
    file = base / "tokenizer.json"
    content = json.loads(file.read_text())
    content["added_tokens"] += [dict(content["added_tokens"][0], id=300 + n, content=f"<{n}>") for n in range(30)]
    file.write_text(json.dumps(content))
    refused(cli(*arguments_of(tmp_path / "run", model=base)), "has 330 tokens, its model 320")
