"""Opening pretrained models: as transformers does, or one line that says why not."""

import json
import time

import pytest
import torch
from safetensors.torch import load_file
from support.pretrained_models import save_model, token_ids, tokenizer_of
from support.refusals import refused
from support.tiny_gguf import write_gguf
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    T5Config,
    T5ForConditionalGeneration,
)

from prism_lightning.common.errors import UserError
from prism_lightning.common.hub_access import hub_problem
from prism_lightning.models import initial, pretrained
from prism_lightning.models.initial import initial_model, without_pretrained_weights
from prism_lightning.models.pretrained import decoder_configuration, open_pretrained


@pytest.fixture
def offline(monkeypatch):
    """The hub's name cannot be looked up, as on a machine without a network."""
    import socket

    def fail(*_, **__):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    hub_problem.cache_clear()
    yield
    hub_problem.cache_clear()


def problem_of(folder, **settings):
    """The line with which a model is refused."""
    with pytest.raises(UserError) as caught:
        open_pretrained(str(folder), **settings)
    (line,) = caught.value.problems
    assert "\n" not in line and len(line) < 400
    return line


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_opens_in_fp32_with_the_logits_of_transformers(tmp_path, family, dtype):
    folder = save_model(tmp_path / "model", family, dtype)
    model = open_pretrained(str(folder))
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert {p.dtype for p in model.parameters()} == {torch.float32} and not model.training
    with torch.no_grad():
        assert torch.equal(model(token_ids()).logits, expected(token_ids()).logits)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_without_weights_the_structure_is_the_same(tmp_path, family):
    folder = save_model(tmp_path / "model", family, torch.bfloat16)
    opened = initial_model(None, str(folder), None, num_prototypes=8, active_prototypes=2)
    with without_pretrained_weights():
        built = initial_model(None, str(folder), None, num_prototypes=8, active_prototypes=2)
    with torch.device("meta"):
        sizes = initial_model(None, str(folder), None, num_prototypes=8, active_prototypes=2)
    for other in (built, sizes):
        assert [(n, p.shape, p.dtype) for n, p in other.state_dict().items()] == [
            (n, p.shape, p.dtype) for n, p in opened.state_dict().items()
        ]
        assert other.matrix_parameters == opened.matrix_parameters and other.training == opened.training
    assert built.config.to_dict() == opened.config.to_dict()
    built.load_state_dict(opened.state_dict())
    with torch.no_grad():
        assert torch.equal(built.eval()(token_ids()).logits, opened.eval()(token_ids()).logits)
    assert initial._reads_weights.get()


def test_models_of_another_kind_are_refused_by_name(tmp_path):
    small = {"vocab_size": 30, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertForMaskedLM(BertConfig(intermediate_size=16, **small)).save_pretrained(tmp_path / "bert")
    assert "bert) is no causal language model" in problem_of(tmp_path / "bert")
    T5ForConditionalGeneration(
        T5Config(vocab_size=30, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    ).save_pretrained(tmp_path / "t5")
    assert "is an encoder-decoder (t5)" in problem_of(tmp_path / "t5")


@pytest.mark.parametrize("method", ["bitsandbytes", "gptq"])
def test_quantised_weights_are_refused_before_they_are_read(tmp_path, method):
    folder = save_model(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, "load_in_4bit": True, "bits": 4}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").unlink()
    assert f"has quantised weights ({method})" in problem_of(folder)


def test_pickled_weights_are_never_opened(tmp_path):
    folder = save_model(tmp_path / "model")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert "no safetensors weights, and pickles are not opened" in problem_of(folder)


def test_weights_without_a_head_are_refused(tmp_path):
    folder = save_model(tmp_path / "model", "llama")
    AutoModelForCausalLM.from_pretrained(folder).model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(config))
    assert "lacks 1 of its weights (lm_head.weight)" in problem_of(folder)


def test_a_model_larger_than_memory_is_refused_before_it_is_read(tmp_path, monkeypatch):
    folder = save_model(tmp_path / "model", "llama")
    (folder / "model.safetensors").unlink()
    parameters = 2 * 300 * 32 + 2 * (4 * 32 * 32 + 3 * 32 * 64 + 2 * 32) + 32
    needed = 1.2 * 4 * parameters
    monkeypatch.setattr(pretrained, "available_memory", lambda: int(needed) - 1)
    assert "GiB of memory are free" in problem_of(folder)
    monkeypatch.setattr(pretrained, "available_memory", lambda: int(needed) + 1)
    assert "no safetensors weights" in problem_of(folder)


def test_folders_without_a_model_are_refused(tmp_path):
    assert "no such folder" in problem_of(tmp_path / "nowhere")
    assert "no such folder" in problem_of("./nowhere")
    assert "has no config.json" in problem_of(tmp_path)
    (tmp_path / "config.json").write_text("{")
    assert "could not be opened" in problem_of(tmp_path)
    assert "is a file: give its folder" in problem_of(tmp_path / "config.json")


def test_a_hub_id_fails_at_once_without_a_network(offline, cli, tmp_path):
    started = time.monotonic()
    line = problem_of("someone/some-model")
    assert "no answer from the Hugging Face hub" in line and "check name and network" in line
    model = ["--model", "{class_path: PrismLM, init_args: {pretrained: someone/some-model}}"]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("trainer: {accelerator: cpu, max_steps: 2}\n")
    expected = "model someone/some-model: no answer from the Hugging Face hub"
    refused(cli("fit", "--config", recipe, *model, "--run.dir", tmp_path / "run"), expected)
    refused(cli("retrofit", "--model", "someone/some-model", "--out", tmp_path / "run"), expected)
    assert time.monotonic() - started < 15  # each took 23 s of retries
    assert not (tmp_path / "run").exists()


def test_a_missing_gguf_file_is_named_with_those_that_exist(tmp_path):
    (tmp_path / "other.gguf").write_bytes(b"")
    line = problem_of(tmp_path, gguf_file="model.gguf")
    assert "has no model.gguf: give --gguf_file other.gguf" in line
    (tmp_path / "broken.gguf").write_bytes(b"GGUF and nothing else")
    assert "could not be opened" in problem_of(tmp_path, gguf_file="broken.gguf")


def test_gguf_weights_are_dequantised(tmp_path):
    save_model(tmp_path / "model", "llama", tie_word_embeddings=False)
    native = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    native.load_state_dict(write_gguf(tmp_path / "gguf" / "tiny.gguf", native, tokenizer_of()))
    model = open_pretrained(str(tmp_path / "gguf"), gguf_file="tiny.gguf")
    config = decoder_configuration(str(tmp_path / "gguf"), "tiny.gguf")
    assert isinstance(config, LlamaConfig) and not hasattr(model.config, "quantization_config")
    with torch.no_grad():
        logits = model(token_ids()).logits
        torch.testing.assert_close(logits, native(token_ids()).logits, atol=1e-5, rtol=0)
    model.save_pretrained(tmp_path / "plain")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "plain").eval()
    with torch.no_grad():
        assert torch.equal(again(token_ids()).logits, logits)
