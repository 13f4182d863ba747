"""What stands behind the columns, of blocks that are made up."""

from memlab.breakdown import largest_groups, split_by_dtype, split_by_model
from memlab.ledger import COLUMNS, Block, Ledger
from memlab.units import KiB


def block(size, column="parameters", **more):
    return Block(size, 0, 0, column=column, **more)


def test_equal_blocks_are_summed_over_the_layers():
    logits = {"dtype": "float32", "shape": (64, 8000), "operator": "aten::to"}
    blocks = [block(2048000, "temporaries", module="lm_head", **logits) for _ in range(8)]
    blocks += [block(4 * KiB, "activations", module=f"h.{i}.mlp", dtype="bfloat16") for i in (3, 9)]
    blocks.append(block(4 * KiB, "activations", module="h.3.mlp"))
    largest = largest_groups(Ledger(blocks), 10)
    rows = [[*row.values()] for row in largest.table().rows]
    assert rows == [
        ["15.62 MiB", "8 x 1.95 MiB", "FP32 (64, 8000)", "temporaries", "aten::to", "lm_head"],
        ["8.00 KiB", "2 x 4.00 KiB", "BF16", "activations", "", "h.*.mlp"],
        ["4.00 KiB", "1 x 4.00 KiB", "type not seen", "activations", "", "h.3.mlp"],
    ]
    assert "8 x 1.95 MiB" in str(largest) and "<td" in largest._repr_html_()


def test_bytes_by_column_and_data_type():
    columns = dict.fromkeys(COLUMNS, 0) | {
        "parameters": 300,
        "gradients": 100,
        "kept": 9,
        "unattributed": 7,
    }
    blocks = [
        block(200, dtype="bfloat16"),
        block(100, dtype="float32"),
        block(60, "gradients", dtype="float32"),
        block(40, "gradients"),
        block(9, "activations", dtype="float32", kept_from=5),
    ]
    found = split_by_dtype(Ledger(blocks), columns, at=6)
    assert found.bytes == {
        "parameters": {"BF16": 200, "FP32": 100, "type not seen": 0},
        "gradients": {"BF16": 0, "FP32": 60, "type not seen": 40},
        "kept": {"BF16": 0, "FP32": 9, "type not seen": 0},
        # of the allocator's counter, in no block
        "unattributed": {"BF16": 0, "FP32": 0, "type not seen": 7},
    }
    assert str(found).splitlines()[0].split("  ")[-1] == "together"
    assert str(found).splitlines()[1].split() == "parameters 200 B 100 B 0 B 300 B".split()


def test_parameters_by_model_trained_frozen_and_buffers_apart():
    blocks = [
        block(20, model="GPT#2", role="frozen"),
        block(30, model="GPT#5", role="trained"),
        block(4, model="GPT#5", role="buffer"),
        block(8, model="Actor#1 + Critic#1", role="trained"),
        block(5, "gradients", model="GPT#5"),
        block(2),
    ]
    found = split_by_model(Ledger(blocks))
    headings = ["trained", "frozen", "buffers", "not known"]
    rows = {model: list(row.values()) for model, row in found.bytes.items()}
    assert all(list(row) == headings for row in found.bytes.values())
    assert rows == {
        "Actor + Critic": [8, 0, 0, 0],
        "GPT (1)": [0, 20, 0, 0],
        "GPT (2)": [30, 0, 4, 0],
        "no model": [0, 0, 0, 2],
    }
    assert list(found.bytes)[-1] == "no model"
    assert "GPT (2)" in found._repr_html_()
