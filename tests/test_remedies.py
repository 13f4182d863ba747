"""What would take bytes away: each technique at most what its definition says."""

import torch

from memlab import measure
from memlab.ledger import Block, Ledger
from memlab.measurement import Measurement
from memlab.remedies import line_of, out_of_memory, remedies


def measured(*blocks):
    """A measurement of blocks that are all alive at once: (column, bytes, more)."""
    made = [
        Block(size, number, born=number, column=column, **more)
        for number, (column, size, more) in enumerate(blocks)
    ]
    ledger = Ledger(made, end=len(made))
    environment = {"device": "cpu", "gpu": None}
    columns = ledger.peak_columns()
    return Measurement(ledger.peak_bytes, columns, "forward", ledger, environment)


def said(measurement):
    return {remedy.says.split(" (")[0]: remedy.bytes for remedy in remedies(measurement)}


def test_checkpointing_takes_all_but_one_of_the_longest_list():
    blocks = [
        ("activations", size, {"module": module})
        for module, size in [
            ("h.0.mlp", 100), ("h.1.mlp", 100), ("h.2.attn.1", 160), ("head", 500), ("tail.0", 90)
        ]
    ]  # fmt: skip
    found = said(measured(*blocks))
    assert found["gradient checkpointing of the 3 modules in h"] == 100 + 100 + 160 - 160
    assert found["two micro-batches in place of one batch"] == 950 // 2
    assert found["mixed precision, for what is FP32"] == 950 // 2


def test_each_column_has_its_technique_the_most_first():
    measurement = measured(
        ("parameters", 400, {"dtype": "float32"}),
        ("parameters", 300, {"dtype": "bfloat16"}),
        ("gradients", 300, {}),
        ("gradients", 100, {}),
        ("optimizer_state", 800, {}),
        ("optimizer_state", 900, {"dtype": "uint8"}),
        ("batch", 50, {}),
        ("kept", 55, {}),
        ("temporaries", 70, {"phase": "optimizer"}),
        ("temporaries", 60, {"phase": "backward", "operator": "aten::_log_softmax_backward_data"}),
        ("unattributed", 40, {}),
    )
    assert [(remedy.bytes, remedy.column) for remedy in remedies(measurement)] == [
        (800 * 3 // 4, "optimizer_state"),
        (400 // 2, "parameters"),
        (100, "gradients"),
        (70, "temporaries"),
        (60, "temporaries"),
        (55, "kept"),
        (50, "batch"),
    ]


def test_nothing_is_promised_where_there_is_nothing():
    assert remedies(measured()) == []


def test_a_promise_is_kept():
    def train(split=1):
        model = torch.nn.Sequential(*[torch.nn.Linear(32, 32) for _ in range(4)])
        for batch in torch.randn(2, 64, 32):
            for part in batch.chunk(split):
                model(part).square().mean().backward()
            yield

    plain = measure(train)
    saved = plain.columns["activations"] - measure(train, split=2).columns["activations"]
    assert 0 < saved <= said(plain)["two micro-batches in place of one batch"]


def test_the_line_is_that_of_the_users_code():
    def backward(loss):
        loss.backward()

    try:
        backward(torch.ones(2, requires_grad=True))
    except RuntimeError as error:
        assert line_of(error).startswith(__file__) and line_of(error).endswith("loss.backward()")
        lines = out_of_memory(measured(("kept", 9, {})), error)
        assert any("ran out at" in line for line in lines)
        outer = MemoryError()
        outer.__cause__ = error
        assert line_of(outer) == line_of(error)
    assert line_of(MemoryError()) == ""
