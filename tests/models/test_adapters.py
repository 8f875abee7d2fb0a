"""Adapter folders: merged with peft's own logits, or one line that says why not."""

import json
import sys

import peft
import pytest
import torch
from safetensors.torch import load_file
from support.pretrained_models import save_lora, save_model, token_ids, tokenizer_of
from transformers import AutoModelForCausalLM

from prism_lightning.common.errors import UserError
from prism_lightning.data.tokenizer import load_tokenizer
from prism_lightning.models.conversion import converted
from prism_lightning.models.pretrained import open_pretrained, tokenizer_location


@pytest.fixture(params=["gpt2", "llama"])
def base(request, tmp_path):
    return save_model(tmp_path / "base", request.param)


def problem_of(folder):
    """The line with which an adapter is refused."""
    with pytest.raises(UserError) as caught:
        open_pretrained(str(folder))
    (line,) = caught.value.problems
    assert "\n" not in line and len(line) < 400
    return line


@pytest.mark.parametrize(
    "settings",
    [{}, {"target_modules": "all-linear"}, {"use_rslora": True, "lora_alpha": 3}, {"use_dora": True}],
    ids=["usual", "all linear", "rank-stabilised", "decomposed"],
)
def test_the_merged_model_has_the_logits_of_pefts_own(base, tmp_path, settings):
    folder = save_lora(base, tmp_path / "adapter", **settings)
    native = AutoModelForCausalLM.from_pretrained(base).eval()
    with torch.no_grad():
        before = native(token_ids()).logits
        expected = peft.PeftModel.from_pretrained(native, folder).eval()(token_ids()).logits
        merged = open_pretrained(str(folder))
        logits = merged(token_ids()).logits
        assert (expected - before).abs().max() > 1e-2
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
        model = converted(merged, base_model=str(folder), fused=False, num_prototypes=8)
        assert torch.equal(model(token_ids()).logits, logits)
    assert type(merged) is type(AutoModelForCausalLM.from_pretrained(base))


def test_the_tokenizer_is_the_adapters_own_or_its_bases(base, tmp_path):
    folder = save_lora(base, tmp_path / "adapter")
    assert load_tokenizer(tokenizer_location(str(folder))).eos_token == "<|endoftext|>"
    tokenizer_of("<end>").save_pretrained(folder)
    assert load_tokenizer(tokenizer_location(str(folder))).eos_token == "<end>"


def edited(folder, **entries):
    """Change entries of an adapter's configuration; returns the folder."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))
    return folder


def test_an_adapter_of_another_base_is_refused(base, tmp_path):
    folder = save_lora(base, tmp_path / "adapter")
    family = "llama" if "gpt2" in (base / "config.json").read_text() else "gpt2"
    other = save_model(tmp_path / "other", family)
    assert "does not fit model" in problem_of(edited(folder, base_model_name_or_path=str(other)))
    size = {"n_embd": 16} if family == "llama" else {"hidden_size": 16, "head_dim": 8}
    narrow = save_model(tmp_path / "narrow", "gpt2" if family == "llama" else "llama", **size)
    assert "does not fit model" in problem_of(edited(folder, base_model_name_or_path=str(narrow)))
    layers = {"n_layer": 3} if family == "llama" else {"num_hidden_layers": 3}
    deeper = save_model(tmp_path / "deeper", "gpt2" if family == "llama" else "llama", **layers)
    assert "is of another base" in problem_of(edited(folder, base_model_name_or_path=str(deeper)))


def test_an_adapter_whose_base_is_gone_names_both(tmp_path):
    base = save_model(tmp_path / "base")
    folder = save_lora(base, tmp_path / "adapter")
    base.rename(tmp_path / "moved")
    line = problem_of(folder)
    assert str(base) in line and str(folder) in line and "no such folder" in line


def test_damaged_adapters_are_refused(tmp_path):
    folder = save_lora(save_model(tmp_path / "base"), tmp_path / "adapter")
    weights = folder / "adapter_model.safetensors"
    torch.save(load_file(weights), folder / "adapter_model.bin")
    weights.write_bytes(weights.read_bytes()[:100])
    assert "does not fit model gpt2" in problem_of(folder)
    weights.unlink()
    assert "pickles are not opened" in problem_of(folder)
    (folder / "adapter_config.json").write_text("{")
    assert "names no base model" in problem_of(folder)


def test_an_adapter_that_is_no_product_of_matrices_is_refused(tmp_path):
    base = save_model(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(base)
    prompt = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    peft.get_peft_model(model, prompt).save_pretrained(tmp_path / "prompt")
    assert "cannot be merged" in problem_of(tmp_path / "prompt")


def test_without_peft_the_command_that_installs_it_is_named(tmp_path, monkeypatch):
    folder = save_lora(save_model(tmp_path / "base"), tmp_path / "adapter")
    monkeypatch.setitem(sys.modules, "peft", None)
    assert "pip install 'prism_lightning[pretrained]'" in problem_of(folder)
