"""Joins what was recorded to a measurement."""

from __future__ import annotations

from collections.abc import Sequence

from memlab.growth import growth_of
from memlab.ledger import Ledger, Observation, Step, build_ledger, steps_in
from memlab.measurement import Measurement
from memlab.meters import refusals
from memlab.meters.device import environment
from memlab.meters.never_called import never_called
from memlab.meters.outside import outside
from memlab.meters.recorded import Recorded
from memlab.meters.recording import no_garbage_collection


@no_garbage_collection()
def measurement_of(recorded: Recorded, described: dict[str, object] | None = None) -> Measurement:
    """Join what was recorded to a measurement.

    Args:
        recorded: what the meter and the observer saw.
        described: the environment (None: this machine's).

    Raises:
        ValueError: the run used a model from before it, or on another device.
        RuntimeError: it trained in another thread than the one that is measured.
    """
    readings = recorded.readings
    ledger = Ledger([], start=recorded.start, end=recorded.end)
    missed: list[Observation] = []
    if readings.complete:  # half a history is none
        ledger, missed = build_ledger(
            readings.events,
            recorded.observations,
            recorded.spans,
            recorded.alive,
            start=recorded.start,
            end=recorded.end,
            one_clock=readings.one_clock,
        )
    refusals.refuse_foreign_parameters(recorded, missed)
    refusals.refuse_another_device(recorded)
    refusals.refuse_other_threads(recorded)
    peak, columns = ledger.peak_bytes, ledger.peak_columns()
    if readings.peak_allocated is not None:
        # The counter is the truth. What the history does not explain (rounding, other libraries)
        # is unattributed.
        before = 0 if recorded.counts_alive else readings.allocated_before
        peak = max(readings.peak_allocated - before, sum(columns.values()))
        columns["unattributed"] += peak - sum(columns.values())
    beside = outside(recorded, missed)
    return Measurement(
        peak_bytes=peak,
        columns=columns,
        phase=ledger.peak_phase,
        ledger=ledger,
        environment=described or environment(recorded.device),
        reserved_bytes=readings.reserved_bytes,
        device_bytes=readings.device_bytes,
        workspace_bytes=readings.workspace_bytes,
        outside_bytes=beside.bytes,
        outside_memory_bytes=beside.memory_bytes,
        outside_shared_bytes=beside.shared_bytes,
        outside_array_bytes=beside.array_bytes,
        never_called=never_called(recorded.replaced, ledger.modules),
        evaluating=recorded.evaluating,
        without_gradient=recorded.missing,
    )


def add_steps(measurement: Measurement, recorded: Recorded, counted: Sequence[Step]) -> None:
    """Give a measurement its steps, and what each of them leaves behind.

    Args:
        measurement: what `measurement_of` returned.
        recorded: what the meter and the observer saw, a span for each step among it.
        counted: the steps, in their order, as they were counted.
    """
    spans = [span for span in recorded.spans if span.kind == "step"]
    steps = [step._replace(start=span.start) for step, span in zip(counted, spans, strict=True)]
    measurement.steps = tuple(Step(*step) for step in steps)
    if recorded.readings.complete:
        measurement.steps = tuple(steps_in(measurement.ledger, steps))
        measurement.bytes_after_step = tuple(step.bytes_after for step in measurement.steps)
        measurement.growth = tuple(growth_of(measurement.ledger, measurement.steps))
