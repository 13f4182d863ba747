"""A small GPU out of a large one: `with budget("2 GiB"):` runs out of memory where a 2 GiB device
would.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterable, Iterator

import torch

from memlab.ledger import COLUMNS, Observation, rank_of
from memlab.measurement import Measurement
from memlab.meters.counter import Held
from memlab.meters.device import bytes_alive, limit_for, resolve_device
from memlab.meters.observer import Observer
from memlab.meters.refusals import OverBudget, refuse_over_budget
from memlab.units import format_bytes, parse_bytes

_active: Budget | None = None


def active_budget() -> Budget | None:
    """Return the budget that is in force, if any."""
    return _active


@contextlib.contextmanager
def budget(
    size: int | str, *, device: str | torch.device | None = None, scratch: bool = True
) -> Iterator[Budget]:
    """Allow at most `size` bytes on a device; the allocation that passes it raises.

    Everything alive on the device counts, also what was there before. On CUDA the allocator
    enforces it (`torch.cuda.set_per_process_memory_fraction`; cuBLAS's workspaces are allowed on
    top). On the CPU every operator's result is counted as it is made, in the thread that set the
    budget; what an operator takes for itself and gives back, and what compiled code makes, is not
    seen here, but `memlab.measure` inside the budget sees it and raises the same error afterwards.

    Args:
        size: "2 GiB", "600 MiB" or a number of bytes.
        device: `"cpu"` or `"cuda"`; by default CUDA if there is a device, else the CPU.
        scratch: whether what operators take for themselves counts in such a measurement. It depends
            on the processor and on the number of threads.

    Yields:
        The `Budget`.

    Raises:
        OverBudget: inside, when the budget is passed (a `torch.OutOfMemoryError`). It says the
            columns, the place and what to try.
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
    _active = Budget(limit, device, scratch)
    try:
        with _active:
            yield _active
    finally:
        _active = None


class Budget:
    """A budget in force: `limit` bytes on `device`."""

    def __init__(self, limit: int, device: torch.device, scratch: bool = True):
        self.limit = limit
        self.device = device
        self._counts_scratch = scratch
        self._observer = Observer(device, record=False)
        self._enforced = limit_for(device, limit, self._passed)
        self._started = 0

    def __enter__(self) -> Budget:
        self._enforced.start()
        self._observer.__enter__()
        self._observer.seen.look_around(before=True)
        self._started = time.time_ns()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: object) -> None:
        self._observer.__exit__()
        ran_out = isinstance(error, torch.OutOfMemoryError) and not isinstance(error, OverBudget)
        columns = self.columns() if ran_out else {}
        self._enforced.stop()
        if ran_out:
            place = f"An operator {self._observer.place(failed=True)}"
            detail = f" asked for too much: {str(error).split('. ')[0]}"
            raise OverBudget(self.limit, None, place, columns, detail=detail) from error

    def alive(self) -> int:
        """Return the bytes alive now, as this budget counts them."""
        return self._enforced.bytes_alive()

    def check(self, measurement: Measurement, alive_before: int) -> None:
        """Refuse a measurement that passes the budget, where the device itself did not see it.

        Args:
            measurement: what was measured inside the budget.
            alive_before: bytes that were alive before it.

        Raises:
            OverBudget: it passes the budget.
        """
        if self._enforced.sees_scratch:
            return
        peak, columns = measurement.known_bytes, measurement.known_columns
        if self._counts_scratch:
            peak, columns = measurement.peak_bytes, measurement.columns
        refuse_over_budget(self.limit, peak + alive_before, columns, measurement.ledger)

    def columns(self) -> dict[str, int]:
        """Return the bytes alive now by column, as far as what they are was seen."""
        held_at = {held.address: held for held in self._enforced.held()}
        self._observer.seen.look_around(before=True)
        seen = [
            found
            for found in self._observer.seen.latest.values()
            if found.column != "kept" or self._is_from_before(held_at.get(found.address))
        ]
        return _by_column(held_at, seen, newest_is_parameter=_builds_a_module())

    def _is_from_before(self, held: Held | None) -> bool:
        """Whether it was there before the budget, before a model was called at all or, where no
        graph is made, before it was called last: else it is what the call works with.
        """
        if held is None:
            return False
        observer = self._observer
        last = observer.first_call if held.with_grad else observer.last_call
        return held.since < max(self._started, last)

    def _passed(self, asked: int, operator: str) -> OverBudget:
        place = f"{operator} {self._observer.place()}"
        detail = (
            f" asked for {format_bytes(asked)} while"
            f" {format_bytes(self.alive() - asked)} were alive"
        )
        return OverBudget(self.limit, asked, place, self.columns(), detail=detail)


def _builds_a_module() -> bool:
    """Whether one of PyTorch's modules is just being made."""
    frame = sys._getframe()
    while frame is not None:
        of_a_module = frame.f_globals.get("__name__", "").startswith("torch.nn.modules.")
        if of_a_module and frame.f_code.co_name == "__init__":
            return True
        frame = frame.f_back
    return False


def _by_column(
    held_at: dict[int, Held], observations: Iterable[Observation], newest_is_parameter: bool = False
) -> dict[str, int]:
    """Sum what is held at each address by what was seen there."""
    seen: dict[int, Observation] = {}
    for found in observations:
        address = found.address
        if address in held_at and found.time >= held_at[address].since:
            if address not in seen or rank_of(found) <= rank_of(seen[address]):
                seen[address] = found
    columns = dict.fromkeys(COLUMNS, 0)
    newest = max(held_at.values(), key=lambda held: held.since, default=None)
    for address, held in held_at.items():
        # What nobody saw is what the run made: where gradients are enabled, nearly all of it is
        # for the backward.
        unseen = "activations" if held.with_grad else "temporaries"
        if held is newest and newest_is_parameter:
            unseen = "parameters"
        columns[seen[address].column if address in seen else unseen] += held.bytes
    return columns
