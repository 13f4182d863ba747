"""Bytes for people: parse "2 GiB", print 2147483648 as "2.00 GiB"."""

from __future__ import annotations

import re

KiB, MiB, GiB, TiB = 2**10, 2**20, 2**30, 2**40

_UNITS = {"b": 1, "": 1, "kib": KiB, "mib": MiB, "gib": GiB, "tib": TiB}
# Decimal units are what disks and GPU boxes print. They are not what allocators count, so they are
# spelled apart.
_UNITS |= {"kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}


def parse_bytes(size: int | str) -> int:
    """Read a size as a number of bytes: `"2 GiB"`, `"600 MiB"`, `"1.5 GB"` (decimal), or an int of
    bytes.

    Raises:
        ValueError: the text is not a size, or the size is not positive.
    """
    if isinstance(size, bool) or not isinstance(size, (int, str)):
        raise ValueError(f'a size is a number of bytes or a text such as "2 GiB", not {size!r}')
    if isinstance(size, int):
        number = size
    else:
        match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", size)
        if not match or match[2].lower() not in _UNITS:
            raise ValueError(
                f'{size!r} is not a size. Write it as "600 MiB", "2 GiB" or a number of bytes'
            )
        number = int(float(match[1]) * _UNITS[match[2].lower()])
    if number <= 0:
        raise ValueError(f"a size has to be more than zero bytes, not {size!r}")
    return number


def format_bytes(count: int | None) -> str:
    """Write a number of bytes for people, in units of 2^10: `412.00 MiB`. `None` (not measured) is
    written `-`.
    """
    if count is None:
        return "-"
    for unit, name in ((TiB, "TiB"), (GiB, "GiB"), (MiB, "MiB"), (KiB, "KiB")):
        # A unit is used from 1 on, so 1023.9 MiB stays in MiB and reads as people say it.
        if abs(count) >= unit:
            return f"{count / unit:,.2f} {name}"
    return f"{count:,} B"


def times_less(before: float, after: float) -> float:
    """How many times smaller `after` is than `before`, in the same unit (below 1: it grew)."""
    return before / after


def times_time(before: float | None, after: float | None) -> float | None:
    """How many times as long `after` takes as `before`; None where one of them was not timed."""
    return None if before is None or after is None else after / before


def residual(measured: int, predicted: int | None) -> float | None:
    """What a prediction missed, as a part of the prediction: 0.01 is 1 % more than predicted.

    None where nothing was predicted.
    """
    return None if predicted is None else (measured - predicted) / predicted
