"""Train one small model on some of the sequences, as `fit` would: PrismLM in Lightning's own loop, nothing logged."""

from __future__ import annotations

import logging
import warnings
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from benchmarks.attribution.config import Settings
from benchmarks.attribution.corpus import SequenceData, SequenceStore
from benchmarks.attribution.task import losses_of_batch
from prism_lightning.lightning_modules.dense import DenseLM
from prism_lightning.lightning_modules.prism import PrismLM
from prism_lightning.models import PrismForCausalLM

DENSE, UNTRAINED = "dense", "untrained"


def fit_model(settings: Settings, train_SL: Tensor, commitment: float | str, seed: int) -> PrismForCausalLM:
    """Return a trained model in eval mode.

    Args:
        settings: of the run.
        train_SL: what it is trained on.
        commitment: of a PRISM model, `DENSE` for its dense twin, or `UNTRAINED` for that twin as it starts.
        seed: of the initial weights and of the order of the sequences.
    """
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.manual_seed(seed)
    arguments: dict[str, Any] = dict(settings.model)
    sizes = {"vocab_size": settings.corpus.vocab_size, "max_position_embeddings": settings.corpus.tokens}
    backbone = dict(arguments.pop("backbone")) | sizes
    if isinstance(commitment, str):
        shared_settings = (
            "learning_rate",
            "weight_decay",
            "betas",
            "schedule",
            "warmup_steps",
            "final_learning_rate_share",
        )
        module = DenseLM(backbone, **{name: value for name, value in arguments.items() if name in shared_settings})
    else:
        module = PrismLM(backbone, **arguments, commitment=commitment)
    store = SequenceStore(train_SL, settings.folder, settings.corpus.vocab_size)
    if commitment == UNTRAINED:
        return module.model.eval()
    steps = settings.training.epochs * len(train_SL) // settings.training.batch_size
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's advice on loader workers and logging
        trainer = Trainer(
            accelerator="cpu",
            max_steps=steps,
            gradient_clip_val=1.0,
            limit_val_batches=0,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, datamodule=SequenceData(store, settings.training.batch_size, seed))
    return module.model.eval()


@torch.no_grad()
def target_losses(model: PrismForCausalLM, ids_QL: Tensor) -> Tensor:
    """Return the cross-entropy [Q, T] in nats of every target, a bounded number of sequences at a time."""
    return torch.cat([losses_of_batch(model, part_QL) for part_QL in ids_QL.split(64)])
