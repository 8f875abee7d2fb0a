"""Import what a Hugging Face decoder needs and nothing that a short verb never uses.

Most of the seconds that `explain` takes are imports. transformers imports three libraries beside every decoder that
serve other work: torch._dynamo with sympy serves torch.compile, torch.distributed's tensors serve several processes,
and scipy serves the losses of object detection. Here torch._dynamo is put off until its first use, and transformers is
told that there is no torch.distributed and no scipy, which it is written to do without. With the garbage collector out
of the way, processor time of `explain` on the quickstart fell from 5.3 to 2.3 s.
"""

from __future__ import annotations

import atexit
import functools
import gc
import importlib.util
import sys
from collections.abc import Callable
from contextlib import suppress
from types import ModuleType
from typing import Any
from unittest import mock

MARKS = ("allow_in_graph", "assume_constant_result")  # decorators that only note something about a function
LIGHT = "torch._dynamo._trace_wrapped_higher_order_op"  # the one module of torch._dynamo that every decoder imports


class _PutOff(ModuleType):
    """torch._dynamo before its first use, which loads it in this very object."""

    marked: list[tuple[str, Callable[..., Any]]]

    def __getattr__(self, name: str) -> Any:
        if name in MARKS:
            return functools.partial(_marked, self, name)
        if name == "disable":
            return functools.partial(_disabled, self)
        if name.startswith("__") and name != "__path__":
            raise AttributeError(name)
        return getattr(_loaded(self), name)


def _loaded(module: _PutOff) -> ModuleType:
    """The module, executed; what was marked before is marked now."""
    spec, marked = module.__spec__, module.__dict__.pop("marked")
    assert spec is not None and spec.loader is not None
    module.__class__ = ModuleType  # type: ignore[assignment]
    module.__path__ = list(spec.submodule_search_locations or ())
    spec.loader.exec_module(module)
    for name, function in marked:
        getattr(module, name)(function)
    return module


def _marked(module: _PutOff, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    module.__dict__["marked"].append((name, function))
    return function


def _disabled(
    module: _PutOff, function: Callable[..., Any] | None = None, recursive: bool = True, **_: Any
) -> Callable[..., Any]:
    """A function that torch.compile leaves alone; as long as torch._dynamo is not loaded, nothing is compiled."""
    if function is None:
        return functools.partial(_disabled, module, recursive=recursive)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        loaded = type(module) is not _PutOff
        chosen = module.disable(function, recursive, wrapping=False) if loaded else function
        return chosen(*args, **kwargs)

    return call


def import_decoders() -> None:
    """Import transformers' base classes of decoders quickly; for verbs that run on one process and compile nothing.

    Does nothing where transformers' models or torch._dynamo are imported already.
    """
    if "transformers.modeling_utils" in sys.modules or "torch._dynamo" in sys.modules:
        return
    # Modules live as long as the process: looking through them for garbage took 0.6 s of importing, 0.7 s of exiting.
    gc.disable()
    try:
        import torch

        for step in (_put_off_dynamo, _hide_unused, _draw_no_meta_tensors):
            # Private names: with a version that has others, the verb is slower and works.
            with suppress(AttributeError, ImportError):
                step(torch)
        import transformers.generation.utils
        import transformers.modeling_utils  # noqa: F401
    finally:
        gc.freeze()
        gc.enable()
        atexit.register(gc.freeze)


def _put_off_dynamo(torch: ModuleType) -> None:
    spec = importlib.util.find_spec("torch._dynamo")
    if spec is None or spec.origin is None:
        return
    module = _PutOff("torch._dynamo")
    module.__spec__, module.__loader__, module.__file__ = spec, spec.loader, spec.origin
    module.__package__, module.marked = spec.name, []
    sys.modules[spec.name] = module
    vars(torch)["_dynamo"] = module
    # With the package's path in sight for a moment, this module is found without the package being executed.
    module.__path__ = list(spec.submodule_search_locations or ())
    try:
        importlib.import_module(LIGHT)
    finally:
        if type(module) is _PutOff:
            del module.__path__


def _draw_no_meta_tensors(torch: ModuleType) -> None:
    """Have no normal numbers drawn for tensors on the meta device, which hold none: torch asks sympy for it (0.3 s)."""
    draw = torch.nn.init._no_grad_normal_

    @functools.wraps(draw)
    def call(tensor: Any, *args: Any, **kwargs: Any) -> Any:
        return tensor if tensor.is_meta else draw(tensor, *args, **kwargs)

    torch.nn.init._no_grad_normal_ = call


def _hide_unused(torch: ModuleType) -> None:
    """Have transformers find neither torch.distributed nor scipy; it remembers each answer for the whole process."""
    from transformers.utils import import_utils

    with mock.patch.object(torch.distributed, "is_available", return_value=False):
        import_utils.is_torch_distributed_available.cache_clear()
        import_utils.is_torch_distributed_available()
    with mock.patch.object(import_utils, "_is_package_available", return_value=(False, "")):
        import_utils.is_scipy_available.cache_clear()
        import_utils.is_scipy_available()
