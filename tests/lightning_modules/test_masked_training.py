"""Training on masked data: every target weighs the same, however a step is divided, and masked ones weigh nothing."""

import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from support.fine_tuning import chat_data, completion_data

from prism_lightning.common.errors import UserError
from prism_lightning.common.targets import IGNORED_TARGET
from prism_lightning.data.order import block_at
from prism_lightning.lightning_modules.dense import DenseLM
from prism_lightning.lightning_modules.prism import PrismLM
from prism_lightning.training.post_training import evaluate

BACKBONE = {"model_type": "gpt2", "n_layer": 1, "n_embd": 32, "n_head": 2, "n_positions": 32, "vocab_size": 400}
BACKBONE |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
PROTOTYPES = {"num_prototypes": 64, "active_prototypes": 4, "placement_step": 2, "revival_interval": 3}
QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}


def fit(data, module, steps=6, callbacks=()):
    seed_everything(0, verbose=False)
    trainer = Trainer(
        accelerator="cpu",
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        max_steps=steps,
        max_epochs=-1,
        accumulate_grad_batches=data.accumulation,
        callbacks=list(callbacks),
        **QUIET,
    )
    trainer.fit(module, datamodule=data)
    return trainer


def module_of(kind, seed=0, **settings):
    seed_everything(seed, verbose=False)
    return kind(BACKBONE, warmup_steps=1, learning_rate=1e-2, **settings)


class FirstGradients(Callback):
    """Keeps the gradients of the first optimiser step."""

    def on_before_optimizer_step(self, trainer, module, optimizer):
        if trainer.global_step == 0:
            self.gradients = {name: p.grad.clone() for name, p in module.model.named_parameters()}


@pytest.mark.parametrize("micro_batch_size", [1, 2, 8])
def test_a_step_is_the_mean_over_its_targets(tmp_path, micro_batch_size):
    """Of micro-batches of one block some have no target: they weigh nothing."""
    data = chat_data(tmp_path, batch_size=8, micro_batch_size=micro_batch_size)
    counts = data.train.targets_in(block_at(range(8), len(data.train), 0))
    assert len(set(counts.tolist())) > 3
    module, seen = module_of(DenseLM), FirstGradients()
    twin = module_of(DenseLM).model
    fit(data, module, steps=1, callbacks=[seen])
    items = data.train.__getitems__(block_at(range(8), len(data.train), 0).tolist())
    total = 0.0
    for item in items:
        logits = twin(item["input_ids"][None], use_cache=False, position_ids=item["position_ids"][None]).logits[0]
        total += torch.nn.functional.cross_entropy(
            logits, item["targets"], ignore_index=IGNORED_TARGET, reduction="sum"
        )
    (total / counts.sum()).backward()
    for name, parameter in twin.named_parameters():
        torch.testing.assert_close(seen.gradients[name], parameter.grad, atol=1e-6, rtol=1e-4, msg=name)


def test_micro_batches_do_not_change_the_weights(tmp_path):
    weights = []
    for size in (2, 8):
        module = module_of(DenseLM)
        fit(chat_data(tmp_path, batch_size=8, micro_batch_size=size), module)
        weights.append(module.model.state_dict())
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, atol=1e-4, rtol=0, msg=name)


def test_validation_and_prediction_are_over_targets_alone(tmp_path):
    data = completion_data(tmp_path, micro_batch_size=4)
    module = module_of(PrismLM, **PROTOTYPES)
    trainer = fit(data, module)
    results = evaluate(module, data)
    batches = trainer.predict(module, datamodule=data)
    got = torch.cat([batch["log_probabilities"] for batch in batches])
    items = data.validation.__getitems__(list(range(len(data.validation))))
    targets = torch.stack([item["targets"] for item in items])
    assert torch.equal(got.isnan(), targets == IGNORED_TARGET) and 0 < got.isnan().sum() < got.numel()
    assert results["loss"] == pytest.approx(-got[~got.isnan()].mean().item(), rel=1e-4)
    bits = results["loss"] / (data.validation.bytes_per_token * torch.tensor(2.0).log().item())
    assert results["bits_per_byte"] == pytest.approx(bits, rel=1e-4)
    assert module.faithfulness_metric.tokens == 0  # reset


def test_statistics_count_tokens_with_targets(tmp_path):
    data = completion_data(tmp_path, micro_batch_size=64)
    module = module_of(PrismLM, **PROTOTYPES)
    for number, batch in enumerate(data.validation_loader()):
        module.validation_step(batch, number)
    targets = int(data.validation.targets_in(range(len(data.validation))).sum())
    batches = -(-len(data.validation) // 64)
    assert module.usage_metric.tokens == module.loss_metric.tokens == targets
    assert module.faithfulness_metric.tokens == pytest.approx(targets / 7, abs=batches)
    assert module.faithfulness_metric.counts_V.sum() == module.faithfulness_metric.tokens


def test_usage_while_training_counts_tokens_with_targets(tmp_path):
    data = completion_data(tmp_path, batch_size=8, micro_batch_size=4)
    module = module_of(PrismLM, **PROTOTYPES | {"placement_step": 0, "revival_interval": 0})
    fit(data, module, steps=3)
    expected = sum(data.targets_in_step(step) for step in range(3))
    assert 0 < module.usage_K.sum() <= 4 * expected < 4 * 3 * 8 * 32
    assert module.usage_K.sum() > 3.5 * expected  # nearly all cosines are positive at placement


@pytest.mark.parametrize("tokens", [100, 5000])
def test_samples_have_as_many_tokens_with_targets_as_asked(tmp_path, tokens):
    """Also more than the corpus has, as the order of blocks goes on."""
    data = completion_data(tmp_path)
    module = module_of(PrismLM, **PROTOTYPES)
    fit(data, module, steps=1)
    z_ND = module.sampled_hidden_states(3, tokens)
    blocks = module._sampled_blocks(3, tokens, 1)
    first = 3 * -(-tokens // 32)
    assert blocks == block_at(range(first, first + len(blocks)), len(data.train), 1).tolist()
    expected = []
    for item in data.train.__getitems__(blocks):
        z_TD = module.model.hidden_states(item["input_ids"][None], position_ids=item["position_ids"][None])[0]
        expected.append(z_TD[item["targets"] != IGNORED_TARGET])
    torch.testing.assert_close(z_ND, torch.cat(expected))
    assert tokens <= len(z_ND) < 3 * tokens + 32


def test_a_decoder_that_cannot_isolate_is_refused_before_training(tmp_path):
    data = completion_data(tmp_path)
    backbone = {"model_type": "openai-gpt", "n_layer": 2, "n_embd": 32, "n_head": 2, "n_positions": 32}
    module = DenseLM(backbone | {"vocab_size": 300})
    with pytest.raises(UserError, match="set data.isolate_documents false"):
        module.check_data(data)
    module.check_data(completion_data(tmp_path, isolate_documents=False))
