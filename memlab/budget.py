"""A small GPU out of a large one: `with budget("2 GiB"):` runs out of memory where a 2 GiB device
would.
"""

from __future__ import annotations

import contextlib
import gc
import time
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from memlab.ledger import COLUMNS, PRIORITY
from memlab.meters.columns import Observer, live_storages, storages, tensors_in
from memlab.meters.cuda import clear_workspaces, workspace_bytes
from memlab.units import format_bytes, parse_bytes

# What to try when a column is the largest. The numbers are the course's notebooks.
ADVICE = {
    "parameters": "16-bit weights (notebook 02), sharding (05) or offloading (08)",
    "gradients": "the optimizer in backward (notebook 04), 16-bit gradients (02) or sharding (05)",
    "optimizer_state": (
        "a leaner optimizer (notebook 09), sharding (05) or offloading its state (08)"
    ),
    "activations": (
        "mixed precision (notebook 01), gradient checkpointing (03) or smaller micro-batches (04)"
    ),
    "batch": "smaller micro-batches (notebook 04) or streaming the data (06)",
    "temporaries": (
        "a fused optimizer or in-place operators (notebook 07), a fused loss (10) or smaller"
        " micro-batches (04)"
    ),
    "unattributed": "`del` for tensors that are no longer needed (notebook 00)",
}

_active: Budget | None = None


def active_budget() -> Budget | None:
    """The budget that is in force, if any."""
    return _active


def bytes_alive(device: torch.device | str) -> int:
    """Bytes that count against a budget now: live tensors' storages on the CPU, what the allocator
    holds on CUDA.
    """
    device = resolve_device(device)
    gc.collect()
    if device.type == "cuda":
        clear_workspaces()  # which the budget allows for
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved(device)
    return sum(storage.nbytes() for storage in live_storages(device).values())


@contextlib.contextmanager
def budget(size: int | str, *, device: str | torch.device | None = None) -> Iterator[Budget]:
    """Allow at most `size` bytes ("2 GiB", "600 MiB") on a device; the allocation that passes it
    raises.

    Everything alive on the device counts, also what was there before. On CUDA the allocator
    enforces it (`torch.cuda.set_per_process_memory_fraction`; cuBLAS's workspaces are allowed on
    top). On the CPU every operator's result is counted as it is made, in the thread that set the
    budget; what an operator takes for itself and gives back, and what compiled code makes, is not
    seen here, but `memlab.measure` inside the budget sees it and raises the same error afterwards.

    Raises:
        torch.OutOfMemoryError: inside, when the budget is passed. The message names the columns,
            the module and what to try.
        ValueError: the size is not a size, or more than that is alive already.
        RuntimeError: a budget is in force already.
    """
    global _active
    limit = parse_bytes(size)
    if _active is not None:
        raise RuntimeError(
            f"a budget of {format_bytes(_active.limit)} is in force already, and budgets do not"
            " nest"
        )
    device = resolve_device(device)
    alive = bytes_alive(device)
    if alive > limit:
        raise ValueError(
            f"a budget of {format_bytes(limit)} is below what is alive already:"
            f" {format_bytes(alive)}. Delete what is not needed (`del model`), or allow more."
        )
    _active = Budget(limit, device)
    try:
        with _active:
            yield _active
    finally:
        _active = None


def resolve_device(device: str | torch.device | None = None) -> torch.device:
    """The device to measure: the one given, else the current CUDA device, else the CPU.

    Raises:
        ValueError: the device is not there, or memlab has no meter for it.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f'{device!r} is not a device. Write "cpu" or "cuda"') from error
    if device.type == "cpu":
        return torch.device("cpu")
    if device.type == "meta":
        raise ValueError(
            'the "meta" device has no memory: nothing can be measured on it. Use "cpu" or "cuda"'
        )
    if device.type != "cuda":
        raise ValueError(f'memlab has no meter for {device.type!r}. Use "cpu" or "cuda"')
    if not torch.cuda.is_available():
        raise ValueError(
            "no CUDA device is there (torch.cuda.is_available() is False). Use device='cpu'"
        )
    index = torch.cuda.current_device() if device.index is None else device.index
    if index >= torch.cuda.device_count():
        raise ValueError(
            f"cuda:{index} is not there: this machine has {torch.cuda.device_count()} CUDA"
            " device(s)"
        )
    return torch.device("cuda", index)


class Budget:
    """A budget in force: `limit` bytes on `device`."""

    def __init__(self, limit: int, device: torch.device):
        self.limit = limit
        self.device = device
        self._observer = Observer(device, record=False)
        self._counter: _Counter | None = None

    def __enter__(self) -> Budget:
        if self.device.type == "cuda":
            total = torch.cuda.get_device_properties(self.device).total_memory
            self._fraction_before = torch.cuda.get_per_process_memory_fraction(self.device)
            allowed = self.limit + workspace_bytes(self.device)
            torch.cuda.set_per_process_memory_fraction(min(1.0, allowed / total), self.device)
        else:
            self._counter = _Counter(self)
            self._counter.__enter__()
        self._observer.__enter__()
        self._observer.look_around(before=True)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: object) -> None:
        self._observer.__exit__()
        if self._counter is not None:
            self._counter.__exit__(kind, error, traceback)
            self._counter.forget()
        else:
            torch.cuda.set_per_process_memory_fraction(self._fraction_before, self.device)
            if isinstance(error, torch.OutOfMemoryError) and not getattr(error, "memlab", False):
                now = time.time_ns()
                alive = [
                    _Held(storage.nbytes(), address, now, True)
                    for address, storage in live_storages(self.device).items()
                ]
                where = (
                    f"An operator {self._observer.place(failed=True)} asked for too much:"
                    f" {str(error).split('. ')[0]}"
                )
                raise out_of_memory(self.limit, where, self._columns(alive)) from error

    def check(self, peak: int, where: str, columns: dict[str, int]) -> None:
        """Raise if a measured peak passes the budget: it counts what operators took for themselves,
        too.
        """
        if peak > self.limit:
            raise out_of_memory(
                self.limit, f"{where}: {format_bytes(peak)} at the measured peak", columns
            )

    def alive(self) -> int:
        """Bytes alive now, as this budget counts them."""
        if self._counter is not None:
            return self._counter.total
        return torch.cuda.memory_reserved(self.device)

    def _columns(self, alive: Iterable[_Held]) -> dict[str, int]:
        """Bytes alive by column, as far as what they are was seen."""
        self._observer.look_around()
        held_at = {held.address: held for held in alive}
        seen: dict[int, str] = {}
        for moment, address, column, _ in self._observer.latest.values():
            if address in held_at and moment >= held_at[address].since:
                strongest = PRIORITY[column] <= PRIORITY.get(seen.get(address, ""), len(PRIORITY))
                seen[address] = column if strongest else seen[address]
        columns = dict.fromkeys(COLUMNS, 0)
        for address, held in held_at.items():
            # What nobody saw is what the run made: where gradients are enabled, nearly all of it is
            # for the backward.
            columns[seen.get(address, "activations" if held.with_grad else "temporaries")] += (
                held.bytes
            )
        return columns

    def _passed(self, asked: int, operator: str) -> torch.OutOfMemoryError:
        where = (
            f"{operator} {self._observer.place()} asked for {format_bytes(asked)} while "
            f"{format_bytes(self._counter.total - asked)} were alive"
        )
        return out_of_memory(self.limit, where, self._columns(self._counter.alive.values()))


def out_of_memory(limit: int, where: str, columns: dict[str, int]) -> torch.OutOfMemoryError:
    """The error for a passed budget: what asked, what was alive by column, what to try."""
    held = ", ".join(f"{name} {format_bytes(columns[name])}" for name in COLUMNS if columns[name])
    largest = max(COLUMNS, key=lambda name: columns[name])
    error = torch.OutOfMemoryError(
        f"out of memory: the budget is {format_bytes(limit)}. {where}.\n"
        f"Alive by column: {held}.\n"
        f"The largest column is {largest}. Try {ADVICE[largest]}."
    )
    error.memlab = True
    error.columns = columns
    return error


@dataclass(slots=True)
class _Held:
    """A storage that counts: its bytes, since when (nanoseconds), and whether it was made with
    gradients enabled.
    """

    bytes: int
    address: int
    since: int
    with_grad: bool
    reference: weakref.ref | None = None


class _Counter(TorchDispatchMode):
    """Counts the storages that operators return, and raises when the budget is passed."""

    def __init__(self, owner: Budget):
        super().__init__()
        self.owner = owner
        # By the storage's identity, since its address changes when it is resized.
        self.alive: dict[int, _Held] = {}
        self.total = 0
        for storage in live_storages(owner.device).values():
            self._add(storage)

    def _add(self, storage: torch.UntypedStorage) -> int:
        """Count a storage as it is now; how many bytes that adds."""
        key, size = id(storage), storage.nbytes()
        held = self.alive.get(key)
        if held is None:
            # A memory map takes the file's room.
            if not size or storage.filename is not None:
                return 0

            def gone(reference: weakref.ref, key: int = key) -> None:
                if key in self.alive and self.alive[key].reference is reference:
                    self.total -= self.alive.pop(key).bytes

            held = self.alive[key] = _Held(
                0, 0, 0, torch.is_grad_enabled(), weakref.ref(storage, gone)
            )
        added = size - held.bytes
        if added or held.address != storage.data_ptr():
            held.bytes, held.address, held.since = size, storage.data_ptr(), time.time_ns()
            self.total += added
        return added

    def forget(self) -> None:
        """Stop following the storages that are still alive."""
        self.alive.clear()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tensors_in(result):
            if tensor.device != self.owner.device:
                continue
            added = 0
            with contextlib.suppress(Exception):  # no memory of its own (functional)
                parts = [
                    storage for storage in storages(tensor) if storage.device == self.owner.device
                ]  # else fake
                added = sum(self._add(storage) for storage in parts)
            if added > 0 and self.total > self.owner.limit:
                raise self.owner._passed(added, str(function.overloadpacket))
        return result
