"""The objective of packed, masked blocks is that of the documents alone by the library's own model."""

import pytest
import torch
from support.fine_tuning import chat_data, completion_data, documents_with_targets
from support.runs import BACKBONES
from transformers import AutoModelForCausalLM

from prism_lightning.common.errors import UserError
from prism_lightning.common.targets import IGNORED_TARGET
from prism_lightning.models import PrismConfig, PrismForCausalLM
from prism_lightning.models.blocks import block_states
from prism_lightning.models.isolation import check_isolation

BLOCKS = 12


def model_of(backbone, **settings):
    torch.manual_seed(0)
    backbone = BACKBONES[backbone] | {"vocab_size": 400, "initializer_range": 0.2}
    return PrismForCausalLM(PrismConfig(backbone_config=backbone, **settings)).eval()


def library_model(model):
    """The same decoder and head as a plain model of transformers."""
    plain = AutoModelForCausalLM.from_config(model.config.backbone_config).eval()
    plain.base_model.load_state_dict(model.backbone.state_dict())
    plain.lm_head.load_state_dict(model.lm_head.state_dict())
    return plain


def pieces_of(store, blocks):
    """Ids and labels of every document, cut where a block begins; the first target of a block belongs to its end."""
    end = blocks * store.block_size
    for number, (ids, flags) in enumerate(documents_with_targets(store)):
        start = int(store.starts[number])
        labels = [token if flag else IGNORED_TARGET for token, flag in zip(ids, flags, strict=True)]
        first = start
        while first < min(start + len(ids), end):
            last = min((first // store.block_size + 1) * store.block_size, start + len(ids))
            # Inputs first to last - 1; the label of the token after them is in the same document or nowhere.
            inputs = ids[first - start : last - start]
            following = labels[first - start + 1 : last - start + 1]
            yield inputs, following + [IGNORED_TARGET] * (len(inputs) - len(following))
            first = last


@pytest.mark.parametrize("make", [completion_data, chat_data])
@pytest.mark.parametrize("backbone", sorted(BACKBONES))
def test_loss_and_gradients_are_those_of_the_documents_alone(tmp_path, backbone, make):
    store = make(tmp_path).train
    model = model_of(backbone)
    items = store.__getitems__(list(range(BLOCKS)))
    batch = {name: torch.stack([item[name] for item in items]) for name in items[0]}
    result = model.objective(batch["input_ids"], batch["targets"], position_ids_BT=batch["position_ids"])
    result.loss.backward()
    plain, total, count = library_model(model), torch.zeros(()), 0
    for inputs, labels in pieces_of(store, BLOCKS):
        labels = torch.tensor(labels)
        logits = plain(input_ids=torch.tensor([inputs])).logits[0]
        total = total + torch.nn.functional.cross_entropy(logits, labels, ignore_index=IGNORED_TARGET, reduction="sum")
        count += int((labels != IGNORED_TARGET).sum())
    assert count == len(result.targets_N) == int(store.targets_in(range(BLOCKS)).sum())
    torch.testing.assert_close(result.loss, total / count, atol=1e-5, rtol=1e-5)
    (total / count).backward()
    expected = dict(plain.base_model.named_parameters()) | {"lm_head.weight": plain.lm_head.weight}
    for name, parameter in model.named_parameters():
        twin = expected[name.removeprefix("backbone.")].grad
        assert twin.abs().max() > 0
        torch.testing.assert_close(parameter.grad, twin, atol=1e-5, rtol=1e-3, msg=name)


def test_one_document_has_the_loss_that_the_library_gives_its_labels():
    """Its own `labels`, shifted by itself, for one document in a block of its own."""
    model, ids = model_of("llama"), torch.arange(20)[None] * 7 % 400
    labels = ids.clone()
    labels[:, :9] = IGNORED_TARGET
    result = model.objective(ids[:, :-1], labels[:, 1:])
    expected = library_model(model)(input_ids=ids, labels=labels).loss
    torch.testing.assert_close(result.loss, expected)


def test_prototype_terms_see_the_tokens_with_targets_alone(tmp_path):
    store = completion_data(tmp_path).train
    model = model_of("gpt2", num_prototypes=16, active_prototypes=3, cross_entropy_to_prototypes=True)
    items = store.__getitems__([0, 1, 2])
    batch = {name: torch.stack([item[name] for item in items]) for name in items[0]}
    result = model.objective(batch["input_ids"], batch["targets"], position_ids_BT=batch["position_ids"])
    kept = (batch["targets"] != IGNORED_TARGET).flatten()
    z_ND = model.hidden_states(batch["input_ids"], position_ids=batch["position_ids"]).flatten(0, 1)[kept]
    mixture, terms = model.prototypes(z_ND, model.config.commitment)
    assert torch.equal(result.hidden_ND, z_ND) and torch.equal(result.mixture.indices_Nk, mixture.indices_Nk)
    for name in ("reconstruction", "prototype_to_token", "token_to_prototype"):
        assert torch.equal(getattr(result.terms, name), getattr(terms, name)), name
    assert torch.equal(block_states(model, items).z_nD, z_ND)
    assert 0 < len(z_ND) < kept.numel()


@pytest.mark.parametrize("prototypes", [0, 16])
def test_a_batch_without_targets_has_no_loss_and_gradients_of_zero(prototypes):
    model = model_of("gpt2", num_prototypes=prototypes)
    ids = torch.arange(24).view(2, 12)
    result = model.objective(ids, torch.full_like(ids, IGNORED_TARGET))
    assert result.loss == 0 and len(result.targets_N) == len(result.hidden_ND) == 0
    result.loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and not parameter.grad.any(), name


def test_unmasked_targets_take_the_way_without_selection():
    model, ids = model_of("gpt2", num_prototypes=16), torch.arange(24).view(2, 12)
    targets = ids.roll(-1, 1)
    result = model.objective(ids, targets)
    assert torch.equal(result.hidden_ND, model.hidden_states(ids).flatten(0, 1)) and len(result.targets_N) == 24


SMALL = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 32, "intermediate_size": 64}
GROUPED = SMALL | {"num_key_value_heads": 2, "head_dim": 16}
ISOLATING = {"gpt_neox": SMALL, "mistral": GROUPED, "qwen3": GROUPED, "gemma3_text": GROUPED}


@pytest.mark.parametrize("family", ISOLATING)
def test_families_keep_documents_apart(family):
    backbone = {"model_type": family, "vocab_size": 97, "max_position_embeddings": 64} | ISOLATING[family]
    check_isolation(PrismForCausalLM(PrismConfig(backbone_config=backbone)))


def test_a_decoder_that_lets_documents_see_each_other_is_refused():
    backbone = {"model_type": "openai-gpt", "n_layer": 2, "n_embd": 32, "n_head": 2, "n_positions": 64}
    model = PrismForCausalLM(PrismConfig(backbone_config=backbone | {"vocab_size": 97})).train()
    with pytest.raises(UserError, match="openai-gpt does not keep documents apart.*set data.isolate_documents false"):
        check_isolation(model)
    assert model.training


def test_a_decoder_without_positions_is_refused(monkeypatch):
    model = model_of("gpt2")
    forward = model.backbone.forward
    monkeypatch.setattr(model.backbone, "forward", lambda input_ids, use_cache: forward(input_ids, use_cache=use_cache))
    with pytest.raises(UserError, match="gpt2 takes no positions .*set data.isolate_documents false"):
        check_isolation(model)
