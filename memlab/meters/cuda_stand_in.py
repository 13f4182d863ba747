"""A CUDA device that is not there: enough of one that unchanged training code runs on fake tensors.

A fake tensor has a shape, a data type and a device, and no bytes. PyTorch runs a training on fake
tensors of a CUDA device only where CUDA is: its autograd engine asks the device for its streams,
and `torch.cuda` asks the driver. `CudaStandIn` answers both while it is switched on, and takes all
of it away again.

Three things are private here, because PyTorch has no public word for them; one test holds each of
them (`tests/test_private.py`):
- `torch._C._ensureCUDADeviceGuardSet()` is PyTorch's own: it gives a build that has CUDA and no GPU
  a guard that does nothing. It acts only where a guard is registered that counts no devices, so a
  build without CUDA is given such a one first (c10's table `device_guard_impl_registry`).
- The engine takes CUDA for the accelerator only if CUDA's hooks say that they are built, and asks
  whether a device has a context. (`at::detail::getCUDAHooks()`: an object, whose table of functions
  is replaced meanwhile.)
"""

from __future__ import annotations

import contextlib
import ctypes
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

_TORCH = Path(torch.__file__).parent

# A C++ object begins with the address of its class's table of virtual functions. Before the table
# stand two more entries.
_HEAD = 2
_TABLE = 128


@contextlib.contextmanager
def accelerator_stand_in() -> Iterator[None]:
    """Have autograd's engine work on fake CUDA tensors, where no CUDA device is.

    Raises:
        RuntimeError: this build of PyTorch cannot be made to.
    """
    if torch.cuda.is_available():
        yield
        return
    try:
        _set_guard()
        hooks = _Hooks()
    except (OSError, ValueError, AttributeError, StopIteration) as error:
        raise RuntimeError(
            f"PyTorch {torch.__version__} on {sys.platform} cannot predict a GPU without one: what"
            f" memlab needs of it is not where it was ({error}). Predict on Linux with torch 2.11"
            " to 2.13."
        ) from error
    with hooks:
        yield


def _library(name: str) -> ctypes.CDLL:
    """PyTorch's own library `name`, which is loaded already."""
    form = {"darwin": "lib{}.dylib", "win32": "{}.dll"}.get(sys.platform, "lib{}.so")
    return ctypes.CDLL(str(_TORCH / "lib" / form.format(name)))


def _set_guard() -> None:
    """Register a device guard for CUDA that does nothing, if there is none."""
    table = "_ZN3c104impl26device_guard_impl_registryE"
    guards = (ctypes.c_void_p * 2).in_dll(_library("c10"), table)
    cuda = 1  # c10::DeviceType::CUDA
    if guards[cuda]:
        torch._C._ensureCUDADeviceGuardSet()
        return
    # An object, all whose functions return 0: so it counts no devices. Nobody asks it more.
    nothing = ctypes.CFUNCTYPE(ctypes.c_long)(lambda: 0)
    functions = (ctypes.c_void_p * _TABLE)(*[_address(nothing)] * _TABLE)
    guard = (ctypes.c_void_p * 1)(ctypes.addressof(functions))
    guards[cuda] = ctypes.addressof(guard)
    try:
        torch._C._ensureCUDADeviceGuardSet()
    finally:
        if guards[cuda] == ctypes.addressof(guard):
            guards[cuda] = None
    if not guards[cuda]:
        raise ValueError("no guard was set")


class _Hooks:
    """CUDA's hooks, whose table says meanwhile that CUDA is built and has no context."""

    def __init__(self):
        get_hooks = _library("torch_cpu")._ZN2at6detail12getCUDAHooksEv
        get_hooks.restype = ctypes.c_void_p
        get_hooks.argtypes = []
        self._pointer = ctypes.c_void_p.from_address(get_hooks())
        self._before = self._pointer.value
        entries = ctypes.c_void_p * (_HEAD + _TABLE)
        size = ctypes.sizeof(ctypes.c_void_p)
        # The table may be shorter: what follows it is copied too, and never called.
        self._table = entries.from_buffer_copy(
            ctypes.string_at(self._before - _HEAD * size, ctypes.sizeof(entries))
        )
        answer = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p)
        self._functions = {"isBuilt": answer(lambda hooks: True)}
        self._functions["hasPrimaryContext"] = answer(lambda hooks: False)
        for name, function in self._functions.items():
            self._table[_HEAD + _slots().index(name)] = _address(function)

    def __enter__(self) -> None:
        size = ctypes.sizeof(ctypes.c_void_p)
        self._pointer.value = ctypes.addressof(self._table) + _HEAD * size

    def __exit__(self, *exception: object) -> None:
        self._pointer.value = self._before


def _slots() -> list[str]:
    """The virtual functions of `at::AcceleratorHooksInterface` in their order, from PyTorch's own
    header. (The destructor takes two places.)
    """
    header = _TORCH / "include" / "ATen" / "detail" / "AcceleratorHooksInterface.h"
    names = re.findall(r"\bvirtual [^;{]*?(~?\w+)\(", header.read_text())
    if not names or not names[0].startswith("~"):
        raise ValueError("the header of CUDA's hooks has another form")
    return ["", *names]


def _address(function: Callable) -> int:
    return ctypes.cast(function, ctypes.c_void_p).value
