"""A long loop is recorded in stretches: what is worth keeping of each."""

from __future__ import annotations

from collections.abc import Sequence

from memlab.growth import Growth, growth_of
from memlab.join import measurement_of
from memlab.ledger import Counted, Step, steps_in
from memlab.measurement import Measurement
from memlab.meters.recorded import Recorded


class Stretches:
    """Keeps the stretch with the highest peak whole, and of the others what their steps needed."""

    def __init__(self) -> None:
        self._highest: Measurement | None = None
        self._steps: dict[int, Step] = {}
        self._growth: list[Growth] = []

    def add(self, recorded: Recorded, counted: Sequence[Counted]) -> Measurement:
        """Read a stretch.

        Args:
            recorded: what was recorded.
            counted: the steps that lie in it.

        Returns:
            What was measured in it.

        Raises:
            RuntimeError, ValueError: it cannot be measured; the message says why.
        """
        measurement = measurement_of(recorded)
        if not recorded.readings.complete:
            steps = [Step(*step) for step in counted]
        else:
            steps = steps_in(measurement.ledger, counted)
        self._steps.update({step.number: step for step in steps})
        if len(steps) > 1 and recorded.readings.complete:
            self._growth = growth_of(measurement.ledger, steps)
        if self._highest is None or measurement.peak_bytes > self._highest.peak_bytes:
            self._highest = measurement
        return measurement

    def measurement(self, counted: Sequence[Counted]) -> Measurement | None:
        """The stretch with the highest peak, with the steps of all; None if there is none.

        Args:
            counted: all steps of the loop.
        """
        if self._highest is None:
            return None
        steps = [self._steps.get(step.number) or Step(*step) for step in counted]
        self._highest.steps = tuple(steps)
        self._highest.growth = tuple(self._growth)
        after = [step.bytes_after for step in steps]
        if None not in after:
            self._highest.bytes_after_step = tuple(after)
        return self._highest


def oldest_of(measurement: Measurement, column: str) -> list[int]:
    """Where the oldest blocks lie of what grows: no variable holds them that the next step sets
    anew.

    Args:
        measurement: what was measured.
        column: the one that grows.

    Returns:
        Addresses.
    """
    if measurement.growth:
        # What grows most is what the verdict names. (A batch that was fetched ahead has variables.)
        most = measurement.growth[0].column
        return [growth.addresses[0] for growth in measurement.growth if growth.column == most]
    # What has an owner grows with its owners, such as the state of one optimizer after another.
    ledger = measurement.ledger
    starts = [step.start for step in measurement.steps if step.start >= ledger.start]
    since = starts[1] if len(starts) > 1 else ledger.end
    alive = [block for block in ledger.alive_at(ledger.end) if block.column == column]
    made = sorted((block for block in alive if block.born >= since), key=lambda block: block.born)
    return [block.address for block in made[:1]]
