"""DenseLM: a decoder and its head, trained by Lightning.

Shape suffixes: B blocks, T positions, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from prism_lightning.common.errors import UserError
from prism_lightning.common.targets import IGNORED_TARGET
from prism_lightning.lightning_modules.metrics import (
    LanguageModelingMetric,
    derived,
)
from prism_lightning.lightning_modules.optimizer import parameter_groups
from prism_lightning.lightning_modules.schedules import Schedule, lr_schedule
from prism_lightning.lightning_modules.text_data import TextData
from prism_lightning.models import Objective
from prism_lightning.models.initial import initial_model
from prism_lightning.models.isolation import check_isolation
from prism_lightning.models.low_rank import LoraSettings, add_adapters

Batch = dict[str, Tensor]  # as of `TokenStore`: input_ids [B, T], targets [B, T], block_ids [B], maybe position_ids


class DenseLM(LightningModule):
    """The dense baseline: a decoder and its head.

    Args:
        backbone: settings of a new Hugging Face decoder with its `model_type`, e.g. {model_type: gpt2, n_layer: 12}.
        pretrained: hub id or folder of a pretrained decoder to start from, in place of `backbone`; the data then have
            its tokenizer. A folder with a peft adapter is its base model with the adapter merged.
        gguf_file: name of a GGUF file of `pretrained`, whose weights are dequantised.
        lora: train low-rank adapters of `pretrained` and not its weights; they are merged at the end of `fit`.
        learning_rate: peak learning rate of decoder and head.
        weight_decay: AdamW's weight decay of matrices; biases, norms and prototypes have none.
        betas: AdamW's decay rates of the gradient's first and second moment.
        schedule: learning-rate schedule after the warm-up: "cosine", or "wsd" (stable, then linear decay over the last
            fifth).
        warmup_steps: number of optimiser steps of linear warm-up.
        final_learning_rate_share: learning rate at the last step, as a share of the peak.
        gradient_checkpointing: whether to recompute activations in the backward pass, which saves memory and takes
            about a third more time.
        compile: whether to compile the decoder with torch.compile.

    Raises:
        UserError: settings out of range, all at once, or a decoder that cannot be built or opened.
    """

    num_prototypes = 0

    def __init__(
        self,
        backbone: dict[str, Any] | None = None,
        learning_rate: float = 3e-3,
        weight_decay: float = 0.1,
        betas: tuple[float, float] = (0.9, 0.95),
        schedule: Schedule = "cosine",
        warmup_steps: int = 100,
        final_learning_rate_share: float = 0.1,
        gradient_checkpointing: bool = False,
        compile: bool = False,
        pretrained: str | None = None,
        gguf_file: str | None = None,
        lora: LoraSettings | None = None,
    ) -> None:
        super().__init__()
        problems = [] if learning_rate >= 0 else [f"model.learning_rate is {learning_rate}: give a positive number"]
        if not weight_decay >= 0:
            problems.append(f"model.weight_decay is {weight_decay}: give 0 or more")
        if not all(0 <= beta < 1 for beta in betas):
            problems.append(f"model.betas are {tuple(betas)}: give numbers from 0 to below 1")
        if lora and pretrained is None:
            problems.append("model.lora needs model.pretrained: adapters of a new decoder would train nothing of it")
        if problems:
            raise UserError(problems)
        self.learning_rate, self.weight_decay, self.betas = learning_rate, weight_decay, betas
        self.schedule: Schedule = schedule
        self.warmup_steps, self.final_learning_rate_share = warmup_steps, final_learning_rate_share
        self.prototype_learning_rate = 0.0
        self.model = initial_model(backbone, pretrained, gguf_file, **self._prototype_settings())
        self.lora = LoraSettings(**lora) if isinstance(lora, dict) else lora
        if self.lora:
            add_adapters(self.model, self.lora)
        if gradient_checkpointing:
            self.model.activation_checkpointing_enable()
        if compile:
            self.model.backbone.compile()
        self.loss_metric = LanguageModelingMetric()
        self._isolation_checked = False

    def _prototype_settings(self) -> dict[str, Any]:
        """Return the settings of `PrismConfig` about prototypes."""
        return {}

    @property
    def data(self) -> TextData:
        """The trainer's data module."""
        return self.trainer.datamodule  # type: ignore[attr-defined]

    def setup(self, stage: str) -> None:
        """Check the data against the model before anything is computed.

        Raises:
            UserError: as `check_data`.
        """
        self.check_data(self.data)

    def check_data(self, data: TextData) -> None:
        """Check that the prepared data fit the model.

        Raises:
            UserError: blocks longer than the context, token ids outside the vocabulary, or isolated documents in a
                decoder that cannot keep them apart.
        """
        config = self.model.config
        if data.block_size > config.context_length:
            fix = "lower it" if config.base_model else "lower it or raise the backbone's positions"
            raise UserError(
                f"data.block_size {data.block_size} is longer than the model's context of {config.context_length}:"
                f" {fix}"
            )
        size = data.train.manifest["tokenizer_size"]
        if size > config.vocab_size:
            fix = "give a model with the tokenizer of its own" if config.base_model else "raise backbone.vocab_size"
            raise UserError(f"the tokenizer has {size} tokens but the model's vocabulary {config.vocab_size}: {fix}")
        if data.train.isolated and not self._isolation_checked:
            check_isolation(self.model)
            self._isolation_checked = True  # before a strategy shards the weights

    def summary(self, data: TextData) -> str:
        """Return one line with the kind of model, its number of parameters, and the size of the training data."""
        parameters = sum(p.numel() for p in self.model.parameters())
        config = self.model.config
        kind = f"PRISM with {config.num_prototypes:,} prototypes" if config.num_prototypes else "dense"
        if config.base_model:
            kind += f" from {config.base_model}"
        trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        of_them = f" ({trained:,} of them trained)" if trained < parameters else ""
        counts = data.train.counts
        targets = f" ({counts['targets']:,} of them targets)" if "targets" in counts else ""
        tokens = f"{counts['tokens']:,} tokens{targets} of {counts['documents']:,} documents"
        return f"{kind}, {parameters:,} parameters{of_them}, on {tokens}"

    def configure_optimizers(self) -> dict[str, Any]:  # type: ignore[override]
        """Return AdamW over the groups of `parameter_groups`, and its schedule, stepped once per optimiser step."""
        groups = parameter_groups(self.model, self.learning_rate, self.prototype_learning_rate, self.weight_decay)
        # Lightning refuses to clip for a fused optimiser under mixed precision, also for bf16, which scales nothing.
        optimizer = torch.optim.AdamW(groups, betas=self.betas, fused="mixed" not in str(self.trainer.precision))
        scheduler = lr_schedule(
            optimizer, self.schedule, self.warmup_steps, self.trainer.max_steps, self.final_learning_rate_share
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Recompute the number of batches done from the number of steps, and restart an interrupted validation.

        A step takes another number of batches when devices or micro-batches have changed since the checkpoint. The
        metrics of a validation's first part are not in the checkpoint.
        """
        batches_done = checkpoint["global_step"] * self.trainer.accumulate_grad_batches
        loops = checkpoint["loops"]["fit_loop"]
        validation = loops["epoch_loop.val_loop.batch_progress"]
        validation["current"] = dict.fromkeys(validation["current"], 0)
        progress = loops["epoch_loop.batch_progress"]
        for counts in (progress["total"], progress["current"]):
            surplus = counts["ready"] - batches_done
            counts.update({name: count - surplus for name, count in counts.items()})

    def objective(self, batch: Batch) -> Objective:
        """Return the training objective of a batch."""
        return self.model.objective(batch["input_ids"], batch["targets"], position_ids_BT=batch.get("position_ids"))

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Seed the dropout of a micro-batch by seed, batch and rank alone, so that a resumed run repeats it."""
        torch.manual_seed(hash((self.data.seed, batch_idx, self.global_rank)) % 2**63)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the loss of one micro-batch.

        Raises:
            UserError: the loss is not finite on some rank.
        """
        result = self.objective(batch)
        self._check_finite(result.loss, batch)
        self.log("train/loss", result.cross_entropy.detach(), prog_bar=True)
        self.log_training(result)
        loss = result.loss
        if self.data.train.masked:
            loss = loss * self._target_weight(len(result.targets_N))
        if self.trainer.strategy.handles_gradient_accumulation:
            # Lightning divides by the accumulation, and DeepSpeed divides again. At accumulation 2 the gradients would
            # be half as large and less often clipped: after 8 tiny steps weights were off by 2.6e-4, now by under 1e-6.
            return loss * self.trainer.accumulate_grad_batches
        return loss

    def _target_weight(self, targets: int) -> float:
        """Return the weight of a micro-batch: its targets over the mean of all micro-batches and ranks of the step.

        The mean over micro-batches and ranks is then the mean over targets, however the step is divided.
        """
        total = self.data.targets_in_step(self.global_step)
        parts = self.trainer.accumulate_grad_batches * self.trainer.world_size
        return targets * parts / total if total else 0.0

    def log_training(self, result: Objective) -> None:
        """Log diagnostics of a training batch beyond its loss; the dense model has none."""

    def _check_finite(self, loss: Tensor, batch: Batch) -> None:
        """Raise UserError on all ranks if any rank's loss is not finite, before it reaches weights or a checkpoint."""
        finite = bool(torch.isfinite(loss.detach()))
        if self.trainer.strategy.reduce_boolean_decision(finite, all=True):
            return
        blocks = torch.as_tensor(self.all_gather(batch["block_ids"])).flatten().tolist()
        raise UserError(
            f"the loss is not finite at step {self.global_step} (training blocks {blocks}): lower"
            " trainer.gradient_clip_val and run the same command again to resume from the last checkpoint, or start"
            " anew with a lower model.learning_rate in another run.dir"
        )

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Add a batch to the metrics of the validation."""
        result = self.objective(batch)
        self.loss_metric.update(result.cross_entropy, len(result.targets_N))
        self.update_diagnostics(result, result.targets_N)

    def update_diagnostics(self, result: Objective, targets_N: Tensor) -> None:
        """Add a validation batch to metrics beyond its loss; the dense model has none."""

    def diagnostics(self) -> dict[str, Tensor]:
        """Return the metrics of the validation beyond its loss, and reset them."""
        return {}

    def on_validation_epoch_end(self) -> None:
        """Log loss, perplexity, bits per byte and diagnostics of the whole validation."""
        self._log_evaluation("val")

    def evaluation(self, bytes_per_token: float) -> dict[str, Tensor]:
        """Return loss, perplexity, bits per byte and diagnostics of all batches since the last call, and reset them."""
        values = derived(self.loss_metric.compute(), bytes_per_token) | self.diagnostics()
        self.loss_metric.reset()
        return values

    def _log_evaluation(self, prefix: str) -> None:
        values = self.evaluation(self.data.validation.bytes_per_token)
        self.log_dict({f"{prefix}/{name}": value.float() for name, value in values.items()}, rank_zero_only=True)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Add a batch to the metrics, as in validation."""
        self.validation_step(batch, batch_idx)

    def on_test_epoch_end(self) -> None:
        """Log the metrics of the validation under `test/`."""
        self._log_evaluation("test")

    def predict_step(self, batch: Batch, batch_idx: int) -> Batch:
        """Return the log-probability [B, T] (nats) of every target, NaN where it is masked, and the blocks' ids [B]."""
        positions = {name: batch[name] for name in ("position_ids",) if name in batch}
        logits_BTV = self.model(batch["input_ids"], use_cache=False, **positions).logits
        masked_BT = batch["targets"] == IGNORED_TARGET
        targets_BT1 = batch["targets"].where(~masked_BT, 0)[..., None]
        log_probabilities_BT = logits_BTV.float().log_softmax(-1).gather(-1, targets_BT1)[..., 0]
        log_probabilities_BT = log_probabilities_BT.masked_fill(masked_BT, torch.nan)
        return {"block_ids": batch["block_ids"].cpu(), "log_probabilities": log_probabilities_BT.cpu()}
