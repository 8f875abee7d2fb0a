"""A CUDA device that is pretended on the CPU, so that code for it runs, with right numbers, where there is none.

Its tensors say `device="cuda:0"` and hold CPU tensors. An operation on them and on tensors of the CPU is refused as
CUDA refuses it, and so is `numpy()`. A real device differs in rounding, speed and sampling.
"""

from contextlib import contextmanager
from unittest import mock

import numpy as np
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

DEVICE, CPU = torch.device("cuda", 0), torch.device("cpu")
ATEN = torch.ops.aten
MOVING = {ATEN.copy_.default, ATEN._to_copy.default}
# Which arguments are indices: those may lie on the CPU.
INDEXING = {ATEN.index.Tensor: (1,), ATEN.index_put_.default: (1,), ATEN._index_put_impl_.default: (1,)}


class Pretended(torch.Tensor):
    """A tensor that is said to lie on the device. torch's own code takes it for one of its "meta" device."""

    device = DEVICE
    is_cuda = True
    is_cpu = False
    is_meta = False

    @staticmethod
    def __new__(cls, held):
        layout = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype}
        return torch.Tensor._make_wrapper_subclass(cls, held.shape, device="meta", **layout)

    def __init__(self, held):
        self.held = held

    def __repr__(self):
        return f"Pretended({self.held!r})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return computed(func, args, kwargs)


def computed(func, args, kwargs):
    """The result of an operation that makes tensors of the device or is given some."""
    kwargs = dict(kwargs or {})
    if func not in MOVING:
        refuse_mixed(func, [arg for n, arg in enumerate(args) if n not in INDEXING.get(func, ())], kwargs)
    there = True
    if kwargs.get("device") is not None:
        there, kwargs["device"] = torch.device(kwargs["device"]).type != "cpu", CPU
    result = func(*tree_map(held, args), **tree_map(held, kwargs))
    if func is ATEN.copy_.default:
        return args[0]
    known = {id(arg.held): arg for arg in tree_flatten((args, kwargs))[0] if isinstance(arg, Pretended)}
    return tree_map(lambda x: known.get(id(x), placed(x)), result) if there else result


def held(value):
    """The CPU tensor behind one of the device."""
    return value.held if isinstance(value, Pretended) else value


def placed(value):
    """A CPU tensor on the device."""
    return Pretended(value) if isinstance(value, torch.Tensor) and not isinstance(value, Pretended) else value


def as_indices(index):
    """An index with its lists as tensors of the CPU."""
    if isinstance(index, tuple):
        return tuple(as_indices(part) for part in index)
    return torch.as_tensor(index) if isinstance(index, list | np.ndarray) else index


def refuse_mixed(func, *values):
    """Raise as CUDA does where tensors of both devices are given; a scalar of the CPU is welcome."""
    tensors = [value for value in tree_flatten(values)[0] if isinstance(value, torch.Tensor)]
    assert not any(tensor.device.type == "meta" for tensor in tensors), f"values were lost before {func}"
    plain = [tensor for tensor in tensors if not isinstance(tensor, Pretended) and tensor.dim() > 0]
    if plain and any(isinstance(tensor, Pretended) for tensor in tensors):
        raise RuntimeError(f"Expected all tensors to be on the same device, but found cuda:0 and cpu in {func}")


class _Creating(TorchDispatchMode):
    """Makes what is to be made on the device, or moved there."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        device = str((kwargs or {}).get("device"))
        # Some backward formulas make a zero beside a gradient, on what they take for its device.
        if device.startswith("cuda") or (device == "meta" and func is ATEN.scalar_tensor.default):
            return computed(func, args, kwargs)
        return func(*args, **(kwargs or {}))


class _Reading(TorchFunctionMode):
    """Does what torch has no place to intercept for."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.Tensor.tolist:  # refused of any class that holds another tensor
            return func(held(args[0]))
        if func in (
            torch.Tensor.__getitem__,
            torch.Tensor.__setitem__,
        ):  # lists would lose their values
            args = (args[0], as_indices(args[1]), *args[2:])
        if func is torch.tensor and str(kwargs.get("device")).startswith("cuda"):  # asks the device itself for room
            return placed(func(*args, **(kwargs | {"device": CPU})))
        if func is torch.Tensor.to:  # asks it for its number
            args = (args[0], *(DEVICE if str(value) == "cuda" else value for value in args[1:]))
        if func is torch.nn.functional.scaled_dot_product_attention:  # the kernel is chosen by the device's type
            refuse_mixed(func, args, kwargs)
            result = func(*tree_map(held, args), **tree_map(held, kwargs))
            return placed(result) if isinstance(args[0], Pretended) else result
        return func(*args, **kwargs)


@contextmanager
def pretended_cuda():
    """One CUDA device, for as long as this lasts."""
    there = {"is_available": lambda: True, "device_count": lambda: 1, "current_device": lambda: 0}
    for name in ("_lazy_init", "synchronize", "get_rng_state", "set_rng_state"):
        there[name] = lambda *_, name=name: None
    torch.__future__.set_overwrite_module_params_on_conversion(True)  # a parameter of another class, not another value
    try:
        with mock.patch.multiple(torch.cuda, **there), _Creating(), _Reading():
            yield DEVICE
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)
