"""`solve(run)`: the largest batch, or the largest value of any option, that fits a GPU."""

from __future__ import annotations

import html
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from memlab.meters.gpus import GPU, find_gpu
from memlab.predict import predict
from memlab.prediction import Fit, Prediction
from memlab.run import check_run
from memlab.show import Table
from memlab.units import format_bytes, parse_bytes

#: Where the search ends if no `high` is given.
BOUND = 2**20


@dataclass(frozen=True)
class Tried:
    """A value that was tried.

    Attributes:
        value: of the option that is searched for.
        fit: what a run with this value needs, and whether that fits.
    """

    value: int
    fit: Fit


@dataclass(frozen=True)
class Solution:
    """The largest value that fits. It is true in an `if` when there is one.

    Attributes:
        field: the run's option that was searched for.
        value: the largest value that fits; None if not even the lowest one does.
        gpu: the GPU's name, or its size.
        prediction: the run's with this value; where nothing fits, with the lowest.
        tried: what was predicted, in this order.
        notes: what the reader has to know of the search.
    """

    field: str
    value: int | None
    gpu: str
    prediction: Prediction
    tried: tuple[Tried, ...]
    notes: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return self.value is not None

    def _headline(self) -> str:
        fits = {tried.value: tried.fit for tried in self.tried}
        if self.value is not None:
            return f"{self.field}={self.value} is the largest that fits. It {fits[self.value]}"
        lowest = min(fits)
        return f"not even {self.field}={lowest} fits. It {fits[lowest]}"

    def _table(self) -> Table:
        rows = [
            {
                self.field: f"{tried.value:,}",
                "needs": format_bytes(tried.fit.needed_bytes),
                "of": format_bytes(tried.fit.free_bytes),
                "": "fits" if tried.fit else "does not fit",
            }
            for tried in sorted(self.tried, key=lambda tried: tried.value)
        ]
        return Table(rows, numbers=(self.field, "needs", "of"))

    def __str__(self) -> str:
        return "\n".join([self._headline(), self._table().to_text(), *self.notes])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        lines = [self._headline(), *self.notes]
        said = "".join(f"<p>{html.escape(line)}</p>" for line in lines)
        return said + self._table().to_html()


def solve(
    run: Callable,
    field: str = "batch",
    low: int = 1,
    high: int | None = None,
    *,
    gpu: str | GPU = "H100 80GB",
    in_use: int | str = 0,
    steps: int = 2,
    progress: bool = True,
    **options: object,
) -> Solution:
    """Find the largest value of one of the run's options that fits a GPU, without the GPU.

    Each value that is tried is one prediction. What a run needs is nearly a straight line in its
    batch: the next value is where that line meets the GPU's memory, or now and then the middle.

    Example:
        print(solve(train, gpu="RTX 4090"))  # of `def train(batch=1):`

    Args:
        run: as for `memlab.predict`.
        field: the run's option whose value is searched for, a whole number.
        low: the lowest value that would do.
        high: the highest value that would do. None: the value is doubled from `low` on until it
            does not fit, up to 1,048,576.
        gpu: the GPU's name, as people write it, or a size ("24 GiB").
        in_use: what others hold on it, a desktop for example ("1 GiB").
        steps: how many steps are predicted for each value.
        progress: whether a bar shows how far each prediction is.
        **options: the run's other options.

    Returns:
        The `Solution`.

    Raises:
        ValueError: the run has no such option, `low` or `high` does not do, or something given
            cannot be predicted.
    """
    _check(run, field, low, high, options)
    card = gpu if isinstance(gpu, GPU) else find_gpu(gpu)
    others = parse_bytes(in_use) if in_use else 0
    predictions: dict[int, Prediction] = {}
    tried: list[Tried] = []

    def try_value(value: int) -> Fit:
        try:
            predictions[value] = predict(
                run, steps=steps, gpu=card, progress=progress, **options, **{field: value}
            )
        except Exception as error:
            error.add_note(f"solve() tried {field}={value}.")
            raise
        tried.append(Tried(value, predictions[value].fits(in_use=others)))
        return tried[-1].fit

    value, notes = _search(try_value, field, low, high)
    notes += _not_monotone(field, predictions)
    prediction = predictions[low if value is None else value]
    return Solution(field, value, card.name, prediction, tuple(tried), tuple(notes))


def _search(
    try_value: Callable[[int], Fit], field: str, low: int, high: int | None
) -> tuple[int | None, list[str]]:
    """The largest value that fits, and what has to be said of it."""
    fits = try_value(low)
    if not fits:
        if high is not None and high > low and try_value(high):
            return high, [f"{field}={low} does not fit, and the larger {field}={high} does."]
        return None, []
    largest, fit_of_largest = low, fits

    # Upwards, until something does not fit.
    too_large = None
    while too_large is None and largest != high:
        following = high if high is not None else min(2 * max(largest, 1), BOUND)
        if following <= largest:
            return largest, [f"Nothing above {field}={largest:,} was tried: give solve() a high."]
        fits = try_value(following)
        if fits:
            largest, fit_of_largest = following, fits
        else:
            too_large, fit_of_too_large = following, fits

    # Then in between.
    rounds = 0
    while too_large is not None and too_large - largest > 1:
        rounds += 1
        middle = (largest + too_large) // 2
        # A line misleads where the need rises in steps: every third time the middle is taken.
        if rounds % 3:
            middle = _on_the_line(largest, fit_of_largest, too_large, fit_of_too_large)
        fits = try_value(middle)
        if fits:
            largest, fit_of_largest = middle, fits
        else:
            too_large, fit_of_too_large = middle, fits
    return largest, []


def _on_the_line(low: int, fits: Fit, high: int, too_much: Fit) -> int:
    """Where a straight line through two points meets the memory that is free; between the two."""
    # The one fits and the other does not, so the needs differ.
    rise = too_much.needed_bytes - fits.needed_bytes
    value = low + fits.margin_bytes * (high - low) // rise
    return min(max(value, low + 1), high - 1)


def _not_monotone(field: str, predictions: Mapping[int, Prediction]) -> list[str]:
    """What there is to say if a larger value needs less."""
    values = sorted(predictions)
    for smaller, larger in zip(values, values[1:], strict=False):
        # Not the reserved bytes: the allocator reserves in large pieces, so they can fall a little.
        less = predictions[smaller].allocated_bytes - predictions[larger].allocated_bytes
        if less > 0:
            return [
                f"{field}={larger:,} allocates {format_bytes(less)} less than {field}={smaller:,}:"
                f" the need does not only grow with {field}, so a larger value may fit, too."
            ]
    return []


def _check(
    run: Callable, field: str, low: int, high: int | None, options: Mapping[str, object]
) -> None:
    if not isinstance(field, str):
        raise ValueError(f'field is the name of one of the run\'s options ("batch"), not {field!r}')
    if field in options:
        raise ValueError(
            f"{field}={options[field]!r} was given, and {field} is what is searched for: leave it"
            " out, or search for another option with field="
        )
    for name, value in (("low", low), ("high", high)):
        whole = isinstance(value, int) and not isinstance(value, bool)
        if not whole and not (name == "high" and value is None):
            raise ValueError(f"{name} has to be a whole number, not {value!r}")
    if low < 0:
        raise ValueError(f"low has to be at least 0, not {low}: it is a size or a number of things")
    if high is not None and low > high:
        raise ValueError(f"low has to be at most high, and they are {low} and {high}")
    if high is None and low > BOUND:
        raise ValueError(f"low is {low:,}, and without a high the search ends at {BOUND:,}")
    _check_field(run, field)
    check_run(run, {**options, field: low})


def _check_field(run: Callable, field: str) -> None:
    if not callable(run):
        return  # check_run has the words for it
    try:
        parameters = inspect.signature(run).parameters.values()
    except (TypeError, ValueError):  # a builtin has none
        return
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters):
        return
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    names = [parameter.name for parameter in parameters if parameter.kind in kinds]
    if field not in names:
        raise ValueError(
            f"the run has no option {field!r}. It has: {', '.join(names) or 'none'}. Give the name"
            " of the option that says how large a step is: solve(train, field=...)"
        )
