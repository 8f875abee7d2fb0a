"""What a recipe may make Python import: an exact list of classes, unless the user allows custom code."""

from __future__ import annotations

from typing import Any

from jsonargparse import set_parsing_settings
from lightning.pytorch import callbacks, loggers, profilers, strategies

from prism_lightning.common.errors import UserError
from prism_lightning.lightning_modules.callbacks.in_loop_evaluation import InLoopEvaluation
from prism_lightning.lightning_modules.dense import DenseLM
from prism_lightning.lightning_modules.prism import PrismLM

# Some of these take functions by name, which are imported no more than classes that are not listed.
TRUSTED_CLASSES: tuple[type, ...] = (
    DenseLM,
    PrismLM,
    InLoopEvaluation,
    callbacks.DeviceStatsMonitor,
    callbacks.EarlyStopping,
    callbacks.LearningRateMonitor,
    callbacks.ModelCheckpoint,
    callbacks.ModelSummary,
    callbacks.RichModelSummary,
    callbacks.StochasticWeightAveraging,
    callbacks.Timer,
    loggers.CSVLogger,
    loggers.MLFlowLogger,
    loggers.TensorBoardLogger,
    loggers.WandbLogger,
    profilers.AdvancedProfiler,
    profilers.PyTorchProfiler,
    profilers.SimpleProfiler,
    strategies.DDPStrategy,
    strategies.DeepSpeedStrategy,
    strategies.FSDPStrategy,
    strategies.SingleDeviceStrategy,
)


def _names(trusted: type) -> set[str]:
    """The import paths of a class: where it is defined, and every package above that offers it."""
    parts = trusted.__module__.split(".")
    return {".".join([*parts[:size], trusted.__qualname__]) for size in range(2, len(parts) + 1)}


TRUSTED_PATHS = {name for trusted in TRUSTED_CLASSES for name in _names(trusted)}
TRUSTED_NAMES = {trusted.__name__ for trusted in TRUSTED_CLASSES}


def limit_imports(config: dict[str, Any], recipe: str, allow_custom_code: bool) -> None:
    """Let the parser import the trusted classes only; with the flag, anything. Holds for the rest of the process.

    Raises:
        UserError: without the flag, every other class that the recipe names.
    """
    if allow_custom_code:
        return
    model = config.get("model")
    of_model = {str(model.get("class_path"))} if isinstance(model, dict) else set()
    # A short name is looked up among known classes; the model's has a better message where it is wrong.
    short = TRUSTED_NAMES | {name for name in of_model if "." not in name}
    named = set(_class_paths(config)) - TRUSTED_PATHS - short
    if named:
        raise UserError(
            [
                f"{recipe}: class {name} is not on prism_lightning's list, and importing it runs its code: if you trust"
                " this recipe, add --allow_custom_code"
                for name in sorted(named)
            ]
        )
    # The parser would import any dotted name also where a function is expected.
    set_parsing_settings(import_path_denylist=["*"], import_path_allowlist=sorted(TRUSTED_PATHS))


def _class_paths(node: Any) -> list[str]:
    if isinstance(node, list):
        return [name for child in node for name in _class_paths(child)]
    if not isinstance(node, dict):
        return []
    own = [str(node["class_path"])] if "class_path" in node else []
    return own + [name for child in node.values() for name in _class_paths(child)]
