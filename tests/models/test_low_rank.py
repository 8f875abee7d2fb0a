"""Adapters that are trained here: what is frozen, what is merged, and what peft reads."""

import sys

import peft
import pytest
import torch
from support.pretrained_models import save_model, token_ids
from transformers import AutoModelForCausalLM

from prism_lightning.common.errors import UserError
from prism_lightning.models.initial import initial_model
from prism_lightning.models.low_rank import LoraSettings, add_adapters, save_adapter, take_out_adapters


def adapted_model(folder, settings, family, **model):
    """A PRISM model with adapters of random matrices, and the folder of its base."""
    base = save_model(folder / "base", family, **model)
    model = initial_model(None, str(base), None, num_prototypes=8, active_prototypes=2)
    counted = model.matrix_parameters
    add_adapters(model, settings)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.2)
    return model.eval(), base, counted


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("targets", [None, "all", "some"])
def test_merged_logits_are_those_of_the_adapters_and_of_peft(tmp_path, family, targets):
    names = {"gpt2": ["c_attn", "c_proj", "c_fc"], "llama": ["q_proj", "o_proj", "down_proj"]}[family]
    chosen = {None: None, "all": names, "some": names[1:]}[targets]
    settings = LoraSettings(rank=4, alpha=6, targets=chosen)
    model, base, counted = adapted_model(tmp_path, settings, family)
    native = AutoModelForCausalLM.from_pretrained(base).eval()
    with torch.no_grad():
        before, with_adapters = native(token_ids()).logits, model(token_ids()).logits
        assert (with_adapters - before).abs().max() > 1e-2
        save_adapter(model, settings, tmp_path / "adapter")
        take_out_adapters(model, merge=True)
        torch.testing.assert_close(model(token_ids()).logits, with_adapters, atol=1e-5, rtol=1e-5)
        by_peft = peft.PeftModel.from_pretrained(native, tmp_path / "adapter").eval()
        torch.testing.assert_close(by_peft(token_ids()).logits, with_adapters, atol=1e-5, rtol=1e-5)
    plain = initial_model(None, str(base), None, num_prototypes=8, active_prototypes=2)
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert (model.matrix_parameters, model.frozen_parameters) == (counted, 0)


def test_dropped_adapters_leave_the_base(tmp_path):
    model, base, _ = adapted_model(tmp_path, LoraSettings(), "gpt2")
    take_out_adapters(model, merge=False)
    expected = initial_model(None, str(base), None).eval()
    with torch.no_grad():
        assert torch.equal(model(token_ids()).logits, expected(token_ids()).logits)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_adapters_and_prototypes_alone_have_gradients(tmp_path, checkpointing):
    model, _, counted = adapted_model(tmp_path, LoraSettings(rank=2), "gpt2")
    if checkpointing:
        model.activation_checkpointing_enable()
    ids = token_ids()
    model.train().objective(ids[:, :-1], ids[:, 1:]).loss.backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if "lora_" in name or name == "prototypes.weight"}
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None and bool(parameter.grad.any())) == (name in trained), name
    adapters = sum(parameter.numel() for name, parameter in model.named_parameters() if "lora_" in name)
    assert adapters == 2 * 2 * (32 + 96)  # rank 2 in two layers of 32 -> 96
    assert (model.matrix_parameters, model.frozen_parameters) == (counted + adapters, counted)


def test_a_family_that_peft_does_not_know_gets_adapters_everywhere(tmp_path, monkeypatch):
    from peft.utils import constants

    monkeypatch.delitem(constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING, "llama")
    model, _, _ = adapted_model(tmp_path, LoraSettings(), "llama")
    adapted = {name.split(".lora_")[0] for name, _ in model.named_parameters() if ".lora_" in name}
    assert len(adapted) == 2 * 7 and not any("lm_head" in name or "embed" in name for name in adapted)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"rank": 0}, "rank is 0"),
        ({"alpha": 0}, "alpha is 0"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"targets": []}, "targets is empty"),
    ],
)
def test_settings_out_of_range_are_named(settings, words):
    with pytest.raises(UserError, match=words):
        LoraSettings(**settings)


@pytest.mark.parametrize("target", ["wte", "lm_head", "q_proj", "no_such.c_attn"])
def test_targets_that_are_no_linear_layers_of_the_decoder_are_named(tmp_path, target):
    with pytest.raises(UserError, match=f"model.lora.targets.*{target}") as caught:
        adapted_model(tmp_path, LoraSettings(targets=[target]), "gpt2")
    assert "\n" not in str(caught.value)


def test_without_peft_the_command_that_installs_it_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match="pip install 'prism_lightning\\[pretrained\\]'"):
        adapted_model(tmp_path, LoraSettings(), "gpt2")
