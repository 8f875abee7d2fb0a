"""Evaluation during training: a callback that scores the first documents of a suite at intervals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only

from prism_lightning.common.errors import UserError
from prism_lightning.evaluation.evaluator import harness_results, split_metrics
from prism_lightning.evaluation.harness import PrismHarnessModel
from prism_lightning.evaluation.suites import load_suite
from prism_lightning.evaluation.tasks import build_tasks
from prism_lightning.lightning_modules.callbacks.throughput import Throughput
from prism_lightning.lightning_modules.dense import DenseLM


class InLoopEvaluation(Callback):
    """Logs `eval/TASK/METRIC` of a suite's first documents at intervals and at the last step.

    The training's weights, order of blocks and randomness do not change. One process evaluates; the others wait for it
    at the next step.

    Args:
        suite: YAML file of tasks, see evals/*.yaml.
        every_n_steps: number of optimiser steps between evaluations.
        limit: number of documents of each task, from its beginning.
        data_dir: folder with the tasks' data as TASK/SPLIT.jsonl; by default they come from the Hugging Face hub.

    Raises:
        UserError: an interval or a limit below 1.
    """

    def __init__(self, suite: str, every_n_steps: int = 500, limit: int = 100, data_dir: str | None = None) -> None:
        if every_n_steps < 1 or limit < 1:
            raise UserError(
                f"InLoopEvaluation: every_n_steps {every_n_steps} and limit {limit} must be positive numbers"
            )
        self.path, self.every_n_steps, self.limit = Path(suite), every_n_steps, limit
        self.data_dir = Path(data_dir) if data_dir else None
        self.last_evaluated_step = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Read the suite and its data before training starts.

        Raises:
            UserError: as `build_tasks`, or ZeRO stage 3, which spreads the weights over processes.
        """
        if stage != "fit":
            return
        assert isinstance(pl_module, DenseLM)
        if getattr(trainer.strategy, "zero_stage_3", False):
            raise UserError("InLoopEvaluation needs whole weights, but ZeRO stage 3 shards them: use stage 1 or 2")
        self.suite = load_suite(self.path)
        self.tasks = build_tasks(self.suite, self.data_dir, pl_module.data.validation.texts)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Mark the step that the run resumes from as evaluated."""
        self.last_evaluated_step = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Evaluate after a step that is due; a step of several micro-batches is evaluated once."""
        step = trainer.global_step
        due = step % self.every_n_steps == 0 or step == trainer.max_steps
        if due and step > self.last_evaluated_step:
            self.last_evaluated_step = step
            self._evaluate(trainer, pl_module)
            for callback in trainer.callbacks:  # type: ignore[attr-defined]
                if isinstance(callback, Throughput):  # leave the evaluation out of the training's speed
                    callback.on_validation_start(trainer, pl_module)

    @rank_zero_only
    def _evaluate(self, trainer: Trainer, module: LightningModule) -> None:
        assert isinstance(module, DenseLM)
        training = module.model.training
        tokenizer = module.data.train.tokenizer
        bridge = PrismHarnessModel(model=module.model, tokenizer=tokenizer)
        results = harness_results(bridge, self.tasks, self.limit, bootstraps=0)
        module.model.train(training)
        values = {}
        for name, settings in self.suite.items():
            values[f"eval/{name}/{settings.metric}"] = split_metrics(results["results"][name])[0][settings.metric]
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.global_step)
        print(f"step {trainer.global_step}  " + "  ".join(f"{k} {v:.4f}" for k, v in values.items()), flush=True)
