"""The ledger's rules, each with a handful of made-up events. Times are in nanoseconds; a block is
named by its address.
"""

import ast
import inspect
import pickle

import numpy as np
import pytest

import memlab.ledger
from memlab.ledger import (
    COLUMNS,
    PHASES,
    Block,
    Event,
    Ledger,
    Observation,
    Span,
    build_ledger,
    lives,
)

US = 1000  # the clocks of the looker and of the allocator differ by up to 50 of these


def alive(time: int, address: int, size: int, died: int | None = None) -> list[Event]:
    """A block's hand-out and, if it died, its return."""
    return [Event(time, address, size)] + (
        [Event(died, address, -size)] if died is not None else []
    )


def by_address(ledger: Ledger) -> dict[int, Block]:
    return {block.address: block for block in ledger.blocks}


def columns_of(events, observations=(), spans=(), **options) -> dict[int, str]:
    ledger, _ = build_ledger(
        sorted(e for block in events for e in block), observations, spans, **options
    )
    return {block.address: block.column for block in ledger.blocks}


def test_nothing_here_imports_torch():
    tree = ast.parse(inspect.getsource(memlab.ledger))
    names = {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
    }
    names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not any(name.split(".")[0] in ("torch", "memlab") for name in names)


# Blocks and the peak ------------------------------------------------------------------------------


def test_every_hand_out_is_paired_with_its_return():
    blocks = lives(
        [
            Event(10, 1, 100),
            Event(20, 2, 50),
            Event(30, 1, -100),
            Event(40, 1, 70),
            Event(50, 2, -50),
        ]
    )
    assert [(b.address, b.bytes, b.born, b.died) for b in blocks] == [
        (1, 100, 10, 30),
        (2, 50, 20, 50),
        (1, 70, 40, None),
    ]


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


def test_an_address_handed_out_again_ends_the_block_that_lived_there():
    """Another thread gave it back, which the profiler does not report."""
    blocks = lives([Event(10, 1, 100), Event(20, 1, 60)])
    assert [(b.bytes, b.died) for b in blocks] == [(100, 20), (60, None)]


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


def test_a_ledger_pickles():
    ledger, _ = build_ledger(
        [Event(10, 1, 100), Event(20, 1, -100)], spans=[Span(5, 15, "module", "a")]
    )
    again = pickle.loads(pickle.dumps(ledger))
    assert (
        again.blocks == ledger.blocks and again.phases == ledger.phases and again.peak_bytes == 100
    )


# What was seen ------------------------------------------------------------------------------------


def test_one_look_labels_the_whole_life():
    ledger, _ = build_ledger(alive(0, 1, 100, 90), [Observation(80, 1, "parameters", "weight")])
    assert ledger.columns_at(10)["parameters"] == 100
    assert by_address(ledger)[1].name == "weight"


def test_of_several_labels_the_strongest_wins_in_any_order():
    order = ["parameters", "optimizer_state", "gradients", "batch", "activations"]
    for strong, weak in zip(order[:-1], order[1:], strict=True):
        for looks in ([strong, weak], [weak, strong]):
            seen = [Observation(10 + i, 1, column, column) for i, column in enumerate(looks)]
            ledger, _ = build_ledger(alive(0, 1, 100, 90), seen)
            assert (ledger.blocks[0].column, ledger.blocks[0].name) == (strong, strong)


def test_a_look_labels_the_tenant_of_its_moment_only():
    events = [*alive(0, 1, 100, 100 * US), *alive(200 * US, 1, 100, 300 * US)]
    ledger, missed = build_ledger(events, [Observation(250 * US, 1, "parameters")])
    assert [block.column for block in ledger.blocks] == ["temporaries", "parameters"]
    assert not missed


def test_clocks_that_differ_by_a_little_still_meet():
    ledger, missed = build_ledger(
        alive(100 * US, 1, 8, 200 * US), [Observation(99 * US, 1, "parameters")]
    )
    assert ledger.blocks[0].column == "parameters" and not missed


def test_a_look_that_falls_on_no_block_is_given_back():
    seen = [
        Observation(10, 7, "parameters", "elsewhere"),
        Observation(500 * US, 1, "batch", "late"),
    ]
    _, missed = build_ledger(alive(0, 1, 8, 100), seen)
    assert missed == seen


def test_an_input_made_inside_the_model_is_no_batch():
    """A module is given what another module made: only what was there before the forward is the
    batch.
    """
    spans = [Span(100, 200, "module", "model"), Span(300, 400, "backward", "A")]
    seen = [Observation(105, 1, "batch"), Observation(155, 2, "batch")]
    found = columns_of([alive(50, 1, 8, 500), alive(150, 2, 8, 350)], seen, spans)
    assert found == {1: "batch", 2: "activations"}


# Phases -------------------------------------------------------------------------------------------

# Two steps: forward 100-200 (loss until 300), backward 300-400, optimizer 450-500; then the same
# 1000 later.
TWO_STEPS = [
    span
    for begin in (0, 1000)
    for span in (
        Span(begin + 90, begin + 510, "step"),
        Span(begin + 100, begin + 200, "module", "model"),
        Span(begin + 120, begin + 150, "module", "model.inner"),
        Span(begin + 300, begin + 340, "backward", "B"),
        Span(begin + 345, begin + 400, "backward", "A"),
        Span(begin + 450, begin + 500, "optimizer", "SGD"),
    )
]


def test_the_phases_of_two_steps():
    ledger, _ = build_ledger([Event(0, 1, 8)], spans=TWO_STEPS, start=0, end=2000)
    assert [(s.kind, s.start, s.end) for s in ledger.phases] == [
        (kind, begin + low, begin + high)
        for begin in (0, 1000)
        for kind, low, high in (
            ("forward", 100, 300),
            ("backward", 300, 400),
            ("optimizer", 450, 500),
        )
    ]
    moments = (0, 99, 100, 250, 300, 342, 399, 400, 425, 450, 499, 500, 1100)
    assert [ledger.phase_at(moment) for moment in moments] == [
        "other",
        "other",
        "forward",
        "forward",
        "backward",
        "backward",
        "backward",
        "other",
        "other",
        "optimizer",
        "optimizer",
        "other",
        "forward",
    ]
    assert {span.kind for span in ledger.phases} | {"other"} == set(PHASES)


def test_without_a_module_the_forward_begins_with_the_step():
    spans = [Span(100, 500, "step"), Span(300, 400, "backward", "A")]
    ledger, _ = build_ledger([Event(0, 1, 8)], spans=spans, start=0, end=600)
    assert [(s.kind, s.start, s.end) for s in ledger.phases] == [
        ("forward", 100, 300),
        ("backward", 300, 400),
    ]


def test_without_a_backward_the_forward_ends_with_the_step_or_else_with_the_module():
    calls = [Span(100, 200, "module", "model"), Span(300, 350, "module", "head")]
    ledger, _ = build_ledger([Event(0, 1, 8)], spans=calls, end=900)
    assert [(s.kind, s.start, s.end) for s in ledger.phases] == [
        ("forward", 100, 200),
        ("forward", 300, 350),
    ]
    again = [span._replace(start=span.start + 500, end=span.end + 500) for span in calls]
    steps = [Span(50, 450, "step"), Span(550, 890, "step")]
    ledger, _ = build_ledger([Event(0, 1, 8)], spans=[*calls, *again, *steps], end=900)
    assert [(s.kind, s.start, s.end) for s in ledger.phases] == [
        ("forward", 100, 450),
        ("forward", 600, 890),
    ]


def test_gradient_accumulation_is_forward_and_backward_several_times():
    spans = [
        Span(0, 900, "step"),
        *(Span(b, b + 50, "module", "m") for b in (100, 300)),
        *(Span(b, b + 50, "backward", "A") for b in (200, 400)),
        Span(500, 600, "optimizer", "SGD"),
    ]
    ledger, _ = build_ledger([Event(0, 1, 8)], spans=spans, end=1000)
    assert [s.kind for s in ledger.phases] == [
        "forward",
        "backward",
        "forward",
        "backward",
        "optimizer",
    ]


def test_nodes_inside_a_module_are_not_one_backward_with_those_after_it():
    """`torch.compile` traces a backward inside the model's first call."""
    spans = [
        Span(100, 300, "module", "m"),
        Span(150, 160, "backward", "traced"),
        Span(400, 500, "backward", "A"),
    ]
    found = columns_of([alive(200, 1, 8, 450)], spans=spans)
    ledger, _ = build_ledger([Event(0, 1, 8)], spans=spans, end=600)
    assert [(s.kind, s.start, s.end) for s in ledger.phases] == [
        ("forward", 100, 150),
        ("backward", 150, 160),
        ("forward", 160, 400),
        ("backward", 400, 500),
    ]
    assert found == {1: "activations"}


def test_a_closure_runs_forward_and_backward_inside_the_optimizer():
    """LBFGS: the optimizer's own work lies before, between and after the evaluations of its
    closure.
    """
    spans = [Span(100, 1000, "optimizer", "LBFGS")]
    for begin in (200, 600):
        spans += [
            Span(begin, begin + 50, "module", "m"),
            Span(begin + 10, begin + 20, "operator", "aten::mm", sequence=1),
            Span(begin + 60, begin + 70, "operator", "aten::mean", sequence=2),
            Span(begin + 100, begin + 140, "backward", "A"),
            Span(begin + 150, begin + 200, "backward", "B"),
        ]
    ledger, _ = build_ledger([Event(0, 1, 8)], spans=spans, end=1100)
    assert [(s.kind, s.start, s.end) for s in ledger.phases] == [
        ("optimizer", 100, 200),
        ("forward", 200, 300),
        ("backward", 300, 400),
        ("optimizer", 400, 600),
        ("forward", 600, 700),
        ("backward", 700, 800),
        ("optimizer", 800, 1000),
    ]


def test_an_optimizer_inside_the_backward_cuts_it_in_pieces():
    spans = [
        Span(100, 200, "module", "m"),
        Span(300, 350, "backward", "B"),
        Span(350, 450, "backward", "AccumulateGrad"),
        Span(400, 430, "optimizer", "SGD"),
        Span(450, 600, "backward", "A"),
        Span(500, 520, "optimizer", "SGD"),
    ]
    events = [
        alive(310, 1, 8, 590),  # dies inside the backward, though phases later
        alive(320, 2, 8, 700),  # a gradient that outlives the backward
        alive(410, 3, 8, 900),
        alive(410, 4, 8, 420),
    ]
    ledger, _ = build_ledger([Event(0, 9, 8)], spans=spans, end=1000)
    assert [(s.kind, s.start, s.end) for s in ledger.phases] == [
        ("forward", 100, 300),
        ("backward", 300, 400),
        ("optimizer", 400, 430),
        ("backward", 430, 500),
        ("optimizer", 500, 520),
        ("backward", 520, 600),
    ]
    assert columns_of(events, spans=spans) == {
        1: "temporaries",
        2: "gradients",
        3: "optimizer_state",
        4: "temporaries",
    }


def test_thousands_of_optimizers_inside_a_backward():
    """One for each parameter, as the technique wants it: the phases are cut in time that grows with
    their number.
    """
    count = 20_000
    spans = [Span(0, 10 * count, "backward", "A")] + [
        Span(10 * i + 2, 10 * i + 5, "optimizer", "SGD") for i in range(count)
    ]
    ledger, _ = build_ledger([Event(0, 1, 8)], spans=spans)
    assert sum(span.kind == "optimizer" for span in ledger.phases) == count


# Columns of what nobody saw -----------------------------------------------------------------------


def test_a_block_that_nobody_saw_is_known_by_its_life():
    events = [
        alive(110, 1, 8, 350),  # made in forward, used in backward
        alive(110, 2, 8, 190),  # gone within the forward
        alive(250, 3, 8, 320),  # the loss: after the module, before backward
        alive(310, 4, 8, 330),  # gone within the backward
        alive(310, 5, 8, 480),  # outlives the backward
        alive(310, 6, 8, 420),  # so does what torch.autograd.grad() returns, if only just
        alive(460, 7, 8, 490),  # gone within the optimizer's step
        alive(460, 8, 8, 1490),  # outlives it
        alive(20, 9, 8, 60),  # comes and goes before anything runs
        alive(20, 10, 8, 350),  # made before the forward, for it
        alive(430, 11, 8, 470),  # between backward and optimizer, alive in the latter
        alive(110, 12, 8, None),  # never gone
    ]
    assert columns_of(events, spans=TWO_STEPS) == {
        1: "activations",
        2: "temporaries",
        3: "activations",
        4: "temporaries",
        5: "gradients",
        6: "gradients",
        7: "temporaries",
        8: "optimizer_state",
        9: "temporaries",
        10: "batch",
        11: "unattributed",
        12: "activations",
    }


def test_with_no_phase_at_all_what_stays_is_unattributed():
    assert columns_of([alive(10, 1, 8, 20), alive(10, 2, 8, None)]) == {
        1: "temporaries",
        2: "unattributed",
    }


def test_modules_inside_a_node_are_a_recomputation():
    spans = [
        Span(100, 200, "module", "block"),
        Span(300, 500, "backward", "A"),
        Span(310, 350, "module", "block.a"),
        Span(360, 400, "module", "block.b"),
    ]
    events = [
        alive(320, 1, 8, 450),  # recomputed, kept for the backward
        alive(320, 2, 8, 390),  # gone within the recomputation, though after its own module
        alive(355, 3, 8, 450),  # made between the two modules
        alive(420, 4, 8, 450),  # the backward's own
    ]
    assert columns_of(events, spans=spans) == {
        1: "activations",
        2: "temporaries",
        3: "activations",
        4: "temporaries",
    }


def recomputation_by_operators(sequence_of_first: int) -> list[Span]:
    return [
        Span(100, 200, "module", "model"),
        Span(300, 340, "backward", "Mean", sequence=9),
        Span(301, 339, "operator", "Mean", sequence=9),
        Span(310, 320, "operator", "aten::expand", sequence=sequence_of_first),
        Span(350, 500, "backward", "Mm", sequence=5),
        Span(
            351, 499, "operator", "Mm", sequence=5
        ),  # the node's own operator carries the node's number
        Span(360, 370, "operator", "aten::mm", sequence=20),
        Span(362, 368, "operator", "aten::empty"),
        Span(380, 390, "operator", "aten::gelu", sequence=21),
        Span(
            420,
            430,
            "operator",
            "aten::mm",
            sequence=sequence_of_first if sequence_of_first < 0 else 22,
        ),
    ]


def test_operators_that_need_gradients_inside_a_node_are_a_recomputation():
    """A checkpointed function without any module."""
    events = [
        alive(365, 1, 8, 425),
        alive(365, 2, 8, 385),
        alive(375, 3, 8, 425),
        alive(422, 4, 8, 450),
    ]
    found = columns_of(events, spans=recomputation_by_operators(-1))
    assert found == {1: "activations", 2: "temporaries", 3: "activations", 4: "temporaries"}


def test_a_backward_with_create_graph_is_no_recomputation():
    events = [alive(365, 1, 8, 425), alive(422, 2, 8, 900)]
    assert columns_of(events, spans=recomputation_by_operators(10)) == {
        1: "temporaries",
        2: "gradients",
    }


# Where a block was born ---------------------------------------------------------------------------


def test_a_block_knows_its_module_operator_and_phase():
    spans = [
        *TWO_STEPS,
        Span(125, 140, "operator", "aten::linear", sequence=3),
        Span(126, 139, "operator", "aten::addmm", sequence=3),
        Span(305, 330, "operator", "aten::mm"),
        Span(210, 220, "operator", "aten::mean", sequence=4),
    ]
    spans[3] = spans[3]._replace(sequence=3)  # the backward node of the linear layer
    ledger, _ = build_ledger(
        sorted(
            [
                *alive(130, 1, 8, 999),
                *alive(310, 2, 8, 999),
                *alive(215, 3, 8, 999),
                *alive(420, 4, 8, 999),
            ]
        ),
        spans=spans,
    )
    found = {a: (b.phase, b.module, b.operator) for a, b in by_address(ledger).items()}
    assert found == {
        1: ("forward", "model.inner", "aten::addmm"),
        2: ("backward", "model.inner", "aten::mm"),
        3: ("forward", "", "aten::mean"),
        4: ("other", "", ""),
    }


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


def test_what_a_graph_holds_that_no_backward_uses_is_an_activation():
    events = [Event(10, 1, 100), Event(12, 2, 50), Event(14, 2, -50), Event(40, 1, -100)]
    for graph, column in ((0, "activations"), (-1, "temporaries")):
        spans = [Span(5, 20, "module", "validation", 0, graph), Span(0, 50, "step")]
        ledger, _ = build_ledger(events, spans=spans)
        assert [block.column for block in ledger.blocks] == [column, "temporaries"]


def test_a_block_reads_as_a_line():
    block = Block(2**20, 7, 0, None, "activations", "forward", "blocks.0", "aten::gelu")
    assert str(block).split() == ["1.00", "MiB", "activations", "aten::gelu", "blocks.0"]
