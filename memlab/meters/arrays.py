"""The memory of NumPy's arrays, of which no allocator of PyTorch knows: by NumPy's own hook for it.

An evaluation's predictions that were moved to NumPy, say. NumPy lets others stand between it and
`malloc`, by `PyDataMem_SetHandler` of its C interface (NEP 49,
https://numpy.org/doc/stable/reference/c-api/data_memory.html).
"""

from __future__ import annotations

import ctypes
import time
from ctypes import PYFUNCTYPE, c_size_t, c_void_p, py_object

import numpy as np

from memlab.ledger import Event

#: Smaller arrays are not noted: they are less than a page of memory.
LEAST = 4096

_FUNCTIONS = {
    "malloc": PYFUNCTYPE(c_void_p, c_void_p, c_size_t),
    "calloc": PYFUNCTYPE(c_void_p, c_void_p, c_size_t, c_size_t),
    "realloc": PYFUNCTYPE(c_void_p, c_void_p, c_void_p, c_size_t),
    "free": PYFUNCTYPE(None, c_void_p, c_void_p, c_size_t),
}


class _Handler(ctypes.Structure):
    """NumPy's `PyDataMem_Handler` with its `PyDataMemAllocator`, from `ndarraytypes.h`."""

    _fields_ = [
        ("name", ctypes.c_char * 127),
        ("version", ctypes.c_uint8),
        ("ctx", c_void_p),
        *((name, c_void_p) for name in _FUNCTIONS),
    ]


#: What NumPy calls the capsule of a handler.
_CAPSULE = b"mem_handler"

_new_capsule = PYFUNCTYPE(py_object, c_void_p, ctypes.c_char_p, c_void_p)(
    ("PyCapsule_New", ctypes.pythonapi)
)
_address_in = PYFUNCTYPE(c_void_p, py_object, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)


class Arrays:
    """Notes the memory of NumPy's arrays between `start()` and `stop()`, in `events`.

    NumPy has a handler for each thread: noted is what this one makes, also where another one frees
    it.
    """

    def __init__(self) -> None:
        self.events: list[Event] = []
        self._sizes: dict[int, int] = {}
        self._hook: _Hook | None = None

    def start(self) -> None:
        """Begin to note; without NumPy's hook nothing is noted."""
        if _get_handler is not None:
            before = _get_handler()
            address = _address_in(before, _CAPSULE)
            self._hook = _hooks.get(address) or _hooks.setdefault(address, _Hook(before))
            self._hook.start(self)

    def stop(self) -> None:
        """Note no more. From now on an array of before is freed as if nobody had stood there."""
        if self._hook is not None:
            self._hook.stop()
            self._hook = None

    def came(self, address: int | None, size: int) -> None:
        """Note that an array has got memory."""
        if address and size >= LEAST:
            self._sizes[address] = size
            self.events.append(Event(time.time_ns(), address, size))

    def goes(self, address: int | None) -> None:
        """Note that an array gives its memory back."""
        size = self._sizes.pop(address, 0)
        if size:
            self.events.append(Event(time.time_ns(), address, -size))


class _Hook:
    """A handler over another one: it notes what passes through, and while it is off NumPy calls the
    other one's functions.

    It stays for good, as each array keeps the handler by which it is freed.
    """

    def __init__(self, before: object):
        self._before = before
        self._base = _Handler.from_address(_address_in(before, _CAPSULE))
        self._arrays = Arrays()
        self._ours = _Handler(b"memlab", self._base.version, self._base.ctx)
        self._capsule = _new_capsule(ctypes.addressof(self._ours), _CAPSULE, None)
        self._calls, self._called = {}, {}
        for name, kind in _FUNCTIONS.items():
            self._calls[name] = kind(getattr(self._base, name))
            self._called[name] = kind(getattr(self, f"_{name}"))
        self.stop()

    def start(self, arrays: Arrays) -> None:
        self._arrays = arrays
        for name, function in self._called.items():
            setattr(self._ours, name, ctypes.cast(function, c_void_p))
        _set_handler(self._capsule)

    def stop(self) -> None:
        for name in _FUNCTIONS:
            setattr(self._ours, name, getattr(self._base, name))
        _set_handler(self._before)
        self._arrays = Arrays()

    def _malloc(self, ctx: int, size: int) -> int | None:
        address = self._calls["malloc"](ctx, size)
        self._arrays.came(address, size)
        return address

    def _calloc(self, ctx: int, count: int, size: int) -> int | None:
        address = self._calls["calloc"](ctx, count, size)
        self._arrays.came(address, count * size)
        return address

    def _realloc(self, ctx: int, before: int, size: int) -> int | None:
        address = self._calls["realloc"](ctx, before, size)
        if address:
            self._arrays.goes(before)
            self._arrays.came(address, size)
        return address

    def _free(self, ctx: int, address: int, size: int) -> None:
        self._arrays.goes(address)
        self._calls["free"](ctx, address, size)


#: By the address of the handler that they stand over.
_hooks: dict[int, _Hook] = {}


def _from_table() -> tuple:
    """`PyDataMem_GetHandler` and `PyDataMem_SetHandler`: their places in NumPy's table of functions
    are part of its binary interface (`__multiarray_api.h`). None where there is no such table.
    """
    try:
        table = np._core.multiarray._ARRAY_API
    except AttributeError:
        return None, None
    functions = ctypes.cast(_address_in(table, None), ctypes.POINTER(c_void_p))
    return PYFUNCTYPE(py_object)(functions[305]), PYFUNCTYPE(py_object, py_object)(functions[304])


_get_handler, _set_handler = _from_table()
