"""The verbs that need Lightning: fit, validate, test and predict. They read a recipe and write a run directory."""

from __future__ import annotations

import logging
import os
import warnings
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import yaml
from jsonargparse import ArgumentError, Namespace
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from prism_lightning.attribution.settings import IndexSettings
from prism_lightning.common.errors import UserError, user_error_in
from prism_lightning.config.compose import Recipe, composed, split_arguments, take_flags
from prism_lightning.config.trust import limit_imports
from prism_lightning.config.validate import RETROFIT, problems_in
from prism_lightning.lightning_modules.callbacks.checkpoints import Checkpoints
from prism_lightning.lightning_modules.callbacks.progress import ProgressBar, progress_callback
from prism_lightning.lightning_modules.callbacks.throughput import Throughput
from prism_lightning.lightning_modules.dense import DenseLM
from prism_lightning.lightning_modules.text_data import TextData
from prism_lightning.models.initial import without_pretrained_weights
from prism_lightning.run.directory import RunDirectory, RunSettings
from prism_lightning.run.model_tokenizer import choose_tokenizer, chosen_tokenizer
from prism_lightning.training.checkpoint_io import AtomicCheckpointIO
from prism_lightning.training.loggers import log_settings, run_loggers
from prism_lightning.training.post_training import finish
from prism_lightning.training.ranks import first_process
from prism_lightning.training.resuming import (
    completed_step,
    find_checkpoint,
    load_for_evaluation,
    load_for_resuming,
)
from prism_lightning.training.strategies import check_adapters, check_devices, check_trainer, settled_strategy


class TrainingCLI(LightningCLI):
    """LightningCLI over a composed recipe; constructing it runs the verb.

    Args:
        verb: fit, validate, test or predict.
        recipe: the composed recipe.
        name: the recipe's path, for error messages and results.
        allow_custom_code: whether the recipe may import any class.
        print_config: print the composed recipe and end the process in place of running the verb.
    """

    run_directory: RunDirectory
    model: DenseLM
    datamodule: TextData

    def __init__(
        self, verb: str, recipe: Recipe, name: str, allow_custom_code: bool = False, print_config: bool = False
    ) -> None:
        self.verb, self.recipe, self.recipe_name = verb, recipe, name
        self.allow_custom_code, self.print_config = allow_custom_code, print_config
        try:
            super().__init__(
                model_class=DenseLM,
                subclass_mode_model=True,
                datamodule_class=TextData,
                save_config_callback=None,
                seed_everything_default=0,
                trainer_defaults={"use_distributed_sampler": False, "max_epochs": -1, "check_val_every_n_epoch": None},
                auto_configure_optimizers=False,
                parser_kwargs={"exit_on_error": False},
            )
        finally:
            if hasattr(self, "run_directory"):
                self.run_directory.unlock()

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the groups `run` and `index`; only the verb `index` reads the latter."""
        parser.add_class_arguments(RunSettings, "run")
        parser.add_class_arguments(IndexSettings, "index")

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse the composed recipe.

        Raises:
            UserError: every problem in it at once.
        """
        settings = self.recipe.settings
        limit_imports(settings, self.recipe_name, self.allow_custom_code)
        try:
            self.config = parser.parse_object({"subcommand": self.verb, self.verb: settings})
        except (ArgumentError, TypeError, ValueError, KeyError) as error:
            problems = problems_in(settings, self.allow_custom_code) or [" ".join(str(error).split())[:300]]
            raise UserError([f"{self.recipe_name}: {self.recipe.hide_environment(p)}" for p in problems]) from error

    def _parse_ckpt_path(self) -> None:
        """Do nothing: LightningCLI would let a checkpoint's hyper-parameters override the recipe."""

    def before_instantiate_classes(self) -> None:
        """With --print_config, print the composed recipe with every default and end the process."""
        if self.print_config:
            print(yaml.safe_dump(self.recorded_config, sort_keys=False, allow_unicode=True), end="")
            raise SystemExit(0)

    def instantiate_classes(self) -> None:
        """Check the trainer's settings and devices, then build data, model and trainer.

        Raises:
            UserError: a setting that cannot be used.
        """
        settings = self.config[self.verb]
        trainer = settings["trainer"].as_dict()
        check_devices(self.recipe_name, trainer)
        check_trainer(self.recipe_name, trainer, fit=self.verb == "fit")
        check_adapters(self.recipe_name, self._model_settings(), trainer)
        try:
            with self._starting_weights(settings):
                super().instantiate_classes()
        except Exception as error:  # the parser wraps the exceptions of constructors
            raise user_error_in(error) or self._refusal(error) or error from error

    def _starting_weights(self, settings: Any) -> AbstractContextManager[None]:
        """Return a context in which a pretrained model's weights are read: only a `fit` that starts anew needs them."""
        run = RunDirectory(RunSettings(**settings["run"].as_dict()))
        checkpoint = find_checkpoint(run, settings.get("ckpt_path"))
        starts_anew = checkpoint is None and completed_step(run, settings["trainer"]["max_steps"]) is None
        return nullcontext() if self.verb == "fit" and starts_anew else without_pretrained_weights()

    def _settle_tokenizer(self) -> None:
        """Give the data and the recorded recipe the tokenizer of a pretrained model; errors as `choose_tokenizer`."""
        settings = self.config[self.verb]
        model, requested = self._model_settings(), self.datamodule.tokenizer
        if self.verb == "fit":
            vocab_size = self.model.model.config.vocab_size
            tokenizer = choose_tokenizer(model, requested, vocab_size, self.run_directory)
        else:
            tokenizer = chosen_tokenizer(model, requested, self.run_directory.paths)
        self.datamodule.tokenizer = settings["data"]["tokenizer"] = tokenizer
        vars(self).pop("config_dump", None)  # a copy of the settings from before

    def _model_settings(self) -> dict[str, Any]:
        return (self.config[self.verb]["model"].get("init_args") or Namespace()).as_dict()

    def _refusal(self, error: Exception) -> UserError | None:
        """Return a one-line UserError where a setting caused an error in Lightning or a package; otherwise None."""
        text = " ".join(str(error).split())
        if isinstance(error, ModuleNotFoundError):
            return UserError(f"{self.recipe_name}: {text}: install it with pip, or leave the setting out")
        _, problem, rest = text.partition("Problem with given class_path ")
        if problem:  # the parser lists every type that it tried
            return UserError(f"{self.recipe_name}: {rest.split(' - Expected')[0][:300]}")
        if isinstance(error, MisconfigurationException):
            return UserError(f"{self.recipe_name}: the trainer refuses its settings: {text[:300]}")
        return None

    @property
    def recorded_config(self) -> dict[str, Any]:
        """Every setting, defaults included, without values that come from the environment."""
        self._dump_config()
        return self.recipe.without_environment(self.config_dump)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Return the trainer; that of `fit` has the run's own loggers, checkpoints and progress beside the recipe's."""
        settings = self.config_init[self.verb]
        self.run_directory = RunDirectory(settings["run"])
        self._settle_tokenizer()
        kwargs["logger"] = False
        if self.verb == "fit":
            self.prepare_run()
            kwargs["logger"] = self.build_loggers(settings["trainer"].get("logger"))
            callbacks = build_callbacks(self.run_directory, settings["trainer"])
            kwargs["enable_progress_bar"] = any(isinstance(callback, ProgressBar) for callback in callbacks)
            settings["trainer"]["callbacks"] = [*as_list(settings["trainer"].get("callbacks")), *callbacks]
        return self.build_trainer(settings["trainer"], **kwargs)

    def prepare_run(self) -> None:
        """Prepare the data, then lock the run directory and record the run in it.

        In this order, so that an error in the data leaves no run directory behind.

        Raises:
            UserError: the data, the model and the data together, or the run directory cannot be used.
        """
        self.datamodule.prepare_data()
        self.datamodule.setup()
        self.model.check_data(self.datamodule)
        self.run_directory.record(self.recorded_config, self.datamodule.train.manifest["fingerprint"], first_process())

    def build_loggers(self, setting: Any) -> list[Any] | bool:
        """Return the run's own loggers and those of the recipe; False where the recipe sets `logger: false`.

        Args:
            setting: `trainer.logger`: a bool, None, one logger or several.
        """
        if setting is False:
            return False
        csv_logger, mlflow_logger = run_loggers(self.run_directory)
        log_settings(self.run_directory, self.recorded_config, mlflow_logger)
        return [csv_logger, mlflow_logger, *([] if setting is True else as_list(setting))]

    def build_trainer(self, settings: Any, **kwargs: Any) -> Trainer:
        """Return the trainer of the recipe's settings, with the strategy settled and checkpoints written atomically.

        Args:
            settings: the `trainer` group, its classes instantiated.
            kwargs: replace settings of the recipe.

        Raises:
            MisconfigurationException: Lightning refuses the settings.
        """
        strategy = settled_strategy(self.config[self.verb]["trainer"].as_dict())
        kwargs["strategy"] = settings["strategy"] if isinstance(strategy, dict) else strategy
        kwargs["plugins"] = [*as_list(settings.get("plugins")), AtomicCheckpointIO()]
        try:
            return super().instantiate_trainer(**kwargs)
        except (TypeError, ValueError) as error:
            raise MisconfigurationException(str(error)) from error

    def before_fit(self) -> None:
        """Divide the batch over devices and micro-batches, and convert the validation interval to micro-batches."""
        trainer, data = self.trainer, self.datamodule
        data.trainer = trainer
        trainer.accumulate_grad_batches = data.accumulation
        if isinstance(trainer.val_check_interval, int):
            trainer.val_check_interval *= data.accumulation  # stated in optimiser steps; Lightning counts batches

    def fit(self, **kwargs: Any) -> None:
        """Train from the newest checkpoint or from the start, unless the run is complete already."""
        run = self.run_directory
        checkpoint = find_checkpoint(run, kwargs.get("ckpt_path"))
        step = completed_step(run, self.trainer.max_steps)
        self.complete = step is not None
        if self.complete:
            rank_zero_print(
                f"{run.paths.root} is complete at step {step}: raise --trainer.max_steps or choose another --run.dir"
            )
            return
        if checkpoint:
            load_for_resuming(self.model, checkpoint)
            rank_zero_print(f"resuming from {checkpoint}")
        rank_zero_print(self.model.summary(self.datamodule))
        self.trainer.fit(self.model, datamodule=self.datamodule, ckpt_path=checkpoint, weights_only=True)

    def after_fit(self) -> None:
        """Polish, evaluate, export and explain the trained model, on one process."""
        if self.trainer.is_global_zero and not self.complete:
            finish(self.model, self.datamodule, self.trainer, self.run_directory, self.recipe_name)

    def validate(self, **kwargs: Any) -> None:
        """Evaluate a checkpoint, by default the run's trained model, on the validation split."""
        load_for_evaluation(self.model, self.run_directory, kwargs.get("ckpt_path"))
        self.trainer.validate(self.model, datamodule=self.datamodule)

    def test(self, **kwargs: Any) -> None:
        """Evaluate like `validate`; the metrics' names start with `test/`."""
        load_for_evaluation(self.model, self.run_directory, kwargs.get("ckpt_path"))
        self.trainer.test(self.model, datamodule=self.datamodule)

    def predict(self, **kwargs: Any) -> None:
        """Write the log-probability (nats) of every validation token to the run directory.

        The file holds `block_ids` [B] and `log_probabilities` [B, T], NaN where a target is masked.
        """
        from safetensors.torch import save_file

        load_for_evaluation(self.model, self.run_directory, kwargs.get("ckpt_path"))
        batches: Any = self.trainer.predict(self.model, datamodule=self.datamodule) or []
        out = self.run_directory.paths.predictions
        out.parent.mkdir(parents=True, exist_ok=True)
        names = ("block_ids", "log_probabilities")
        save_file({name: torch.cat([batch[name] for batch in batches]) for name in names}, out)
        print(f"wrote {out}")


def build_callbacks(run: RunDirectory, settings: Any) -> list[Callback]:
    """Return the run's own callbacks: throughput, and progress and checkpoints unless the recipe turns them off.

    Args:
        run: has the folder and the interval of checkpoints.
        settings: the `trainer` group of the recipe.
    """
    callbacks: list[Callback] = [Throughput()]
    if settings.get("enable_progress_bar") is not False:
        callbacks.append(progress_callback())
    if settings.get("enable_checkpointing") is not False:
        interval, kept = run.settings.checkpoint_interval, run.settings.checkpoints_kept
        callbacks.append(Checkpoints(run.paths.checkpoints, interval, kept))
    return callbacks


def run(verb: str, arguments: list[str]) -> None:
    """Run fit, validate, test or predict with the arguments `--config RECIPE` and overrides."""
    quiet()
    flags, arguments = take_flags(arguments, "allow_custom_code", "print_config")
    path, overrides = split_arguments(arguments)
    recipe = composed(path, overrides)
    if RETROFIT in recipe.settings:
        raise UserError(f"{path} records a retrofit, which {verb} does not take: give a recipe with a model to train")
    TrainingCLI(verb, recipe, str(path), "allow_custom_code" in flags, "print_config" in flags)


def as_list(value: Any) -> list[Any]:
    """Return a setting that is None, one value or several values as a list."""
    return list(value) if isinstance(value, list | tuple) else [] if value is None else [value]


@rank_zero_only
def rank_zero_print(text: str) -> None:
    """Print on the first process only."""
    print(text, flush=True)


def quiet() -> None:
    """Silence warnings of libraries that a user of these verbs cannot act on."""
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "CRITICAL")  # MLflow's database errors are raised as exceptions, too
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.seed", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("lightning.pytorch.loggers.mlflow").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning|torch|mlflow|torchmetrics")
