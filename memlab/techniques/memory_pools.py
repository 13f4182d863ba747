"""Memory pools: allocate one buffer once, and carve every tensor out of it.

A pool lowers the number of allocations, and it can lower what is lost between blocks
(fragmentation). It never lowers the bytes that are alive at once: no pool is smaller than that.
`plan` chooses a place for every tensor of a step whose sizes and lives were recorded, so that the
pool is hardly larger. `Pool` is such a buffer. It hands out tensors, at a planned place or at the
first that is free, and it checks their lives: what is in use is never handed out a second time.

Sources: Pisarchyk and Lee, "Efficient Memory Management for Deep Neural Net Inference" (2020),
arXiv:2001.03288, "Greedy by Size for Offset Calculation"; Wilson et al., "Dynamic Storage
Allocation: A Survey and Critical Review" (1995), for first fit and fragmentation. In production:
`torch.cuda.MemPool`, the pools of CUDA graphs, `expandable_segments`.
"""

import bisect
import functools
import math
import threading
import weakref
from collections import deque
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

ORDERS = ("size", "birth")


# --- A plan: where each tensor of a recorded step will lie ----------------------------------------


class Request(NamedTuple):
    """One tensor of a recorded step: its bytes, and its life from `born` up to, but without,
    `died`.

    The two moments are numbers of any clock. A tensor that outlives the step gets
    `died=math.inf`.
    """

    bytes: int
    born: float
    died: float


class Plan(NamedTuple):
    """Where each request lies, and what that takes."""

    #: Bytes from the start of the pool, one for each request, in the order of the requests.
    offsets: tuple[int, ...]
    #: The size of the pool.
    pool_bytes: int
    #: The most bytes alive at once: no pool is smaller.
    peak_bytes: int
    #: The bytes of all requests, which is what a buffer for each of them would take.
    total_bytes: int

    @property
    def lost_bytes(self) -> int:
        """The part of the pool that is in holes when the most bytes are alive."""
        return self.pool_bytes - self.peak_bytes


def plan(requests: Iterable[Request], alignment: int = 64, order: str = "size") -> Plan:
    """Give every request an offset, so that no two that are alive at the same time share a byte.

    The time is quadratic in the number of requests.

    Args:
        requests: `Request`s, or triples (bytes, born, died).
        alignment: Each offset and each size is rounded up to a multiple of this many bytes, a power
            of two. PyTorch aligns to 64 bytes on a CPU and to 512 on CUDA.
        order: "size" places the largest first, each into the smallest gap that takes it; the whole
            step has to be known. "birth" places them as they come, each into the first gap: what an
            allocator can do that does not know what follows.

    Returns:
        The plan.

    Raises:
        ValueError: An unknown order, an alignment that is no power of two, bytes below 1, or a
            request that dies before it is born or at the same moment.
    """
    requests = [Request(*request) for request in requests]
    if order not in ORDERS:
        raise ValueError(f"order must be one of {', '.join(ORDERS)}, but it is {order!r}.")
    _check_alignment(alignment)
    for number, request in enumerate(requests):
        _check_request(number, request)
    largest_first = order == "size"
    turns = sorted(
        range(len(requests)),
        key=lambda i: (-requests[i].bytes if largest_first else 0, requests[i].born),
    )
    offsets = [0] * len(requests)
    placed: list[tuple[int, int, float, float]] = []  # (start, end, born, died), by start
    for index in turns:
        request = requests[index]
        size = _round_up(request.bytes, alignment)
        gaps, end = _gaps_beside(request, placed, size)
        if not gaps:
            offset = end
        else:
            offset = min(gaps)[1] if largest_first else gaps[0][1]
        offsets[index] = offset
        bisect.insort(placed, (offset, offset + size, request.born, request.died))
    return Plan(
        offsets=tuple(offsets),
        pool_bytes=max((end for _, end, _, _ in placed), default=0),
        peak_bytes=_most_alive(requests),
        total_bytes=sum(request.bytes for request in requests),
    )


def _check_request(number: int, request: Request) -> None:
    _check_whole(request.bytes, f"The bytes of request {number}")
    # So written, NaN is refused as well.
    if not request.born < request.died:
        raise ValueError(
            f"Request {number} must die after it is born, but it is born at {request.born} and "
            f"dies at {request.died}. Leave out what has no life."
        )


def _gaps_beside(
    request: Request, placed: list[tuple[int, int, float, float]], size: int
) -> tuple[list[tuple[int, int]], int]:
    """Return the gaps of at least `size` bytes, as (bytes, start), between those placed that are
    alive with the request, and where the last of these ends.
    """
    gaps = []
    end = 0
    for start, stop, born, died in placed:
        if born < request.died and request.born < died:
            if start - end >= size:
                gaps.append((start - end, end))
            end = max(end, stop)
    return gaps, end


def _most_alive(requests: Sequence[Request]) -> int:
    # At one moment the dead leave before the new ones come: a life ends before `died`.
    changes = sorted([(r.born, r.bytes) for r in requests] + [(r.died, -r.bytes) for r in requests])
    alive = most = 0
    for _, change in changes:
        alive += change
        most = max(most, alive)
    return most


# --- A pool: the buffer, and who has which part of it ---------------------------------------------


class Pool:
    """One buffer, from which tensors are lent.

    Any thread may take and give back. A pool knows nothing of CUDA streams: keep one for each.

    Args:
        nbytes: The size of the buffer, which is all that is ever allocated.
        device: Where it lies.
        alignment: Each tensor begins at, and takes, a multiple of this many bytes, a power of two.
            Counted from the start of the buffer, which the allocator aligns to 64 bytes on a CPU
            and to 512 on CUDA.

    Raises:
        ValueError: Bytes below 1, or an alignment that is no power of two.
    """

    def __init__(self, nbytes: int, device: torch.device | str = "cpu", alignment: int = 64):
        _check_whole(nbytes, "nbytes")
        _check_alignment(alignment)
        self.alignment = alignment
        self._buffer = torch.empty(nbytes, dtype=torch.uint8, device=device)
        self._lent: list[tuple[int, int]] = []  # (start, end) of what is out, by start
        self._ended: deque[tuple[int, int]] = deque()  # what has come back and is still in `_lent`
        self._watches: dict[tuple[int, int], weakref.ref] = {}
        self._lock = threading.Lock()

    @property
    def nbytes(self) -> int:
        """The size of the pool in bytes."""
        return self._buffer.nbytes

    @property
    def free_bytes(self) -> int:
        """The bytes that nobody has."""
        return sum(stop - start for start, stop in self._gaps())

    @property
    def largest_free_bytes(self) -> int:
        """The largest tensor that the pool could lend now. Below `free_bytes` it is fragmented."""
        return max((stop - start for start, stop in self._gaps()), default=0)

    def take(
        self, shape: Sequence[int], dtype: torch.dtype = torch.float32, at: int | None = None
    ) -> "Lease":
        """Lend a tensor, with whatever was in its bytes before (as `torch.empty`).

        Args:
            shape: Its sizes.
            dtype: Its type.
            at: The offset in bytes, from a `Plan`. Without it the first gap is taken that is large
                enough.

        Returns:
            The lease of the tensor.

        Raises:
            torch.OutOfMemoryError: No gap is large enough, even if enough bytes are free in all.
            RuntimeError: Bytes at `at` are in use, so what runs is not what was planned.
            ValueError: An empty shape or one with a size below 1, or an `at` outside of the pool or
                not aligned.
        """
        shape = tuple(shape)
        if any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in shape):
            raise ValueError(f"shape must be sizes of at least 1, but it is {shape}.")
        bytes_ = math.prod(shape) * dtype.itemsize
        size = _round_up(bytes_, self.alignment)
        with self._lock:
            gaps = self._gaps_now()
            if at is None:
                start = self._first_gap(bytes_, gaps)
            else:
                start = self._check_place(at, bytes_, gaps)
            place = (start, min(start + size, self.nbytes))
            # Through DLPack the tensor has a storage of its own over the pool's bytes. Views of the
            # buffer would share one version counter, so that autograd takes a write to one for a
            # write to all; and of a shared storage nobody could say whether this tensor is still in
            # use.
            tensor = torch.from_dlpack(self._buffer[start : start + bytes_]).view(dtype).view(shape)
            # The storage outlives the lease where a view or autograd's graph holds it, and so does
            # its place. The garbage collector may call this anywhere, also where the lock is held:
            # so it only takes a note.
            note = functools.partial(_note, self._ended, place)
            self._watches[place] = weakref.ref(tensor.untyped_storage(), note)
            bisect.insort(self._lent, place)
        return Lease(self, tensor)

    def _first_gap(self, bytes_: int, gaps: list[tuple[int, int]]) -> int:
        for start, stop in gaps:
            if stop - start >= bytes_:
                return start
        free = sum(stop - start for start, stop in gaps)
        largest = max((stop - start for start, stop in gaps), default=0)
        raise torch.OutOfMemoryError(
            f"The pool has no gap of {bytes_:,} bytes: {free:,} of its {self.nbytes:,}"
            f" bytes are free, the largest gap is {largest:,}. Give tensors back, plan"
            " their places, or make a larger pool."
        )

    def _check_place(self, at: int, bytes_: int, gaps: list[tuple[int, int]]) -> int:
        if isinstance(at, bool) or not isinstance(at, int) or at < 0 or at % self.alignment:
            raise ValueError(
                f"at must be a multiple of the pool's alignment of {self.alignment} bytes, but it"
                f" is {at!r}."
            )
        if at + bytes_ > self.nbytes:
            raise ValueError(
                f"{bytes_:,} bytes at {at:,} end outside of the pool, which has {self.nbytes:,}."
            )
        if not any(start <= at and at + bytes_ <= stop for start, stop in gaps):
            raise RuntimeError(
                f"Of the {bytes_:,} bytes at {at:,} some are still in use: a tensor lives longer"
                " than the plan says. Give it back before, or record the step again and make a new"
                " plan."
            )
        return at

    def _gaps(self) -> list[tuple[int, int]]:
        with self._lock:
            return self._gaps_now()

    def _gaps_now(self) -> list[tuple[int, int]]:
        while self._ended:
            place = self._ended.popleft()
            self._lent.remove(place)
            del self._watches[place]
        starts = [start for start, _ in self._lent] + [self.nbytes]
        ends = [0] + [stop for _, stop in self._lent]
        return [(end, start) for end, start in zip(ends, starts, strict=True) if start > end]


def _note(ended: deque, place: tuple[int, int], _: object) -> None:
    ended.append(place)


class Lease:
    """A tensor that a `Pool` has lent: read it as `lease.tensor`, and end with `lease.give_back()`.

    A lease that is dropped is given back as well, once no tensor looks at its bytes any more.
    """

    def __init__(self, pool: Pool, tensor: Tensor):
        self._pool = pool
        self._tensor = tensor
        self._lock = threading.Lock()

    @property
    def tensor(self) -> Tensor:
        """The tensor.

        Raises:
            RuntimeError: It was given back, and its bytes may be somebody else's.
        """
        tensor = self._tensor
        if tensor is None:
            raise RuntimeError("This tensor was given back to its pool: take a new one.")
        return tensor

    def give_back(self) -> None:
        """Return the bytes to the pool.

        Raises:
            RuntimeError: It was given back before, or another tensor (a name of yours, a view,
                something that autograd saved) still looks at the bytes; then the lease stays as it
                is.
        """
        with self._lock:
            tensor, self._tensor = self.tensor, None
            shape, dtype, device = tensor.shape, tensor.dtype, tensor.device
            watch = weakref.ref(tensor.untyped_storage())
            del tensor
            storage = watch()
            if storage is not None:
                self._tensor = torch.empty(0, dtype=dtype, device=device).set_(storage, 0, shape)
                raise RuntimeError(
                    f"A tensor still looks at these bytes (lent as {tuple(shape)}, {dtype}), and"
                    " would see what the next one writes. Delete the names, views and graphs that"
                    " hold it, then give it back."
                )


def _round_up(bytes_: int, alignment: int) -> int:
    return -(-bytes_ // alignment) * alignment


def _check_whole(value: int, what: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{what} must be a whole number of at least 1, but it is {value!r}.")


def _check_alignment(alignment: int) -> None:
    whole = isinstance(alignment, int) and not isinstance(alignment, bool)
    if not whole or alignment < 1 or alignment & (alignment - 1):
        raise ValueError(f"alignment must be a power of two, but it is {alignment!r}.")
