"""Import what a Hugging Face decoder needs, without libraries that short verbs never use.

Most of the run time of `explain` is imports. With every decoder, transformers imports three libraries for other work:
torch._dynamo with sympy for torch.compile, torch.distributed's tensors for several processes, and scipy for losses of
object detection. This module defers torch._dynamo until its first use, and makes transformers find neither
torch.distributed nor scipy, which are optional for it. It also disables the garbage collector meanwhile. The processor
time of `explain` on the quickstart fell from 5.3 to 2.3 s.
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

MARKING_DECORATORS = ("allow_in_graph", "assume_constant_result")  # They only record something about a function.
DECODER_MODULE = "torch._dynamo._trace_wrapped_higher_order_op"  # the only part of torch._dynamo that decoders import


class _DeferredModule(ModuleType):
    """torch._dynamo before its first use, which loads the module into the same object."""

    marked: list[tuple[str, Callable[..., Any]]]

    def __getattr__(self, name: str) -> Any:
        if name in MARKING_DECORATORS:
            return functools.partial(_marked, self, name)
        if name == "disable":
            return functools.partial(_disabled, self)
        if name.startswith("__") and name != "__path__":
            raise AttributeError(name)
        return getattr(_loaded(self), name)


def _loaded(module: _DeferredModule) -> ModuleType:
    """Return the executed module, after applying the marking decorators that were called before."""
    spec, marked = module.__spec__, module.__dict__.pop("marked")
    assert spec is not None and spec.loader is not None
    module.__class__ = ModuleType  # type: ignore[assignment]
    module.__path__ = list(spec.submodule_search_locations or ())
    spec.loader.exec_module(module)
    for name, function in marked:
        getattr(module, name)(function)
    return module


def _marked(module: _DeferredModule, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    module.__dict__["marked"].append((name, function))
    return function


def _disabled(
    module: _DeferredModule, function: Callable[..., Any] | None = None, recursive: bool = True, **_: Any
) -> Callable[..., Any]:
    """Return a function that torch.compile does not compile; nothing is compiled before torch._dynamo is loaded."""
    if function is None:
        return functools.partial(_disabled, module, recursive=recursive)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        loaded = type(module) is not _DeferredModule
        chosen = module.disable(function, recursive, wrapping=False) if loaded else function
        return chosen(*args, **kwargs)

    return call


def import_decoders() -> None:
    """Import transformers' base classes of decoders quickly, for verbs that use one process and compile nothing.

    It does nothing if transformers' models or torch._dynamo are already imported.
    """
    if "transformers.modeling_utils" in sys.modules or "torch._dynamo" in sys.modules:
        return
    # Modules live as long as the process. Collecting garbage among them took 0.6 s of the imports and 0.7 s at exit.
    gc.disable()
    try:
        import torch

        for step in (_defer_dynamo, _hide_unused, _skip_meta_initialisation):
            # These use private names. With a version that has other names, the verb works and is slower.
            with suppress(AttributeError, ImportError):
                step(torch)
        import transformers.generation.utils
        import transformers.modeling_utils  # noqa: F401
    finally:
        gc.freeze()
        gc.enable()
        atexit.register(gc.freeze)


def _defer_dynamo(torch: ModuleType) -> None:
    spec = importlib.util.find_spec("torch._dynamo")
    if spec is None or spec.origin is None:
        return
    module = _DeferredModule("torch._dynamo")
    module.__spec__, module.__loader__, module.__file__ = spec, spec.loader, spec.origin
    module.__package__, module.marked = spec.name, []
    sys.modules[spec.name] = module
    vars(torch)["_dynamo"] = module
    # While the package has a path, this module is found without executing the package.
    module.__path__ = list(spec.submodule_search_locations or ())
    try:
        importlib.import_module(DECODER_MODULE)
    finally:
        if type(module) is _DeferredModule:
            del module.__path__


def _skip_meta_initialisation(torch: ModuleType) -> None:
    """Skip the random initialisation of tensors on the meta device, which have no values; it imports sympy (0.3 s)."""
    initialise = torch.nn.init._no_grad_normal_

    @functools.wraps(initialise)
    def call(tensor: Any, *args: Any, **kwargs: Any) -> Any:
        return tensor if tensor.is_meta else initialise(tensor, *args, **kwargs)

    torch.nn.init._no_grad_normal_ = call


def _hide_unused(torch: ModuleType) -> None:
    """Make transformers find neither torch.distributed nor scipy; it caches each result for the whole process."""
    from transformers.utils import import_utils

    with mock.patch.object(torch.distributed, "is_available", return_value=False):
        import_utils.is_torch_distributed_available.cache_clear()
        import_utils.is_torch_distributed_available()
    with mock.patch.object(import_utils, "_is_package_available", return_value=(False, "")):
        import_utils.is_scipy_available.cache_clear()
        import_utils.is_scipy_available()
