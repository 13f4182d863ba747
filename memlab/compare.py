"""`compare(before, after, predicted=...)`: measurements side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from memlab.comparison import Comparison, Variant
from memlab.measure import measure
from memlab.measurement import Measurement


def compare(
    *measurements: Measurement | Callable,
    names: Sequence[str] | None = None,
    predicted: Sequence[int | None] | int | None = None,
) -> Comparison:
    """Set measurements side by side: the baseline first, then what the techniques made of it.

    Args:
        measurements: two or more (one is allowed, to set it beside a prediction). A run is measured
            first, with `memlab.measure`'s defaults.
        names: one for each; by default "before" and "after", or "1", "2", ...
        predicted: the predicted peaks in bytes, one for each, None where there was no prediction. A
            single number is the prediction for the last.

    Raises:
        ValueError: nothing to compare, a run that allocated nothing, names or predictions that do
            not match, or a prediction that is not a positive whole number.
    """
    if not measurements:
        raise ValueError("there is nothing to compare: pass measurements, the baseline first")
    for measurement in measurements:
        if not isinstance(measurement, Measurement) and not callable(measurement):
            raise ValueError(
                "compare() takes what measure() returned, or a run, not"
                f" {type(measurement).__name__}"
            )
    measured = [m if isinstance(m, Measurement) else measure(m) for m in measurements]
    for measurement in measured:
        if not measurement.peak_bytes:
            device = measurement.environment.get("device")
            raise ValueError(
                f"a run that allocated nothing on {device} cannot be compared: does its step work"
                " there?"
            )
    count = len(measured)
    if names is None:
        numbered = [str(number + 1) for number in range(count)]
        names = {1: ["measured"], 2: ["before", "after"]}.get(count, numbered)
    if isinstance(names, str):
        names = [names]
    if predicted is None or not isinstance(predicted, Sequence):
        predicted = [None] * (count - 1) + [predicted]
    names = [
        f"{name}, predicted" if m.is_predicted and "predicted" not in name else name
        for name, m in zip(names, measured, strict=False)
    ] + list(names[count:])
    _check_labels(count, names, predicted)
    variants = zip(names, measured, predicted, strict=True)
    return Comparison([Variant(*variant) for variant in variants])


def _check_labels(count: int, names: Sequence[str], predicted: Sequence[int | None]) -> None:
    """Refuse names and predictions that do not belong to so many measurements."""
    for what, labels in (("names", names), ("predictions", predicted)):
        if len(labels) != count:
            raise ValueError(f"{count} measurements need {count} {what}, not {len(labels)}")
    if len(set(names)) != count:
        raise ValueError(
            f"every measurement needs a name of its own, and these repeat: {list(names)}"
        )
    for name, value in zip(names, predicted, strict=True):
        whole = isinstance(value, int) and not isinstance(value, bool)
        if value is not None and (not whole or value <= 0):
            raise ValueError(
                f"the prediction for {name!r} has to be a positive whole number of bytes, not"
                f" {value!r}"
            )
