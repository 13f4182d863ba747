"""Lives, peaks and timelines, each rule with a handful of made-up events."""

import pickle

import numpy as np
import pytest

from memlab.ledger import (
    COLUMNS,
    Block,
    Event,
    Ledger,
    Observation,
    Span,
    build_ledger,
    format_type,
    lives,
)


def test_the_peak_is_the_highest_running_sum():
    events = [
        Event(10, 1, 100),
        Event(20, 2, 50),
        Event(30, 1, -100),
        Event(40, 3, 80),
        Event(50, 2, -50),
    ]
    ledger, _ = build_ledger(events)
    assert (ledger.peak_bytes, ledger.peak_time) == (150, 20)
    assert ledger.timeline().total.tolist() == [100, 150, 50, 130, 80]


def test_events_of_one_moment_keep_the_allocators_order():
    """A coarse clock gives one time to many events. Returned first and handed out after, the sum is
    never 200.
    """
    events = [
        Event(10, 1, 100),
        Event(20, 1, -100),
        Event(20, 2, 100),
        Event(20, 2, -100),
        Event(20, 3, 100),
    ]
    ledger, _ = build_ledger(events)
    assert ledger.peak_bytes == 100
    assert ledger.timeline().total.tolist() == [100, 0, 100, 0, 100]


def test_a_clock_that_runs_backwards_does_not_reorder_the_events():
    ledger, _ = build_ledger([Event(50, 1, 100), Event(40, 1, -100), Event(30, 2, 100)])
    assert ledger.peak_bytes == 100


def test_the_return_of_a_block_from_before_the_run_is_not_counted():
    ledger, _ = build_ledger([Event(10, 1, 100), Event(20, 99, -1000), Event(30, 2, 10)])
    assert ledger.peak_bytes == 110


def test_what_was_alive_before_is_counted_and_its_end_seen():
    before = [Block(100, 1, 5, died=25), Block(40, 2, 5)]
    ledger, _ = build_ledger([Event(10, 3, 7), Event(30, 3, -7)], alive=before, start=9, end=40)
    assert ledger.timeline().total.tolist()[1:] == [140, 147, 47, 40]
    assert ledger.peak_bytes == 147


def test_a_block_from_before_can_end_by_an_event():
    """On CUDA the allocator reports its return too."""
    ledger, _ = build_ledger([Event(20, 1, -100)], alive=[Block(100, 1, 5)])
    assert ledger.blocks[0].died == 20


def test_an_empty_run_has_a_peak_of_zero():
    ledger, missed = build_ledger([])
    assert (ledger.peak_bytes, missed, ledger.alive_at(0)) == (0, [], [])
    assert ledger.peak_columns() == dict.fromkeys(COLUMNS, 0)
    assert len(ledger.timeline().total) == len(ledger.timeline().thin(10).total) == 0


def test_the_columns_sum_to_the_peak_at_every_moment():
    generator = np.random.default_rng(0)
    events, held, time = [], {}, 0
    for address in range(1, 400):
        time += int(generator.integers(1, 5))
        size = int(generator.integers(1, 1000))
        events.append(Event(time, address, size))
        held[address] = size
        if len(held) > 20:
            gone = int(generator.choice(list(held)))
            events.append(Event(time, gone, -held.pop(gone)))
    seen = [
        Observation(event.time + 1, event.address, COLUMNS[event.address % 4], "")
        for event in events
        if event.bytes > 0
    ]
    ledger, missed = build_ledger(events, seen)
    assert not missed
    timeline = ledger.timeline()
    running = np.cumsum([event.bytes for event in events])
    assert timeline.total.tolist() == running.tolist()
    assert sum(timeline.bytes.values()).tolist() == running.tolist()
    assert sum(ledger.peak_columns().values()) == ledger.peak_bytes == running.max()
    assert sum(ledger.columns_at(ledger.peak_time).values()) == ledger.peak_bytes
    assert sum(block.bytes for block in ledger.alive_at(ledger.peak_time)) == ledger.peak_bytes


def test_a_thinned_timeline_keeps_the_peak_and_its_columns():
    events = [
        event
        for i in range(5000)
        for event in (Event(10 * i, i + 1, i % 977), Event(10 * i + 5, i + 1, -(i % 977)))
    ]
    timeline = build_ledger([e for e in events if e.bytes])[0].timeline()
    thin = timeline.thin(100)
    assert len(thin.total) <= 101
    assert thin.total.max() == timeline.total.max() == 976
    assert sum(thin.bytes.values()).tolist() == thin.total.tolist()
    assert len(thin.seconds) == len(thin.phase) == len(thin.total)
    assert (np.diff(thin.seconds) > 0).all()
    assert timeline.thin(len(timeline.total)) is timeline


def test_alive_at_lists_the_largest_first():
    ledger, _ = build_ledger(
        [Event(1, 1, 5), Event(2, 2, 50), Event(3, 3, 20), Event(4, 2, -50), Event(5, 4, 30)]
    )
    assert [block.bytes for block in ledger.alive_at(3)] == [50, 20, 5]
    assert [block.bytes for block in ledger.alive_at(5)] == [30, 20, 5]


@pytest.mark.parametrize("column", COLUMNS)
def test_every_column_is_there_even_when_empty(column):
    assert build_ledger([Event(1, 1, 5)])[0].peak_columns()[column] == (
        5 if column == "unattributed" else 0
    )


def test_a_ledger_pickles():
    ledger, _ = build_ledger(
        [Event(10, 1, 100), Event(20, 1, -100)], spans=[Span(5, 15, "module", "a")]
    )
    again = pickle.loads(pickle.dumps(ledger))
    assert (
        again.blocks == ledger.blocks and again.phases == ledger.phases and again.peak_bytes == 100
    )


def test_the_known_peak_leaves_out_scratch_and_what_nobody_knows():
    """It is the highest sum of the rest, not what is left of the peak."""
    blocks = [
        Block(100, 1, 0, None, "parameters"),
        Block(80, 2, 10, 20, "temporaries", scratch=True),
        Block(500, 3, 25, 30, "unattributed"),
        Block(60, 4, 40, 50, "activations"),
        Block(70, 5, 45, 48, "temporaries", scratch=True),
    ]
    ledger = Ledger(blocks)
    assert (ledger.peak_bytes, ledger.known_peak_bytes) == (600, 160)
    assert {name: size for name, size in ledger.known_columns().items() if size} == {
        "parameters": 100,
        "activations": 60,
    }
    assert list(ledger.known_columns()) == list(COLUMNS)
    assert Ledger([]).known_peak_bytes == 0 and not any(Ledger([]).known_columns().values())


def test_what_is_kept_changes_its_column_and_not_the_sum():
    blocks = [
        Block(100, 1, 10, 50, "activations", kept_from=30),
        Block(7, 2, 20, 25, "temporaries"),
        Block(60, 3, 40, 45, "temporaries"),
    ]
    ledger = Ledger(blocks)
    assert ledger.columns_at(29)["activations"] == 100
    assert ledger.columns_at(30) == dict.fromkeys(COLUMNS, 0) | {"kept": 100}
    assert ledger.peak_columns() == dict.fromkeys(COLUMNS, 0) | {"kept": 100, "temporaries": 60}
    assert ledger.known_columns() == ledger.peak_columns()
    line = ledger.timeline()
    assert line.total.tolist() == [100, 107, 100, 100, 160, 100, 0]
    assert line.bytes["activations"].tolist() == [100, 100, 100, 0, 0, 0, 0]
    assert line.bytes["kept"].tolist() == [0, 0, 0, 100, 100, 100, 0]
