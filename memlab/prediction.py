"""What a GPU would need, and whether it fits: `Prediction`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from memlab.measurement import Measurement
from memlab.meters.allocator import Allocator, OutOfMemory
from memlab.meters.gpus import GPU, find_gpu
from memlab.units import format_bytes, parse_bytes


@dataclass(frozen=True)
class Fit:
    """Whether a run fits a GPU. It is true in an `if` when it does.

    Attributes:
        gpu: the GPU's name, or its size.
        needed_bytes: what the process needs: reserved, workspaces, an estimate of CUDA's context.
        free_bytes: what the GPU has, less what others use.
        reserved_bytes: of `needed_bytes`, without the estimate.
        gives_back: whether it fits only because the allocator, when memory runs short, gives back
            to the driver what it has cached. That costs time.
    """

    gpu: str
    needed_bytes: int
    free_bytes: int
    reserved_bytes: int
    gives_back: bool = False

    @property
    def margin_bytes(self) -> int:
        """What is left over; negative if it does not fit."""
        return self.free_bytes - self.needed_bytes

    def __bool__(self) -> bool:
        return self.margin_bytes >= 0

    def __str__(self) -> str:
        needed, free = format_bytes(self.needed_bytes), format_bytes(self.free_bytes)
        margin = format_bytes(abs(self.margin_bytes))
        if self.gives_back:
            return (
                f"just fits {self.gpu}: {needed} of {free}, {margin} left, and the allocator has to"
                " give cached blocks back on the way, which costs time (predicted)"
            )
        if self:
            return f"fits {self.gpu}: {needed} of {free}, {margin} left (predicted)"
        return f"does not fit {self.gpu}: {needed} of {free}, {margin} too much (predicted)"

    __repr__ = __str__


@dataclass
class Prediction(Measurement):
    """What a run would need on a GPU: read as a `Measurement`, and predicted without the GPU.

    Attributes:
        gpu: the GPU that is predicted (None: the CPU).
        host_columns: bytes by column on the host, at their own peak.
        notes: what had to be assumed, each once.
        requests: what the GPU's allocator was asked for, as `Allocator.replay` takes it.
        new_allocator: makes an allocator with the settings of this prediction.
    """

    gpu: GPU | None = None
    host_columns: dict[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    requests: tuple[tuple[str, int, int, int], ...] = field(default=(), repr=False)
    new_allocator: Callable[..., Allocator] = field(default=Allocator, repr=False)

    @property
    def is_predicted(self) -> bool:
        """Nothing was measured."""
        return True

    @property
    def allocated_bytes(self) -> int:
        """The most bytes that tensors hold at once: `peak_bytes` by the name that CUDA uses."""
        return self.peak_bytes

    @property
    def process_bytes(self) -> int:
        """What the driver would count for this process: reserved, and an estimate of the context.

        On the CPU it is the peak.
        """
        if self.gpu is None:
            return self.peak_bytes
        return self.reserved_bytes + self.gpu.context_bytes

    @property
    def host_bytes(self) -> int:
        """The most bytes of tensors at once on the host."""
        return sum(self.host_columns.values())

    def fits(self, gpu: str | None = None, *, in_use: int | str = 0) -> Fit:
        """Say whether it fits.

        Where what was reserved without a limit is too much, and what is allocated is not, the same
        requests are made once more of an allocator with this limit: it gives cached segments back
        before it fails.

        Args:
            gpu: a name ("RTX 4090") or a size ("24 GiB"); None: the GPU that was predicted.
            in_use: what others hold on it, a desktop for example ("1 GiB").

        Returns:
            The `Fit`: true if it fits, with the margin.

        Raises:
            ValueError: no such GPU or size is known.
        """
        found = self.gpu if gpu is None else find_gpu(gpu)
        if found is None:
            raise ValueError("a prediction for the CPU has no GPU: give fits() a name or a size")
        needed = self.peak_bytes
        reserved = self.reserved_bytes or self.peak_bytes
        if self.gpu is not None:
            # The workspaces are those of the GPU that is asked for.
            count = (self.workspace_bytes or 0) // max(self.gpu.workspace_bytes, 1)
            reserved += count * (found.workspace_bytes - self.gpu.workspace_bytes)
            needed = reserved + found.context_bytes
        free = found.memory_bytes - (parse_bytes(in_use) if in_use else 0)
        enough = needed <= free
        context = needed - reserved
        if not enough and self.peak_bytes <= free - context:
            within = self._reserved_within(free - context, found.workspace_bytes)
            if within is not None:
                return Fit(found.name, within + context, free, within, gives_back=True)
        return Fit(found.name, needed, free, reserved)

    def _reserved_within(self, limit: int, workspace_bytes: int) -> int | None:
        """Bytes reserved at the most where the driver has no more than `limit`; None: too few."""
        if not self.requests:
            return None
        allocator = self.new_allocator(limit=limit)
        # The workspaces have negative addresses.
        requests = (
            (action, address, workspace_bytes if address < 0 else size, stream)
            for action, address, size, stream in self.requests
        )
        try:
            allocator.replay(requests)
        except OutOfMemory:
            return None
        return allocator.peak_reserved_bytes

    def _notes(self) -> list[str]:
        notes = []
        if self.gpu is not None:
            notes.append(
                f"allocated {format_bytes(self.allocated_bytes)} · reserved"
                f" {format_bytes(self.reserved_bytes)} · the process about"
                f" {format_bytes(self.process_bytes)} (CUDA's context is an estimate)"
            )
        if self.workspace_bytes:
            notes.append(
                f"of the reserved bytes, {format_bytes(self.workspace_bytes)} are workspaces that"
                " cuBLAS keeps, whatever the model"
            )
        if self.gpu is not None and self.host_bytes:
            notes.append(f"on the host: {format_bytes(self.host_bytes)} of tensors at their peak")
        if self.without_gradient is not None:
            notes.append(str(self.without_gradient))
        return notes + [f"assumed: {note}" for note in self.notes]

    def _headline(self) -> str:
        size = f"{format_bytes(self.peak_bytes)} ({self.peak_bytes:,} bytes)"
        place = self.gpu.name if self.gpu is not None else "cpu"
        return f"Predicted peak {size}, in {self.phase}, for {place}"

    def __repr__(self) -> str:
        return str(self)
