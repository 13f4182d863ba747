"""A receipt is written, and read as it was."""

import json

import pytest
import torch

from memlab import measure, receipt
from memlab.ledger import Block
from memlab.receipt.models import MOST_GROUPS


def train(width=32):
    model = torch.nn.Sequential(torch.nn.Linear(16, width), torch.nn.ReLU())
    optimizer = torch.optim.AdamW(model.parameters())
    for batch in torch.randn(2, 8, 16):
        loss = model(batch).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        yield loss


@pytest.fixture
def kept(tmp_path):
    path = tmp_path / "receipt.json"
    measure(train).save(path)
    return path


def test_a_receipt_says_what_the_measurement_says(kept):
    measurement = measure(train)
    read = receipt.load(kept)
    assert read.known_bytes == measurement.known_bytes == sum(read.known_columns.values())
    assert read.peak_bytes == measurement.peak_bytes and read.columns == measurement.columns
    assert read.phase == measurement.phase and read.environment.threads == torch.get_num_threads()
    assert sum(group.total for group in read.blocks) == read.known_bytes
    assert read.other_blocks_bytes == 0
    assert read.step_count == 2 and [step.number for step in read.steps] == [1, 2]
    assert read.steps[1].peak_bytes == measurement.steps[1].peak_bytes
    assert read.verdict.sentence == measurement.verdict.sentence and read.holders == []
    weights = 4 * (16 * 32 + 32)
    assert read.known_columns["parameters"] == weights


def test_the_same_run_writes_the_same_file(kept, tmp_path):
    again = tmp_path / "again.json"
    measure(train).save(again)
    assert again.read_bytes() == kept.read_bytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 99}, "its schema is version 99"),
        ({"peak_bytes": -1}, "peak_bytes: Input should be greater than or equal to 0, not -1"),
        ({"pages": 3}, "pages: Extra inputs are not permitted"),
        ({"columns": {"weights": 1}}, "columns: the columns have to be parameters, gradients"),
    ],
)
def test_what_is_no_receipt_is_refused(kept, change, message):
    kept.write_text(json.dumps({**json.loads(kept.read_text()), **change}))
    with pytest.raises(ValueError, match=f"receipt.json is not a receipt: {message}"):
        receipt.load(kept)


@pytest.mark.parametrize("text", ["[1]", "{", '{"peak": 1}'])
def test_another_file_is_refused(tmp_path, text):
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="other.json is not a receipt"):
        receipt.load(path)


def test_equal_blocks_are_one_group():
    made = {"column": "activations", "operator": "aten::addmm"}
    blocks = [Block(100, 0, 0, module="h.0", name="a", **made), Block(9, 1, 0, **made)]
    blocks += [Block(100, 2, 0, module="h.0", name="b", **made)]
    largest, smallest = receipt.groups(blocks)
    assert (largest.count, largest.bytes, largest.total) == (2, 100, 200)
    assert largest.place == "aten::addmm in h.0" and smallest.place == "aten::addmm"


def test_the_same_part_of_each_layer_is_one_group_if_its_type_is_one():
    seen = {"dtype": "float32", "shape": (5, 5)}
    blocks = [Block(100, n, 0, module=f"h.{n}.mlp", operator="aten::mm", **seen) for n in range(3)]
    blocks.append(Block(100, 9, 0, module="h.4.mlp", operator="aten::mm", dtype="bfloat16"))
    most, other = receipt.groups(blocks)
    assert str(most) == "3 x 100 B, FP32 (5, 5)" and most.place == "aten::mm in h.*.mlp"
    assert str(other) == "1 x 100 B, BF16"


def test_groups_that_are_too_small_to_be_named_are_summed():
    blocks = [Block(number, number, 0) for number in range(1, MOST_GROUPS + 3)]
    named, others = receipt.name_largest(receipt.groups(blocks))
    assert len(named) == MOST_GROUPS and named[0].bytes == MOST_GROUPS + 2
    assert others == 1 + 2
