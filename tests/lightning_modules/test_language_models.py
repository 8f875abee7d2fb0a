"""Training through Lightning: placement, revival, the dense twin, and stopping before harm is done."""

import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything

from prism_lightning.common.errors import UserError
from prism_lightning.lightning_modules.dense import DenseLM
from prism_lightning.lightning_modules.prism import PrismLM
from prism_lightning.lightning_modules.text_data import TextData

BACKBONE = {"model_type": "gpt2", "n_layer": 1, "n_embd": 32, "n_head": 2, "n_positions": 32, "vocab_size": 400}
BACKBONE |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
PROTOTYPES = {"num_prototypes": 64, "active_prototypes": 4, "placement_step": 3, "revival_interval": 4}


@pytest.fixture
def fit(corpus, cache):
    def run(module_class, steps=12, callbacks=(), trainer=None, backbone=None, **settings):
        seed_everything(0, verbose=False)
        data = TextData(
            path=f"{corpus}/*.txt",
            vocab_size=400,
            block_size=32,
            validation_fraction=0.2,
            validation_blocks=16,
            cache_dir=str(cache),
        )
        module = module_class(BACKBONE | (backbone or {}), warmup_steps=4, **settings)
        flags = {
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
        }
        settings = {
            "max_steps": steps,
            "max_epochs": -1,
            "val_check_interval": steps,
            "check_val_every_n_epoch": None,
            "gradient_clip_val": 0.1,
        }
        Trainer(
            accelerator="cpu",
            use_distributed_sampler=False,
            num_sanity_val_steps=0,
            callbacks=list(callbacks),
            **flags,
            **settings,
            **trainer or {},
        ).fit(module, datamodule=data)
        return module

    return run


class Remember(Callback):
    """Keeps the prototypes at the start of every step."""

    def __init__(self):
        self.tables, self.metrics = [], {}

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.tables.append(module.model.prototypes.weight.detach().clone())

    def on_validation_end(self, trainer, module):
        self.metrics = {name: value.item() for name, value in trainer.callback_metrics.items()}


def test_at_commitment_zero_the_decoder_trains_exactly_as_its_dense_twin(fit):
    dense, prism = fit(DenseLM), fit(PrismLM, **PROTOTYPES, commitment=0.0)
    twin = prism.model.state_dict()
    for name, value in dense.model.state_dict().items():
        # Not bit for bit: the clipping norm sees the prototypes' gradient, scaled to a thousandth.
        torch.testing.assert_close(twin[name], value, atol=2e-5, rtol=0, msg=name)


def test_commitment_changes_the_decoder(fit):
    dense, prism = fit(DenseLM), fit(PrismLM, **PROTOTYPES, commitment=1.0)
    assert not torch.allclose(dense.model.lm_head.weight, prism.model.lm_head.weight, atol=1e-4)


def test_prototypes_are_placed_on_hidden_states_and_reported(fit):
    seen = Remember()
    fit(PrismLM, callbacks=[seen], **PROTOTYPES)
    assert seen.tables[0].norm(dim=-1).mean() < 0.5  # as drawn
    before, after = seen.tables[2], seen.tables[4]
    assert (after - before).abs().mean() > 0.1
    names = {"loss", "perplexity", "bits_per_byte", "unexplained_variance", "prototype_to_token", "token_to_prototype"}
    names |= {"dead_share", "usage_entropy", "active_per_token"}
    assert {f"val/{name}" for name in names} <= set(seen.metrics)
    assert 0 < seen.metrics["val/unexplained_variance"] < 0.9
    assert 0 < seen.metrics["val/active_per_token"] <= 4


def test_dead_prototypes_are_revived(fit):
    class Kill(Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            weight = module.model.prototypes.weight.data
            if module.global_step == 4:  # far from everything: no token will choose these
                weight[:8] = -weight[8:16].mean(0)
                self.before = weight.clone()

    kill = Kill()
    module = fit(PrismLM, callbacks=[kill], **PROTOTYPES, prototype_learning_rate=0.0, prototype_to_token_weight=0.0)
    weight_KD = module.model.prototypes.weight.detach()
    assert (weight_KD[:8] != kill.before[:8]).any(1).all()
    directions_KD = torch.nn.functional.normalize(weight_KD[:8], dim=-1)
    assert (directions_KD @ torch.nn.functional.normalize(kill.before[0], dim=-1)).max() < 0.5
    assert (directions_KD @ directions_KD.T).triu(1).max() < 0.999  # each on a token of its own


class Sampled(Callback):
    """Draws the hidden states of a step under two states of the random number generator, as two ranks would."""

    def on_train_end(self, trainer, module):
        module.train()
        self.found = []
        for seed in range(2):
            torch.manual_seed(seed)
            self.found.append(module.sampled_hidden_states(0, 64))
        assert module.model.training


def test_ranks_see_the_same_hidden_states_under_dropout(fit):
    sampled = Sampled()
    dropout = dict.fromkeys(["resid_pdrop", "embd_pdrop", "attn_pdrop"], 0.5)
    fit(PrismLM, steps=1, callbacks=[sampled], backbone=dropout, **PROTOTYPES)
    assert torch.equal(*sampled.found)


def test_settings_that_training_cannot_use_are_named_at_once():
    with pytest.raises(UserError) as error:
        PrismLM(BACKBONE, placement_step=-1, polish_tokens=0, polish_learning_rate=-1.0)
    assert [problem.split()[0] for problem in error.value.problems] == [
        *("model.placement_step", "model.polish_tokens", "model.polish_learning_rate")
    ]
    with pytest.raises(UserError, match=r"model.learning_rate is -1.*\n.*weight_decay.*\n.*betas"):
        DenseLM(BACKBONE, learning_rate=-1, weight_decay=-1, betas=(0.9, 1.5))


def test_a_run_that_ends_before_prototypes_are_placed_says_so(fit):
    with pytest.warns(UserWarning, match="will not be placed"):
        fit(PrismLM, steps=1, **PROTOTYPES)


def test_prototypes_learn_at_their_own_rate(fit):
    seen = Remember()
    still = fit(PrismLM, callbacks=[seen], **PROTOTYPES | {"revival_interval": 0}, prototype_learning_rate=0.0)
    assert torch.equal(seen.tables[4], still.model.prototypes.weight)
    moving = fit(PrismLM, **PROTOTYPES | {"revival_interval": 0}, prototype_learning_rate=1e-2)
    assert not torch.equal(still.model.prototypes.weight, moving.model.prototypes.weight)


def test_a_non_finite_loss_stops_and_names_step_and_blocks(fit):
    class Poison(Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            self.blocks = batch["block_ids"].tolist()
            if module.global_step == 2:
                module.model.lm_head.weight.data[0] = float("nan")

    poison = Poison()
    with pytest.raises(UserError) as error:
        fit(DenseLM, callbacks=[poison])
    assert "step 2" in str(error.value) and str(poison.blocks) in str(error.value)


def test_wsd_bf16_and_gradient_checkpointing_train(fit):
    """Every parameter learns, and the rates are the schedule's: 4 steps of warm-up, then flat, at last falling."""

    class Rates(Callback):
        def __init__(self):
            self.rates = []

        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])
            if not batch_idx:
                self.before = {name: value.detach().clone() for name, value in module.named_parameters()}

    rates, more = Rates(), {"precision": "bf16-mixed"}
    module = fit(PrismLM, callbacks=[rates], **PROTOTYPES, schedule="wsd", trainer=more, gradient_checkpointing=True)
    for name, value in module.named_parameters():
        assert torch.isfinite(value).all() and not torch.equal(value, rates.before[name]), name
    peak = max(rates.rates)
    assert rates.rates[:4] == sorted(set(rates.rates[:4])) and rates.rates[0] < 0.5 * peak
    assert rates.rates[4:10] == pytest.approx([peak] * 6) and rates.rates[-1] < peak


def test_learning_on_real_text(fit):
    """Enough steps for the loss to fall well below the uniform log 400 = 5.99."""
    seen = Remember()
    fit(
        PrismLM,
        steps=100,
        callbacks=[seen],
        **PROTOTYPES | {"placement_step": 20, "revival_interval": 20},
        learning_rate=1e-2,
    )
    assert seen.metrics["val/loss"] < 5.1
    assert seen.metrics["val/unexplained_variance"] < 0.3


def test_too_long_blocks_and_too_large_tokenizers_are_refused(corpus, cache):
    data = TextData(
        path=f"{corpus}/*.txt", vocab_size=400, block_size=32, validation_fraction=0.2, cache_dir=str(cache)
    )
    data.setup()
    with pytest.raises(UserError, match="longer than the model's context of 16"):
        DenseLM(BACKBONE | {"n_positions": 16}).check_data(data)
    with pytest.raises(UserError, match="400 tokens but the model's vocabulary 300"):
        DenseLM(BACKBONE | {"vocab_size": 300}).check_data(data)
