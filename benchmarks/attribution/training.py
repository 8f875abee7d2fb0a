"""Train one small model on some of the sequences, as `fit` would: PrismLM in Lightning's own loop, nothing logged."""

from __future__ import annotations

import inspect
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
from prism_lightning.models.low_rank import take_out_adapters

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
    module = new_module(settings, commitment)
    if commitment == UNTRAINED:
        return module.model.eval()
    store = SequenceStore(train_SL, settings.folder, module.model.config.vocab_size)
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
            enable_progress_bar="pretrained" in settings.model,  # small models train in seconds, several at once
            enable_model_summary=False,
        )
        trainer.fit(module, datamodule=SequenceData(store, settings.training.batch_size, seed))
    if module.lora:
        take_out_adapters(module.model, merge=True)
    return module.model.eval()


def new_module(settings: Settings, commitment: float | str) -> DenseLM:
    """Return a model that is not trained yet, see `fit_model`."""
    arguments: dict[str, Any] = dict(settings.model)
    if "backbone" in arguments:
        sizes = {"vocab_size": settings.corpus.vocab_size, "max_position_embeddings": settings.corpus.tokens}
        arguments["backbone"] = dict(arguments["backbone"]) | sizes
    if isinstance(commitment, str) or "num_prototypes" not in arguments:
        of_dense = inspect.signature(DenseLM).parameters
        return DenseLM(**{name: value for name, value in arguments.items() if name in of_dense})
    return PrismLM(**arguments, commitment=commitment)


@torch.no_grad()
def target_losses(model: PrismForCausalLM, ids_QL: Tensor) -> Tensor:
    """Return the cross-entropy [Q, T] in nats of every target, a bounded number of sequences at a time."""
    return torch.cat([losses_of_batch(model, part_QL) for part_QL in ids_QL.split(64)])
