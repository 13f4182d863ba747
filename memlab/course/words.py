"""Numbers of a record in words, as the tables have them."""

from __future__ import annotations

import math

from memlab.results import Results, Seconds, Variant
from memlab.units import format_bytes


def percent(residual: float | None) -> str:
    """A residual; nothing has no sign of its own."""
    return "-" if residual is None else f"{100 * residual:+.2f} %".replace("-0.00", "+0.00")


def at_most(value: float) -> str:
    """A number above zero, rounded up to one digit: 0.14 is within 2e-01."""
    exponent = math.floor(math.log10(value))
    return f"{math.ceil(round(value / 10**exponent, 6)) * 10**exponent:.0e}"


def times(factor: float | None, digits: int = 2) -> str:
    """A factor; a dash where there is none."""
    return "-" if factor is None else f"{factor:.{digits}f}"


def with_spread(seconds: Seconds | None) -> str:
    """A step's seconds and how far the repeats lie apart."""
    return "-" if seconds is None else f"{seconds.median:.3g} ({seconds.spread:.2g})"


def difference(variant: Variant) -> str:
    """How far the largest difference of its gradients goes."""
    largest = variant.max_gradient_difference
    if largest is None:
        return "-"
    return "equal" if largest == 0 else f"within {at_most(largest)}"


def caption(data: Results) -> str:
    """Where and when a results file was measured, in one line."""
    environments = [record.environment for record in data.records] or [data.environment]

    def all_of(field: str) -> list[str]:
        return sorted({str(getattr(environment, field)) for environment in environments})

    file, dates = data.environment, all_of("date")
    memory = "" if file.gpu_bytes is None else f", {format_bytes(file.gpu_bytes)}"
    threads = " or ".join(all_of("threads"))
    where = file.gpu or f"CPU, {threads} thread{'s' * (threads != '1')}"
    scales = ", ".join(sorted({record.scale for record in data.records})) or "-"
    measured = " to ".join(dict.fromkeys((dates[0], dates[-1])))
    torch = ", ".join(all_of("torch"))
    return f"**{where}{memory}** (torch {torch}; scale {scales}; measured {measured})"
