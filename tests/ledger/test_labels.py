"""What each block was for: the rules, each with a handful of made-up events."""

from memlab.ledger import Event, Observation, Span, build_ledger
from tests.ledger.made_up import TWO_STEPS, alive, by_address, columns_of

US = 1000  # the clocks of the looker and of the allocator differ by up to 50 of these


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


def test_a_block_knows_its_module_operator_and_phase():
    spans = [
        *TWO_STEPS,
        Span(125, 140, "operator", "aten::linear", sequence=3),
        Span(126, 139, "operator", "aten::addmm", sequence=3),
        Span(302, 335, "operator", "AddmmBackward0"),
        Span(305, 330, "operator", "aten::mm"),
        Span(346, 390, "operator", "MineBackward"),
        Span(350, 380, "operator", "aten::zeros"),
        Span(355, 370, "operator", "aten::empty"),
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
                *alive(360, 5, 8, 999),
            ]
        ),
        spans=spans,
    )
    found = {a: (b.phase, b.module, b.operator) for a, b in by_address(ledger).items()}
    assert found == {
        1: ("forward", "model.inner", "aten::linear"),
        2: ("backward", "model.inner", "aten::mm"),
        3: ("forward", "", "aten::mean"),
        4: ("other", "", ""),
        5: ("backward", "", "MineBackward"),  # a function of one's own that asked for memory
    }


def test_what_a_graph_holds_that_no_backward_uses_is_an_activation():
    events = [Event(10, 1, 100), Event(12, 2, 50), Event(14, 2, -50), Event(40, 1, -100)]
    for graph, column in ((0, "activations"), (-1, "temporaries")):
        spans = [Span(5, 20, "module", "validation", 0, graph), Span(0, 50, "step")]
        ledger, _ = build_ledger(events, spans=spans)
        assert [block.column for block in ledger.blocks] == [column, "temporaries"]
