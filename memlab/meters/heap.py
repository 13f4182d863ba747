"""The host's heap: the bytes in use there, tensors or not."""

from __future__ import annotations

import ctypes
import gc
import sys
import tracemalloc
from collections.abc import Callable


class _Mallinfo2(ctypes.Structure):
    """glibc's `struct mallinfo2`, from its malloc.h."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    ]


class _Statistics(ctypes.Structure):
    """macOS' `struct malloc_statistics_t`, from its malloc/malloc.h."""

    _fields_ = [
        ("blocks_in_use", ctypes.c_uint),
        ("size_in_use", ctypes.c_size_t),
        ("max_size_in_use", ctypes.c_size_t),
        ("size_allocated", ctypes.c_size_t),
    ]


def heap_in_use() -> int | None:
    """Return the bytes in use on the heap of this process: what `malloc` gave out and nobody has
    given back.

    It moves when memory is kept that no device's allocator knows of: the nodes of a graph, NumPy
    arrays, the buffers of a library. The resident size does not tell that: the system counts pages,
    and what was freed and is used again hides in them.

    Tensors on the CPU are part of it: subtract the ledger's bytes. Shared memory and memory maps
    are not, and neither are Python's own small objects, up to 512 bytes each: Python takes pages
    for them from the system.

    On Linux it is `uordblks + hblkhd` of glibc's `mallinfo2`, summed over all its arenas (man
    mallinfo; glibc 2.33 or later), on macOS `malloc_zone_statistics` of all zones. glibc counts a
    few freed pieces a thread as in use (its cache for each thread, at most 7 of each size), so a
    single reading is right to some kilobytes. A call walks the lists of free pieces: 0.01 ms in a
    training loop, 40 to 80 ms in a heap that was made to have 100,000 of them.

    Returns:
        Bytes; None where the allocator does not say.
    """
    return None if _read is None else _read()


def most_held_by_python(act: Callable[[], object]) -> int:
    """Return the most bytes that Python's objects and NumPy's arrays take at once while something
    is done, without what was there before (`tracemalloc`).

    Switch nothing on meanwhile that makes objects of its own, as a counter of operations does for
    each backward.

    Args:
        act: what is done.
    """
    running = tracemalloc.is_tracing()
    if not running:
        tracemalloc.start()
    try:
        gc.collect()
        before, _ = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        act()
        return tracemalloc.get_traced_memory()[1] - before
    finally:
        if not running:
            tracemalloc.stop()


def _glibc() -> Callable[[], int | None] | None:
    try:
        mallinfo2 = ctypes.CDLL(None).mallinfo2
    except (OSError, AttributeError, TypeError):  # another C library, or one from before 2021
        return None
    mallinfo2.argtypes, mallinfo2.restype = [], _Mallinfo2

    def read() -> int | None:
        heap = mallinfo2()
        # Another allocator may stand in for glibc's (jemalloc, tcmalloc). Then glibc's is empty.
        return heap.uordblks + heap.hblkhd if heap.arena else None

    return read


def _macos() -> Callable[[], int | None] | None:
    try:
        malloc_zone_statistics = ctypes.CDLL(None).malloc_zone_statistics
    except (OSError, AttributeError):
        return None
    malloc_zone_statistics.argtypes = [ctypes.c_void_p, ctypes.POINTER(_Statistics)]
    malloc_zone_statistics.restype = None

    def read() -> int | None:
        statistics = _Statistics()
        malloc_zone_statistics(None, ctypes.byref(statistics))  # no zone means all of them
        return statistics.size_in_use

    return read


_read = _macos() if sys.platform == "darwin" else _glibc()
