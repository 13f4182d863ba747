"""The error of an allocation for which there is no memory."""

from __future__ import annotations

from memlab.units import format_bytes


class OutOfMemory(Exception):
    """There is no memory for an allocation, also after the cached blocks were given back.

    Attributes, in bytes:
        asked: what the allocation asked for.
        tried: what the driver was asked for in its stead.
        allocated: in tensors.
        reserved: held of the device, with what is cached.
        limit: what the driver has to give in all; None: no end.
        allowed: what of it this process may take; None: all.
        free: what the driver had left; None where there is no limit.
        cached: reserved and not allocated.
    """

    def __init__(
        self,
        *,
        asked: int,
        tried: int,
        allocated: int,
        reserved: int,
        limit: int | None,
        allowed: int | None,
        advise_expandable: bool,
    ):
        self.asked = asked
        self.tried = tried
        self.allocated = allocated
        self.reserved = reserved
        self.limit = limit
        self.allowed = allowed
        self.free = None if limit is None else limit - reserved
        self.cached = reserved - allocated
        # In the words of PyTorch's own error.
        message = f"CUDA out of memory (simulated). Tried to allocate {format_bytes(tried)}."
        if limit is not None:
            message += (
                f" The GPU has a total capacity of {format_bytes(limit)} of which"
                f" {format_bytes(self.free)} is free."
            )
        if allowed is not None:
            message += f" {format_bytes(allowed)} allowed;"
        message += (
            f" Of the allocated memory {format_bytes(allocated)} is allocated by PyTorch, and"
            f" {format_bytes(self.cached)} is reserved by PyTorch but unallocated."
        )
        if advise_expandable:
            message += (
                " If reserved but unallocated memory is large try setting"
                " PYTORCH_ALLOC_CONF=expandable_segments:True to avoid fragmentation."
            )
        super().__init__(message)
