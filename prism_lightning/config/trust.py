"""The classes that a recipe may import: an exact list, unless the user allows custom code."""

from __future__ import annotations

from typing import Any

from jsonargparse import set_parsing_settings
from lightning.pytorch import callbacks, loggers, profilers, strategies

from prism_lightning.common.errors import UserError
from prism_lightning.lightning_modules.callbacks.in_loop_evaluation import InLoopEvaluation
from prism_lightning.lightning_modules.dense import DenseLM
from prism_lightning.lightning_modules.prism import PrismLM
from prism_lightning.models.low_rank import LoraSettings

# Some of these take functions by name. `limit_imports` refuses to import such functions, too.
TRUSTED_CLASSES: tuple[type, ...] = (
    DenseLM,
    PrismLM,
    LoraSettings,
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
    """Return the import paths of a class: of its module and of every package above it."""
    parts = trusted.__module__.split(".")
    return {".".join([*parts[:size], trusted.__qualname__]) for size in range(2, len(parts) + 1)}


TRUSTED_PATHS = {name for trusted in TRUSTED_CLASSES for name in _names(trusted)}
TRUSTED_NAMES = {trusted.__name__ for trusted in TRUSTED_CLASSES}


def limit_imports(config: dict[str, Any], recipe: str, allow_custom_code: bool) -> None:
    """Restrict the parser's imports to the trusted classes, for the rest of the process.

    Args:
        config: the composed recipe.
        recipe: its path, for error messages.
        allow_custom_code: whether the parser may import any class.

    Raises:
        UserError: the recipe names classes that are not trusted.
    """
    if allow_custom_code:
        return
    model = config.get("model")
    model_class = {str(model.get("class_path"))} if isinstance(model, dict) else set()
    # The parser looks up short names among known classes. An unknown model has a better message elsewhere.
    short_names = TRUSTED_NAMES | {name for name in model_class if "." not in name}
    untrusted = set(_class_paths(config)) - TRUSTED_PATHS - short_names
    if untrusted:
        raise UserError(
            [
                f"{recipe}: class {name} is not on prism_lightning's list, and importing it runs its code: if you trust"
                " this recipe, add --allow_custom_code"
                for name in sorted(untrusted)
            ]
        )
    # Where a function is expected, the parser would import any dotted name.
    set_parsing_settings(import_path_denylist=["*"], import_path_allowlist=sorted(TRUSTED_PATHS))


def _class_paths(node: Any) -> list[str]:
    if isinstance(node, list):
        return [name for child in node for name in _class_paths(child)]
    if not isinstance(node, dict):
        return []
    own = [str(node["class_path"])] if "class_path" in node else []
    return own + [name for child in node.values() for name in _class_paths(child)]
