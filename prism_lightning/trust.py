"""What a recipe may make Python import: an exact list of classes, unless the user allows custom code."""

from __future__ import annotations

import re
from typing import Any

from jsonargparse import set_parsing_settings
from lightning.pytorch import callbacks, loggers, profilers, strategies

from prism_lightning.errors import UserError
from prism_lightning.evaluation.in_loop import InLoopEvaluation
from prism_lightning.lightning_modules.dense import DenseLM
from prism_lightning.lightning_modules.prism import PrismLM

# None of these takes a function by its name, as LambdaCallback or FSDPStrategy do.
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
    callbacks.Timer,
    loggers.CSVLogger,
    loggers.MLFlowLogger,
    loggers.TensorBoardLogger,
    loggers.WandbLogger,
    profilers.AdvancedProfiler,
    profilers.PyTorchProfiler,
    profilers.SimpleProfiler,
    strategies.DeepSpeedStrategy,
    strategies.SingleDeviceStrategy,
)


def _names(trusted: type) -> set[str]:
    """The import paths of a class: where it is defined, and every package above that offers it."""
    parts = trusted.__module__.split(".")
    return {".".join([*parts[:size], trusted.__qualname__]) for size in range(2, len(parts) + 1)}


TRUSTED_PATHS = {name for trusted in TRUSTED_CLASSES for name in _names(trusted)}


def limit_imports(config: dict[str, Any], recipe: str, allow_custom_code: bool) -> None:
    """Let the parser import the trusted classes only or, with the flag, also what the recipe names.

    Raises:
        UserError: without the flag, every other class that the recipe names.
    """
    # A name without a dot imports nothing: the parser looks it up among the classes that it has already.
    named = {name for name in _class_paths(config) if "." in name} - TRUSTED_PATHS
    if named and not allow_custom_code:
        raise UserError(
            [
                f"{recipe}: class {name} is not on prism_lightning's list, and importing it runs its code: if you trust"
                " this recipe, add --allow_custom_code"
                for name in sorted(named)
            ]
        )
    allowed = TRUSTED_PATHS | (set(_dotted_names(config)) if allow_custom_code else set())
    # The parser would import any dotted name also where a function is expected.
    set_parsing_settings(import_path_denylist=["*"], import_path_allowlist=sorted(allowed))


def _class_paths(node: Any) -> list[str]:
    if isinstance(node, list):
        return [name for child in node for name in _class_paths(child)]
    if not isinstance(node, dict):
        return []
    own = [str(node["class_path"])] if "class_path" in node else []
    return own + [name for child in node.values() for name in _class_paths(child)]


def _dotted_names(node: Any) -> list[str]:
    if isinstance(node, dict | list):
        children = node.values() if isinstance(node, dict) else node
        return [name for child in children for name in _dotted_names(child)]
    path = re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+", node) if isinstance(node, str) else None
    return [node] if path and not node.startswith("jsonargparse") else []
