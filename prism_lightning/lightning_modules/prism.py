"""PrismLM: the dense baseline's training with a layer of prototypes on top.

Shape suffixes: B blocks, T positions, N tokens, D hidden size, K prototypes, k active prototypes per token.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torchmetrics import MeanMetric

from prism_lightning.common.errors import UserError
from prism_lightning.data.order import block_at
from prism_lightning.lightning_modules.dense import Batch, DenseLM
from prism_lightning.lightning_modules.metrics import Faithfulness, PrototypeUsage
from prism_lightning.lightning_modules.sharding import gathered, write_parameter
from prism_lightning.models import Mixture, Objective, PrototypeLayer
from prism_lightning.models.blocks import block_states
from prism_lightning.models.encoders import EncoderName, mean_metric
from prism_lightning.models.faithfulness import faithfulness_figures
from prism_lightning.models.metric_coordinates import first_prototypes
from prism_lightning.models.polishing import PEAK_LEARNING_RATES
from prism_lightning.models.prototypes import prototypes_from, revived_prototypes, unexplained_variance

# Clipping uses the norm of all gradients together, the only kind that DeepSpeed has. With the prototypes' gradient at
# full size in this norm, the decoder's loss was 0.0085 nats higher after 600 quickstart steps at commitment 0, where it
# should train exactly as its dense twin. Adam with a small epsilon is invariant to the gradient's scale.
PROTOTYPE_GRADIENT_SCALE = 1e-3

# Logged name of each prototype term, and its field in `PrototypeTerms`.
TERMS = {
    "unexplained_variance": "reconstruction",
    "prototype_to_token": "prototype_to_token",
    "token_to_prototype": "token_to_prototype",
}


class PrismLM(DenseLM):
    """The PRISM twin: the same decoder and head, with a layer of prototypes at its output.

    Args:
        backbone: settings of a new Hugging Face decoder with its `model_type`, e.g. {model_type: gpt2, n_layer: 12}.
        num_prototypes: number of prototypes, K.
        active_prototypes: largest number of prototypes that are active for one token, k.
        encoder: how they are chosen: "cosine" takes those of largest cosine, "pursuit" those that predict most alike.
        reconstruction_weight: weight w_rec of the share of variance that the prototypes leave unexplained.
        prototype_to_token_weight: weight w_p2t of the mean distance from each prototype to its nearest token.
        token_to_prototype_weight: weight w_t2p of the mean distance from each token to its nearest prototype.
        commitment: factor on the gradient that these three losses send to the decoder, from 0 (none) to 1 (the same as
            to the prototypes).
        cross_entropy_to_prototypes: whether the cross-entropy also trains the prototypes.
        placement_step: optimiser step at which the prototypes are set to hidden states of training tokens.
        revival_interval: number of optimiser steps between revivals of prototypes that no token used in between;
            0 turns revivals off.
        prototype_learning_rate: peak learning rate of the prototypes.
        polish_steps: number of Adam steps that fit the prototypes to the frozen decoder at the end of `fit`; 0 skips
            polishing.
        polish_tokens: number of training tokens whose hidden states are used for polishing.
        polish_learning_rate: peak learning rate of polishing (default 0.01; with pursuit 0.05, as a share of the
            prototypes' root mean square).
        **kwargs: settings of `DenseLM`.

    Raises:
        UserError: settings out of range, all at once, or as `DenseLM`.
    """

    usage_K: Tensor

    def __init__(
        self,
        backbone: dict[str, Any] | None = None,
        num_prototypes: int = 2048,
        active_prototypes: int = 4,
        reconstruction_weight: float = 1.0,
        prototype_to_token_weight: float = 0.1,
        token_to_prototype_weight: float = 0.1,
        commitment: float = 0.1,
        cross_entropy_to_prototypes: bool = False,
        placement_step: int = 100,
        revival_interval: int = 100,
        prototype_learning_rate: float = 1e-2,
        polish_steps: int = 300,
        polish_tokens: int = 131_072,
        polish_learning_rate: float | None = None,
        encoder: EncoderName = "cosine",
        **kwargs: Any,
    ) -> None:
        self._prism_settings: dict[str, Any] = {
            "num_prototypes": num_prototypes,
            "active_prototypes": active_prototypes,
            "encoder": encoder,
            "reconstruction_weight": reconstruction_weight,
            "prototype_to_token_weight": prototype_to_token_weight,
            "token_to_prototype_weight": token_to_prototype_weight,
            "commitment": commitment,
            "cross_entropy_to_prototypes": cross_entropy_to_prototypes,
        }
        if num_prototypes < 1:
            raise UserError(f"model.num_prototypes is {num_prototypes}: give a positive number, or train DenseLM")
        check_minimums(
            placement_step=(placement_step, 0),
            revival_interval=(revival_interval, 0),
            polish_steps=(polish_steps, 0),
            polish_tokens=(polish_tokens, 1),
            prototype_learning_rate=(prototype_learning_rate, 0),
            polish_learning_rate=(polish_learning_rate or 0, 0),
        )
        super().__init__(backbone, **kwargs)
        self.placement_step, self.revival_interval = placement_step, revival_interval
        self.prototype_learning_rate = prototype_learning_rate
        self.polish_steps, self.polish_tokens = polish_steps, polish_tokens
        self.polish_learning_rate = (
            PEAK_LEARNING_RATES[encoder] if polish_learning_rate is None else polish_learning_rate
        )
        # Active tokens since the last revival, summed over ranks, so that every rank's checkpoint is the same.
        self.register_buffer("usage_K", torch.zeros(num_prototypes, dtype=torch.long))
        self.terms_metric: dict[str, MeanMetric] = torch.nn.ModuleDict({name: MeanMetric() for name in TERMS})  # type: ignore[assignment]
        self.usage_metric = PrototypeUsage(num_prototypes)
        self.faithfulness_metric = Faithfulness(self.model.config.hidden_size, self.model.config.vocab_size)

    @property
    def layer(self) -> PrototypeLayer:
        """The model's prototype layer."""
        assert self.model.prototypes is not None
        return self.model.prototypes

    def _prototype_settings(self) -> dict[str, Any]:
        return self._prism_settings

    def setup(self, stage: str) -> None:
        """Check the data as `DenseLM` does, and warn where training ends before the prototypes are placed."""
        super().setup(stage)
        if stage == "fit" and 0 <= self.trainer.max_steps <= self.placement_step:
            rank_zero_warn(
                f"model.placement_step is {self.placement_step} and trainer.max_steps {self.trainer.max_steps}: the"
                " prototypes will not be placed on hidden states; lower the former"
            )

    def objective(self, batch: Batch) -> Objective:
        """Return the training objective (method, section 3). Before placement, prototypes do not train the decoder."""
        placed = not self.training or self.global_step >= self.placement_step
        return self.model.objective(
            batch["input_ids"],
            batch["targets"],
            None if placed else 0.0,
            prototype_gradient_scale=PROTOTYPE_GRADIENT_SCALE,
            position_ids_BT=batch.get("position_ids"),
        )

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Place the prototypes or revive dead ones, at the first micro-batch of the steps due (method, section 3)."""
        super().on_train_batch_start(batch, batch_idx)
        step = self.global_step
        if batch_idx % self.trainer.accumulate_grad_batches:
            return
        if step == self.placement_step:
            self._write_prototypes(self._placed(step))
        elif (
            self.revival_interval
            and step > self.placement_step
            and (step - self.placement_step) % self.revival_interval == 0
        ):
            self._revive(step)

    def _placed(self, step: int) -> Tensor:
        rows = self.model.config.num_prototypes
        z_ND = self.sampled_hidden_states(step, tokens=2 * rows)
        if self.layer.metric is not None:
            self.layer.metric.copy_(mean_metric(self.model.lm_head.weight.detach(), z_ND))
            return first_prototypes(z_ND, rows)
        return prototypes_from(z_ND, rows, self.model.config.active_prototypes, self._generator(step))

    def _revive(self, step: int) -> None:
        dead_K = self.usage_K == 0
        self.log("train/revived", dead_K.sum().float(), rank_zero_only=True)
        if dead_K.any():
            z_ND = self.sampled_hidden_states(step, tokens=4096)
            with torch.no_grad():
                mixture, _ = self.layer(z_ND, head_VD=self.model.lm_head.weight)
                with gathered(self.layer.weight):
                    table_KD = self.layer.weight.detach().clone().float()
            table_KD = revived_prototypes(
                table_KD, dead_K, z_ND.float(), mixture.mixture_ND.float(), self._generator(step)
            )
            self._write_prototypes(table_KD)
        self.usage_K.zero_()

    def _write_prototypes(self, table_KD: Tensor) -> None:
        write_parameter(self.layer.weight, table_KD)
        self.usage_K.zero_()

    @torch.no_grad()
    def sampled_hidden_states(self, step: int, tokens: int, salt: int = 1) -> Tensor:
        """Return hidden states [N, D] of tokens of training blocks whose targets are not masked, at least `tokens`.

        The blocks depend on the data's seed, `salt` and `step` alone: all ranks and resumed runs use the same.
        """
        data = self.data
        blocks = self._sampled_blocks(step, tokens, salt)
        training = self.model.training
        self.model.eval()  # dropout would differ between ranks
        size = data.micro_batch_size
        z_ND = torch.cat(
            [
                block_states(self.model, data.train.__getitems__(blocks[start : start + size])).z_nD
                for start in range(0, len(blocks), size)
            ]
        )
        self.model.train(training)
        return z_ND

    def _sampled_blocks(self, step: int, tokens: int, salt: int) -> list[int]:
        """Return the numbers of blocks with at least so many targets together."""
        train, seed = self.data.train, self.data.seed + salt
        count = -(-tokens // self.data.block_size)
        first = step * count
        blocks = block_at(first + np.arange(count), len(train), seed)
        while train.masked and (missing := tokens - int(train.targets_in(blocks).sum())) > 0:
            more = np.arange(len(blocks), len(blocks) + -(-missing // self.data.block_size))
            blocks = np.append(blocks, block_at(first + more, len(train), seed))
        return blocks.tolist()

    def _generator(self, step: int) -> torch.Generator:
        return torch.Generator().manual_seed(self.data.seed * 1_000_003 + step)

    def _counts(self, mixture: Mixture) -> Tensor:
        active = mixture.indices_Nk[mixture.activations_Nk > 0]
        return torch.bincount(active, minlength=self.model.config.num_prototypes)

    def log_training(self, result: Objective) -> None:
        """Count the prototypes' active tokens and log the objective's prototype terms."""
        assert result.mixture is not None
        self.usage_K += self.trainer.strategy.reduce(self._counts(result.mixture), reduce_op="sum")
        for name in TERMS:
            self.log(f"train/{name}", getattr(result.terms, TERMS[name]).detach())

    def update_diagnostics(self, result: Objective, targets_N: Tensor) -> None:
        """Add a validation batch to the prototypes' metrics."""
        assert result.mixture is not None
        tokens = result.mixture.indices_Nk.shape[0]
        values = {name: getattr(result.terms, TERMS[name]) for name in TERMS}
        # Not the term of the loss, which a pursuit measures in its own metric.
        values["unexplained_variance"] = unexplained_variance(result.hidden_ND, result.mixture.mixture_ND)
        for name, metric in self.terms_metric.items():
            metric.update(values[name], weight=tokens)
        self.usage_metric.update(self._counts(result.mixture), tokens)
        self.faithfulness_metric.update(self.model.lm_head, result.hidden_ND, result.mixture.mixture_ND, targets_N)

    def diagnostics(self) -> dict[str, Tensor]:
        """Return unexplained variance, mean distances, usage and faithfulness of the prototypes, and reset them."""
        values = {name: metric.compute() for name, metric in self.terms_metric.items()} | self.usage_metric.compute()
        values |= faithfulness_figures(self.faithfulness_metric.compute(), self.model.lm_head)
        for metric in (*self.terms_metric.values(), self.usage_metric, self.faithfulness_metric):
            metric.reset()
        return values


def check_minimums(**values_and_minimums: tuple[float, int]) -> None:
    """Raise UserError for all settings of the model that are below their minimum or NaN."""
    problems = [
        f"model.{name} is {value}: give at least {minimum}"
        for name, (value, minimum) in values_and_minimums.items()
        if not value >= minimum  # NaN compares false
    ]
    if problems:
        raise UserError(problems)
