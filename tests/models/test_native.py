"""The plain model of a decoder's own family: equal logits, or refused by name."""

import pytest
import torch
from support.runs import BACKBONES

from prism_lightning.common.errors import UserError
from prism_lightning.models.native import native_model
from prism_lightning.models.steering import Scaling

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "vocab_size": 300,
}
GROUPED = SMALL | {"num_key_value_heads": 1}
FAMILIES = {
    "gpt2": BACKBONES["gpt2"],
    "gpt_neox": SMALL,
    "llama": GROUPED,
    "mistral": GROUPED,
    "qwen2": GROUPED,
    "qwen3": GROUPED | {"head_dim": 16},
    "olmo2": GROUPED | {"pad_token_id": None},
    "gemma": GROUPED | {"head_dim": 16, "pad_token_id": None},
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_logits_are_equal(make_model, family, tied):
    settings = {"model_type": family} | FAMILIES[family] | {"tie_word_embeddings": tied}
    model = make_model(settings, num_prototypes=8).eval()
    ids = torch.randint(300, (2, 40), generator=torch.Generator().manual_seed(1))
    native = native_model(model)
    assert type(native).__module__.startswith(f"transformers.models.{family}.")
    torch.testing.assert_close(native(ids).logits, model(ids).logits, atol=1e-5, rtol=0)


def test_a_family_that_caps_logits_is_refused_by_name(make_model):
    settings = GROUPED | {"head_dim": 16, "final_logit_softcapping": 0.1, "pad_token_id": None}
    with pytest.raises(UserError, match="gemma2 models compute other logits .* export without --native"):
        native_model(make_model({"model_type": "gemma2", **settings}).eval())


def test_interventions_need_the_prototypes(make_model):
    model = make_model(num_prototypes=8).eval()
    model.intervene(Scaling({3: 0.0}))
    with pytest.raises(UserError, match="without --intervention"):
        native_model(model)
