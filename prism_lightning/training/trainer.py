"""The verbs that need Lightning: fit, validate, test, predict. Recipes in, a run directory out."""

from __future__ import annotations

import logging
import os
import warnings
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import ArgumentError
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from prism_lightning.attribution.settings import IndexSettings
from prism_lightning.common.errors import UserError, user_error_in
from prism_lightning.config.compose import Recipe, composed, split_arguments, take_flags
from prism_lightning.config.trust import limit_imports
from prism_lightning.config.validate import problems_in
from prism_lightning.lightning_modules.callbacks.checkpoints import Checkpoints
from prism_lightning.lightning_modules.callbacks.progress import ProgressBar, progress_callback
from prism_lightning.lightning_modules.callbacks.throughput import Throughput
from prism_lightning.lightning_modules.dense import DenseLM
from prism_lightning.lightning_modules.text_data import TextData
from prism_lightning.run.checkpoints import load_checkpoint, load_model_weights, open_deepspeed
from prism_lightning.run.directory import RunDirectory, RunSettings, is_deepspeed
from prism_lightning.training.checkpoint_io import AtomicCheckpointIO
from prism_lightning.training.loggers import log_settings, run_loggers
from prism_lightning.training.post_training import finish, load_weights
from prism_lightning.training.ranks import first_process
from prism_lightning.training.strategies import check_devices, check_trainer, settled_strategy


class TrainingCLI(LightningCLI):
    """LightningCLI over a composed recipe, writing a run directory."""

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
        """The run's own settings, and those of the index, which `index` reads from the same recipe."""
        parser.add_class_arguments(RunSettings, "run")
        parser.add_class_arguments(IndexSettings, "index")

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse the composed recipe; every problem in it is reported at once."""
        settings = self.recipe.settings
        limit_imports(settings, self.recipe_name, self.allow_custom_code)
        try:
            self.config = parser.parse_object({"subcommand": self.verb, self.verb: settings})
        except (ArgumentError, TypeError, ValueError, KeyError) as error:
            problems = problems_in(settings, self.allow_custom_code) or [" ".join(str(error).split())[:300]]
            raise UserError([f"{self.recipe_name}: {self.recipe.hide_environment(p)}" for p in problems]) from error

    def _parse_ckpt_path(self) -> None:
        """Nothing: a checkpoint's hyper-parameters never override the recipe."""

    def before_instantiate_classes(self) -> None:
        """With --print_config: print the composed recipe with every default, and end here."""
        if self.print_config:
            print(yaml.safe_dump(self.recorded_config, sort_keys=False, allow_unicode=True), end="")
            raise SystemExit(0)

    def instantiate_classes(self) -> None:
        """Check steps and devices, then build data, model and trainer."""
        settings = self.config[self.verb]["trainer"].as_dict()
        check_devices(self.recipe_name, settings)
        check_trainer(self.recipe_name, settings, fit=self.verb == "fit")
        try:
            super().instantiate_classes()
        except Exception as error:  # the parser wraps what a constructor raises
            raise user_error_in(error) or self._refusal(error) or error from error

    def _refusal(self, error: Exception) -> UserError | None:
        """What Lightning or a package says where a setting does not suit it, as one line of the user's."""
        text = " ".join(str(error).split())
        if isinstance(error, ModuleNotFoundError):
            return UserError(f"{self.recipe_name}: {text}: install it with pip, or leave the setting out")
        _, problem, rest = text.partition("Problem with given class_path ")
        if problem:  # the parser's report on every type that was tried
            return UserError(f"{self.recipe_name}: {rest.split(' - Expected')[0][:300]}")
        if isinstance(error, MisconfigurationException):
            return UserError(f"{self.recipe_name}: the trainer refuses its settings: {text[:300]}")
        return None

    @property
    def recorded_config(self) -> dict[str, Any]:
        """Every setting, defaults included, as it may be written out: nothing from the environment."""
        self._dump_config()
        return self.recipe.without_environment(self.config_dump)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """The trainer with the run directory's loggers, checkpoints and progress."""
        settings = self.config_init[self.verb]
        self.run_directory = RunDirectory(settings["run"])
        kwargs["strategy"] = settled_strategy(self.config[self.verb]["trainer"].as_dict())
        if isinstance(kwargs["strategy"], dict):
            kwargs["strategy"] = settings["trainer"]["strategy"]
        kwargs["plugins"] = [*as_list(settings["trainer"].get("plugins")), AtomicCheckpointIO()]
        kwargs["logger"] = False
        if self.verb == "fit":
            self._take_run_directory()
            kwargs["logger"] = self._loggers(settings["trainer"].get("logger"))
            callbacks = self._callbacks(settings)
            kwargs["enable_progress_bar"] = any(isinstance(callback, ProgressBar) for callback in callbacks)
            settings["trainer"]["callbacks"] = [*as_list(settings["trainer"].get("callbacks")), *callbacks]
        try:
            return super().instantiate_trainer(**kwargs)
        except (TypeError, ValueError) as error:
            raise MisconfigurationException(str(error)) from error

    def _take_run_directory(self) -> None:
        """Prepare the data, then lock the run directory and record the run in it.

        In that order: errors about data come before any directory is made.
        """
        self.datamodule.prepare_data()
        self.datamodule.setup()
        self.model.check_data(self.datamodule)
        self.run_directory.record(self.recorded_config, self.datamodule.train.manifest["fingerprint"], first_process())

    def _loggers(self, given: Any) -> list[Any] | bool:
        """The run's own loggers and those of the recipe beside them; none where the recipe says `logger: false`."""
        if given is False:
            return False
        csv_logger, mlflow_logger = run_loggers(self.run_directory)
        log_settings(self.run_directory, self.recorded_config, mlflow_logger)
        return [csv_logger, mlflow_logger, *([] if given is True else as_list(given))]

    def _callbacks(self, settings: Any) -> list[Callback]:
        """Throughput, progress and checkpoints, unless the recipe turns one of them off."""
        run: RunSettings = settings["run"]
        callbacks: list[Callback] = [Throughput()]
        if settings["trainer"].get("enable_progress_bar") is not False:
            callbacks.append(progress_callback())
        if settings["trainer"].get("enable_checkpointing") is not False:
            folder = self.run_directory.paths.checkpoints
            callbacks.append(Checkpoints(folder, run.checkpoint_interval, run.checkpoints_kept))
        return callbacks

    def before_fit(self) -> None:
        """Resume where the run directory's newest checkpoint stands; share the batch out over the devices."""
        trainer, data = self.trainer, self.datamodule
        data.trainer = trainer
        trainer.accumulate_grad_batches = data.accumulation
        if isinstance(trainer.val_check_interval, int):
            trainer.val_check_interval *= data.accumulation  # stated in optimiser steps; Lightning counts batches

    def fit(self, **kwargs: Any) -> None:
        """Train, unless the run is complete already."""
        checkpoint = Path(kwargs["ckpt_path"]) if kwargs.get("ckpt_path") else self.run_directory.last_checkpoint()
        done = self.run_directory.last_results()
        self.complete = bool(
            done and done["step"] >= self.trainer.max_steps and self.run_directory.paths.model.is_dir()
        )
        if done and self.complete:
            rank_zero_print(
                f"{self.run_directory.paths.root} is complete at step {done['step']}:"
                " raise --trainer.max_steps or choose another --run.dir"
            )
            return
        if checkpoint:
            if is_deepspeed(checkpoint):
                open_deepspeed(checkpoint)
            elif checkpoint.is_dir():
                raise UserError(f"{checkpoint} is no checkpoint to go on from: give a file under RUN/checkpoints")
            else:
                load_model_weights(self.model.model, load_checkpoint(checkpoint)["state_dict"], checkpoint)
            rank_zero_print(f"resuming from {checkpoint}")
        rank_zero_print(self.model.summary(self.datamodule))
        self.trainer.fit(self.model, datamodule=self.datamodule, ckpt_path=checkpoint, weights_only=True)

    def after_fit(self) -> None:
        """Polish, evaluate, export, explain: on one process, from the trained weights."""
        if self.trainer.is_global_zero and not self.complete:
            finish(self.model, self.datamodule, self.trainer, self.run_directory, self.recipe_name)

    def _load_for_evaluation(self, ckpt_path: str | None) -> None:
        load_weights(self.model, Path(ckpt_path) if ckpt_path else None, self.run_directory)

    def validate(self, **kwargs: Any) -> None:
        """Evaluate on the validation split: the given checkpoint, or what `fit` left in the run directory."""
        self._load_for_evaluation(kwargs.get("ckpt_path"))
        self.trainer.validate(self.model, datamodule=self.datamodule)

    def test(self, **kwargs: Any) -> None:
        """Evaluate once more under `test/`."""
        self._load_for_evaluation(kwargs.get("ckpt_path"))
        self.trainer.test(self.model, datamodule=self.datamodule)

    def predict(self, **kwargs: Any) -> None:
        """Write the log-probability of every validation token to predictions.safetensors in the run directory."""
        from safetensors.torch import save_file

        self._load_for_evaluation(kwargs.get("ckpt_path"))
        batches: Any = self.trainer.predict(self.model, datamodule=self.datamodule) or []
        out = self.run_directory.paths.predictions
        out.parent.mkdir(parents=True, exist_ok=True)
        names = ("block_ids", "log_probabilities")
        save_file({name: torch.cat([batch[name] for batch in batches]) for name in names}, out)
        print(f"wrote {out}")


def run(verb: str, arguments: list[str]) -> None:
    """Run one of the training verbs on a command line of `--config RECIPE` and overrides."""
    quiet()
    flags, arguments = take_flags(arguments, "allow_custom_code", "print_config")
    path, overrides = split_arguments(arguments)
    recipe = composed(path, overrides)
    TrainingCLI(verb, recipe, str(path), "allow_custom_code" in flags, "print_config" in flags)


def as_list(value: Any) -> list[Any]:
    """A setting that may be absent, one thing or several, as a list."""
    return list(value) if isinstance(value, list | tuple) else [] if value is None else [value]


@rank_zero_only
def rank_zero_print(text: str) -> None:
    """Print on one process only."""
    print(text, flush=True)


def quiet() -> None:
    """Silence what a user of these verbs can do nothing about."""
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "CRITICAL")  # its database errors reach us as exceptions
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.seed", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("lightning.pytorch.loggers.mlflow").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning|torch|mlflow|torchmetrics")
