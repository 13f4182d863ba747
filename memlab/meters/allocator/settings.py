"""The allocator's settings, as `PYTORCH_ALLOC_CONF` states them, and how a size is rounded."""

from __future__ import annotations

import difflib
import functools
import re
from dataclasses import dataclass

from memlab.units import MiB

# kMinBlockSize: all sizes are rounded to at least this.
MIN_BLOCK_SIZE = 512
SMALL_SIZE = 1 * MiB  # kSmallSize: the largest block of the small pool
SMALL_BUFFER = 2 * MiB  # kSmallBuffer: the small pool's segments
MIN_LARGE_ALLOC = 10 * MiB  # kMinLargeAlloc: from here on a block has a segment of its own size
ROUND_LARGE = 2 * MiB  # kRoundLarge: to which that segment is rounded up

# kRoundUpPowerOfTwoIntervals: 1 MiB to 2 MiB is the first, 32 GiB and more the last.
_INTERVALS = 16

# Settings that change nothing in how device memory is laid out.
_WITHOUT_EFFECT = {
    "graph_capture_record_stream_reuse",
    "pinned_free_catch_all",
    "pinned_max_cached_size_mb",
    "pinned_max_round_threshold_mb",
    "pinned_num_register_threads",
    "pinned_reserve_segment_size_mb",
    "pinned_use_background_threads",
    "pinned_use_cuda_host_register",
    "pinned_use_hip_host_register",
    "release_lock_on_cudamalloc",
    "release_lock_on_hipmalloc",
}

# Settings that change it, and are not simulated: what to do instead.
_REFUSED = {
    "per_process_memory_fraction": "Leave it out and give Allocator(allowed=...) the bytes",
    "throw_on_cudamalloc_oom": "Leave it out: when it refuses is not a rule of the allocator",
}


@dataclass(frozen=True)
class Settings:
    """What can be set of the caching allocator (PyTorch's documentation, *CUDA semantics*, "Memory
    management"), in bytes where PyTorch's names end in `_mb`.

    Args:
        max_split_size: blocks of this size and more are not split; None: all are. PyTorch takes no
            less than `large_segment_size`.
        roundup_power2_divisions: in how many steps the way from one power of two to the next is
            divided, to which sizes are rounded up. One number for all sizes, or pairs of a size in
            MiB and the number from there on, as in `((256, 1), (512, 2), (">", 4))`: below the
            first size its number holds too, and ">" is all beyond the last. None, 0 and 1: sizes
            are rounded to 512 bytes.
        expandable_segments: whether there is one segment a stream and pool, which grows.
        garbage_collection_threshold: from which part of the memory allowed cached blocks are given
            back. As in PyTorch it has no effect without `Allocator(allowed=...)`.
        large_segment_size: size of the segments for requests from 1 MiB to 10 MiB, and the step in
            which an expandable segment of the large pool grows.
        max_non_split_rounding: how much larger a block that may not be split can be than what is
            asked for; None: `large_segment_size`.

    Raises:
        ValueError: PyTorch would not take the value.
    """

    max_split_size: int | None = None
    roundup_power2_divisions: int | tuple[tuple[int | str, int], ...] | None = None
    expandable_segments: bool = False
    garbage_collection_threshold: float | None = None
    large_segment_size: int = 20 * MiB  # kLargeBuffer, until torch 2.10 not to be set
    max_non_split_rounding: int | None = None

    def __post_init__(self):
        # The bounds are those of torch 2.13's own parser (c10/core/AllocatorConfig.cpp).
        if self.large_segment_size <= 10 * MiB:
            raise ValueError(
                "large_segment_size has to be more than 10 MiB (large_segment_size_mb: 11), not "
                f"{self.large_segment_size:,} bytes"
            )
        for name in ("max_split_size", "max_non_split_rounding"):
            value = getattr(self, name)
            if value is not None and value < self.large_segment_size:
                raise ValueError(
                    f"{name} has to be at least {self.large_segment_size // MiB} MiB (the size of a"
                    f" large segment), not {value:,} bytes"
                )
        threshold = self.garbage_collection_threshold
        if threshold is not None and not 0 < threshold < 1:
            raise ValueError(
                f"garbage_collection_threshold has to be between 0 and 1, not {threshold}: it is a"
                " part of the memory that is allowed"
            )
        _divisions_by_interval(self.roundup_power2_divisions)

    @classmethod
    def parse(cls, text: str) -> Settings:
        """Read the value of `PYTORCH_ALLOC_CONF` (or of its older name `PYTORCH_CUDA_ALLOC_CONF`).

        Args:
            text: such as `"max_split_size_mb:128,expandable_segments:True"`. Spaces do not count,
                and of a setting that is given twice the last one holds, both as in PyTorch.

        Raises:
            ValueError: it is not of that form, PyTorch would not take it, or it states what is not
                simulated.
        """
        values = {}
        # At the commas that are not between brackets.
        for entry in re.split(r",(?![^\[]*\])", re.sub(r"\s", "", text)):
            key, _, value = entry.partition(":")
            if key and not value:
                raise ValueError(
                    f"{entry!r} has no value. Write settings as"
                    ' "max_split_size_mb:128,expandable_segments:True"'
                )
            if key in _REFUSED:
                raise ValueError(f"{key} is not simulated. {_REFUSED[key]}")
            if key == "backend" and value != "native":
                raise ValueError(
                    f"backend:{value} is another allocator; only PyTorch's own (native) is"
                    " simulated. Leave the setting out"
                )
            if key in _READERS:
                name, read = _READERS[key]
                values[name] = read(key, value)
            elif key and key != "backend" and key not in _WITHOUT_EFFECT:
                close = difflib.get_close_matches(key, [*_READERS, *_WITHOUT_EFFECT], n=1)
                hint = (
                    f". Did you mean {close[0]}?" if close else f". There is {', '.join(_READERS)}"
                )
                raise ValueError(f"{key!r} is no setting of the allocator{hint}")
        return cls(**values)

    def is_oversize(self, size: int) -> bool:
        """Whether blocks of this size are not split."""
        return self.max_split_size is not None and size >= self.max_split_size

    def segment_size(self, size: int) -> int:
        """What the driver is asked for, for a block of `size` bytes (get_allocation_size)."""
        if size <= SMALL_SIZE:
            return SMALL_BUFFER
        if size < MIN_LARGE_ALLOC:
            return self.large_segment_size
        return -(-size // ROUND_LARGE) * ROUND_LARGE

    def round_size(self, size: int) -> int:
        """The size of the block that a request of `size` bytes (more than none) gets: round_size,
        and roundup_power2_next_division where divisions are set.
        """
        if size < MIN_BLOCK_SIZE:
            return MIN_BLOCK_SIZE
        divisions = _divisions_by_interval(self.roundup_power2_divisions)
        if divisions is not None:
            # The interval of a size is that of its leading bit, and those below 1 MiB count to the
            # first.
            parts = divisions[min(max(size.bit_length() - 1 - 20, 0), _INTERVALS - 1)]
            if parts > 1 and size > MIN_BLOCK_SIZE * parts:
                step = (1 << size.bit_length() - 1) // parts
                return -(-size // step) * step
        return -(-size // MIN_BLOCK_SIZE) * MIN_BLOCK_SIZE


@functools.lru_cache
def _divisions_by_interval(setting) -> tuple[int, ...] | None:
    """The number of divisions of each interval; None where sizes are rounded to 512 bytes.

    The rules are those of parseRoundUpPower2Divisions in c10/core/AllocatorConfig.cpp. PyTorch's
    documentation gives the intervals as ending at the sizes; its test (AllocatorConfigTest:
    `128:2,256:4` makes 4 at 256 MB) has them begin there, and so they do here.
    """
    if not setting:
        return None
    if isinstance(setting, int):
        _check_divisions(setting)
        return (setting,) * _INTERVALS
    divisions = [0] * _INTERVALS
    last = None
    for size, parts in setting:
        _check_divisions(parts)
        if size == ">":
            if last is None:
                raise ValueError('">" means beyond the last size: name a size before it')
            divisions[last + 1 :] = [parts] * (_INTERVALS - 1 - last)
            continue
        if not isinstance(size, int) or size < 1 or size & size - 1:
            raise ValueError(
                f"the sizes of roundup_power2_divisions are powers of two, in MiB, not {size!r}"
            )
        index = min(size.bit_length() - 1, _INTERVALS - 1)
        if last is None:
            divisions[:index] = [parts] * index
        divisions[index] = parts
        last = index
    return tuple(divisions)


def _check_divisions(parts: int) -> None:
    if not isinstance(parts, int) or parts < 0 or parts & parts - 1:
        raise ValueError(
            "the divisions of roundup_power2_divisions are a power of two (or 0: none), not"
            f" {parts!r}"
        )


def _read_whole(key: str, value: str) -> int:
    if not value.isdecimal():
        raise ValueError(f"{key} takes a whole number, not {value!r}")
    return int(value)


def _read_megabytes(key: str, value: str) -> int:
    # kMB in c10/core/AllocatorConfig.cpp is 2^20 bytes.
    return _read_whole(key, value) * MiB


def _read_part(key: str, value: str) -> float:
    try:
        return float(value)
    except ValueError:
        raise ValueError(f"{key} takes a number between 0 and 1, not {value!r}") from None


def _read_switch(key: str, value: str) -> bool:
    if value not in ("True", "False"):
        raise ValueError(f"{key} takes True or False, not {value!r}")
    return value == "True"


def _read_divisions(key: str, value: str):
    if not value.startswith("["):
        return _read_whole(key, value)
    if not re.fullmatch(r"\[(\d+|>):\d+(,(\d+|>):\d+)*\]", value):
        raise ValueError(
            f"{key} takes one number or a list such as [256:1,512:2,1024:4,>:8], not {value!r}"
        )
    pairs = [pair.split(":") for pair in value[1:-1].split(",")]
    return tuple((size if size == ">" else int(size), int(parts)) for size, parts in pairs)


_READERS = {
    "max_split_size_mb": ("max_split_size", _read_megabytes),
    "roundup_power2_divisions": ("roundup_power2_divisions", _read_divisions),
    "expandable_segments": ("expandable_segments", _read_switch),
    "garbage_collection_threshold": ("garbage_collection_threshold", _read_part),
    "large_segment_size_mb": ("large_segment_size", _read_megabytes),
    "max_non_split_rounding_mb": ("max_non_split_rounding", _read_megabytes),
}
