"""What cannot be measured, and why: pure functions of what a recording saw.

Each raises an error that says what was wrong and what to do, or returns nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping, Sequence

import torch

from memlab.ledger import BUCKET, COLUMNS, Ledger, Observation
from memlab.meters.recorded import Recorded
from memlab.units import KiB, format_bytes

# Small constants that PyTorch keeps for good once they were needed are not a leak.
LEAK_TOLERANCE = 64 * KiB

#: What to try when a column is the largest.
ADVICE = {
    "parameters": "16-bit weights, sharding (FSDP) or parameter offloading",
    "gradients": "an optimizer that steps in backward, 16-bit gradients or sharding (FSDP)",
    "optimizer_state": "a leaner optimizer (8-bit AdamW), sharding (FSDP) or offloading its state",
    "activations": "mixed precision, gradient checkpointing or smaller micro-batches",
    "batch": "smaller micro-batches, or a data loader that streams the data",
    "kept": (
        "to keep less from step to step: numbers (loss.item()) instead of tensors, a data loader"
        " instead of a data set on the device, copies on the CPU"
    ),
    "temporaries": ("a fused optimizer, in-place operators, a fused loss or smaller micro-batches"),
    "unattributed": "`del` for tensors that are no longer needed",
}


class MemoryLeakError(RuntimeError):
    """Memory allocated inside a run was still alive when the run was over."""


class OverBudget(torch.OutOfMemoryError):
    """A budget was passed.

    Attributes:
        limit: the budget, in bytes.
        asked: the bytes that did not fit: what an operator asked for or, when the ledger found it
            afterwards, the measured peak (None: not known).
        place: which operator, in which module.
        columns: bytes alive by column at that moment.
        measured: whether the ledger found it afterwards, and not the allocation itself.
    """

    def __init__(
        self,
        limit: int,
        asked: int | None,
        place: str,
        columns: Mapping[str, int],
        *,
        measured: bool = False,
        detail: str = "",
    ):
        self.limit = limit
        self.asked = asked
        self.place = place
        self.columns = dict(columns)
        self.measured = measured
        alive = ", ".join(
            f"{name} {format_bytes(columns[name])}" for name in COLUMNS if columns[name]
        )
        counted = "Alive"
        if asked is not None and not measured:
            counted = "What was alive and what was asked for"
        largest = max(COLUMNS, key=lambda name: columns[name])
        super().__init__(
            f"out of memory: the budget is {format_bytes(limit)}. {place}{detail}.\n"
            f"{counted}, {format_bytes(sum(columns.values()))} together, by column: {alive}.\n"
            f"The largest column is {largest}. Try {ADVICE[largest]}."
        )


def refuse_foreign_parameters(recorded: Recorded, missed: Sequence[Observation]) -> None:
    """Refuse a model from before the recording: it would be missing without a word.

    Args:
        recorded: what was recorded.
        missed: the observations that fell on no block.

    Raises:
        ValueError: the run used parameters that were alive before it began.
    """
    if recorded.counts_alive:
        return
    foreign: set[tuple[int, int]] = set()
    names: dict[int, str] = {}
    for seen in missed:
        if seen.column == "parameters" and seen.address in recorded.before:
            foreign.add((seen.time, seen.address))
            names[seen.address] = names.get(seen.address) or seen.name
    # By time too: memory of a model that is gone since may be the run's own by now. What the run
    # did not use is another model that lives in this process.
    used = {use.address: use.bytes for use in recorded.uses if (use.seen, use.address) in foreign}
    if used:
        name = next((names[address] for address in used if names[address]), "the optimizer's")
        raise ValueError(
            "the model was built before the measurement began:"
            f" {format_bytes(sum(used.values()))} of its parameters would be missing ({name!r} is"
            " one). Build it inside build(), or put `with watch(model, optimizer)` around the code"
            " you have."
        )


def refuse_another_device(recorded: Recorded) -> None:
    """Refuse a model that is elsewhere.

    Raises:
        ValueError: no parameter was on the device that was measured.
    """
    if recorded.devices and recorded.device not in recorded.devices:
        elsewhere = ", ".join(sorted(map(str, recorded.devices)))
        raise ValueError(
            f"the model's parameters are on {elsewhere}, but {recorded.device} is measured. Move"
            " the model in build(), or pass device=."
        )


def refuse_other_threads(recorded: Recorded) -> None:
    """Refuse a run that trains in another thread, where the meter sees one thread only.

    Raises:
        RuntimeError: a model or an optimizer ran in another thread.
    """
    threads = recorded.threads or {}
    elsewhere = [name for thread, name in threads.items() if thread != recorded.thread]
    if elsewhere and recorded.readings.one_thread:
        raise RuntimeError(
            f"{elsewhere[0]} ran in another thread than the measurement, and on the CPU PyTorch's"
            " profiler reports the allocations of one thread only. Run the step in the thread that"
            " measures; a thread that prepares data may stay."
        )


@contextlib.contextmanager
def backward_of_nothing_refused() -> Iterator[None]:
    """Inside, a backward that has nothing to do is told in words.

    Raises:
        ValueError: the loss needs no gradient.
    """
    try:
        yield
    except RuntimeError as error:
        if "does not require grad" not in str(error):
            raise
        raise ValueError(
            "the step calls backward on a loss that needs no gradient. Is every parameter frozen,"
            " or does the model run under torch.no_grad()?"
        ) from error


def refuse_nothing_to_train(recorded: Recorded) -> None:
    """Refuse a frozen model that runs with gradients, unless autograd ran after all.

    (For an input, say, through a frozen model.)

    Raises:
        ValueError: nothing in the run needs a gradient.
    """
    if recorded.nothing_to_train and not any(span.kind == "backward" for span in recorded.spans):
        raise ValueError(
            "nothing in this step needs a gradient: every parameter of the model is frozen, and yet"
            " it runs with gradients enabled. Unfreeze what is to be trained; to measure inference,"
            " run the step under torch.no_grad() or torch.inference_mode()."
        )


def refuse_leaks(recorded: Recorded, ledger: Ledger, held: Collection[int]) -> None:
    """Refuse a run of which something is alive after its step was deleted.

    Args:
        recorded: what was recorded.
        ledger: the run's ledger.
        held: the addresses of the storages that tensors hold now.

    Raises:
        MemoryLeakError: something outside the run holds its memory.
        RuntimeError: memory was freed where the meter does not see it.
    """
    # (What the ranks exchange with may be freed by a thread of the process group's.)
    left = [block for block in ledger.blocks if block.died is None and block.name != BUCKET]
    size = sum(block.bytes for block in left)
    if size <= LEAK_TOLERANCE:
        return
    if recorded.readings.one_thread and not {block.address for block in left} & set(held):
        raise RuntimeError(
            f"{format_bytes(size)} allocated in this run never came back in the thread that"
            " measures, and yet no tensor holds them: another thread freed them, unseen by"
            " PyTorch's profiler, and the ledger would count them for ever. Let the step free what"
            " it makes in its own thread."
        )
    by_column: dict[str, int] = {}
    for block in left:
        by_column[block.column] = by_column.get(block.column, 0) + block.bytes
    columns = ", ".join(f"{column} {format_bytes(count)}" for column, count in by_column.items())
    raise MemoryLeakError(
        f"{format_bytes(size)} allocated in this run are still alive after it ({columns}):"
        " something outside build() holds them, a global list or a variable declared nonlocal, say,"
        " or a hook on a tensor that refers to it (Python's garbage collector does not see that"
        " cycle). The next measurement would start with them. Let build() return nothing but the"
        " step, keep numbers (loss.item()), not tensors, and let hooks refer to models and"
        " optimizers weakly."
    )


def refuse_over_budget(limit: int, peak: int, columns: Mapping[str, int], ledger: Ledger) -> None:
    """Refuse a run whose measured peak passes a budget.

    Args:
        limit: the budget, in bytes.
        peak: the peak that counts against it, in bytes.
        columns: bytes by column at that peak.
        ledger: the run's ledger, which says what was the largest then.

    Raises:
        OverBudget: it does.
    """
    if peak <= limit:
        return
    alive = ledger.alive_at(ledger.peak_time)
    place = "the run"
    if alive:
        place = f"{alive[0].operator} in {alive[0].module or 'the step'}"
    detail = f": {format_bytes(peak)} at the measured peak"
    raise OverBudget(limit, peak, place, columns, measured=True, detail=detail)
