"""Pretrained families: logits equal to the native model's, computed before, or a refusal by name with the reason."""

import json

import pytest
import torch
from support.decoders import MODELS, REFUSED, SCALED, tiny_decoder
from transformers import AutoModelForCausalLM

from prism_lightning.common.errors import UserError
from prism_lightning.models import decompose
from prism_lightning.models.conversion import converted
from prism_lightning.models.native import native_model
from prism_lightning.models.pretrained import open_pretrained
from prism_lightning.models.steering import Scaling
from prism_lightning.run.model_folder import load_exported, save_exported, save_native

IDS = torch.randint(1, 300, (2, 20), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def logits_of(model):
    return model(IDS).logits.clone()


def prism_of(native, encoder="cosine", fused=False):
    """The native model with 16 prototypes that lie among its hidden states."""
    model = converted(native, base_model="base", fused=fused, num_prototypes=16, active_prototypes=3, encoder=encoder)
    with torch.no_grad():
        z_ND = model.hidden_states(IDS).flatten(0, 1)
        model.prototypes.weight.copy_(z_ND[::2][:16] / 2)
    return model


def tied(native):
    return native.get_output_embeddings().weight is native.get_input_embeddings().weight


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
def test_logits_are_the_native_models_and_so_is_the_sum_of_terms(family, tie):
    native = tiny_decoder(family, tie_word_embeddings=tie)
    assert tied(native) == tie
    expected = logits_of(native)
    model = prism_of(native, "pursuit" if tie else "cosine")
    assert model.config.base_model == "base" and expected.abs().max() > 0.2
    if family in SCALED:
        torch.testing.assert_close(logits_of(model), expected, atol=1e-5, rtol=0)
    else:
        assert torch.equal(logits_of(model), expected)
    split = decompose(model, IDS, IDS)
    torch.testing.assert_close(split.total_BT, expected.gather(-1, IDS[..., None])[..., 0], atol=1e-4, rtol=0)
    assert (split.contributions_BTk.abs().sum(-1) > 1e-3).float().mean() > 0.9
    model.intervene(Scaling(dict.fromkeys(range(16), 0.0)))
    assert (logits_of(model) - expected).abs().max() > 0.01


@pytest.mark.parametrize("name", REFUSED)
def test_a_family_with_other_logits_is_refused_by_name_with_the_reason(name):
    family, settings, reason = REFUSED[name]
    with pytest.raises(
        UserError, match=f"^{family} models are not supported with {reason}.*: their logits are not W z"
    ):
        prism_of(tiny_decoder(family, settings))


def test_a_bias_of_zeros_is_none():
    """Phi has a bias; a model that was trained without one stores zeros."""
    native = tiny_decoder("phi", REFUSED["phi"][1])
    native.lm_head.bias.data.zero_()
    expected = logits_of(native)
    model = prism_of(native)
    assert torch.equal(logits_of(model), expected) and torch.equal(logits_of(native_model(model)), expected)


@pytest.mark.parametrize("family", ["llama", "cohere"])
def test_what_a_family_does_to_its_logits_unheard_of_is_found_by_comparing(family, monkeypatch):
    """A family of tomorrow, whose configuration tells nothing."""
    native = tiny_decoder(family)
    head = native.lm_head.forward
    monkeypatch.setattr(native.lm_head, "forward", lambda z: head(z) + 0.01 * head(z) ** 2)
    with pytest.raises(UserError, match=rf"{family} models are not supported: their logits are not W z \(they differ"):
        prism_of(native)


def test_fused_activations_change_the_logits_of_gpt2_and_its_own_kernels_do_not():
    """1e-6, but a retrofitted model keeps every bit."""
    native = tiny_decoder("gpt2")
    expected = logits_of(native)
    assert torch.equal(logits_of(prism_of(native)), expected)
    fused = logits_of(prism_of(tiny_decoder("gpt2"), fused=True))
    assert not torch.equal(fused, expected)
    torch.testing.assert_close(fused, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", MODELS)
def test_an_exported_model_keeps_every_bit_and_extra_settings_of_its_base(family, byte_tokenizer, tmp_path):
    """Configurations on the hub hold keys that no class knows; a native export gives the base model back."""
    native = tiny_decoder(family, tie_word_embeddings=True)
    native.save_pretrained(tmp_path / "base")
    config = tmp_path / "base" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"is_llama_config": True, "sliding_note": {"a": 1}}))
    opened = open_pretrained(str(tmp_path / "base"))
    original = logits_of(opened)
    model = prism_of(opened)
    expected = logits_of(model)
    save_exported(model, byte_tokenizer, tmp_path / "model")
    loaded, _ = load_exported(tmp_path / "model")
    assert torch.equal(logits_of(loaded), expected)
    assert torch.equal(loaded.prototypes.weight, model.prototypes.weight)
    assert loaded.config.base_model == "base" and loaded.config.get_text_config().is_llama_config is True
    save_native(native_model(loaded), byte_tokenizer, tmp_path / "native")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "native", dtype=torch.float32).eval()
    assert type(again) is type(native) and tied(again) and again.config.sliding_note == {"a": 1}
    assert torch.equal(logits_of(again), original)
