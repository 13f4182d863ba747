"""A part of the zoo: predictions for the CPU are what is measured there."""

import pytest

pytest.importorskip("transformers")
pytest.importorskip("peft")

from memlab.course.zoo import SLACK
from tools.zoo.compare import compare
from tools.zoo.rows import rows

#: A model, and the ways in which it is trained here.
FAST = {
    "GPT-2": ("AdamW, checkpoints", "AdamW, LoRA"),
    "Llama": ("AdamW, BF16 autocast", "AdamW, our fused loss"),
    "Qwen3-MoE": ("AdamW",),
    "Gemma 3": ("AdamW",),
    "Falcon": ("SGD with momentum, clipped",),
    "BERT, padded": ("AdamW",),
    "ViT": ("AdamW, BF16 weights",),
    "ResNet": ("AdamW",),
    "our GPT": (
        "AdamW, foreach",
        "AdamW, fused",
        "SGD",
        "Adafactor",
        "Adafactor, foreach",
        "our AdamW in 8 bits",
        "our Lion",
        "AdamW, our checkpoints, BF16 autocast",
        "AdamW, micro-batches",
        "AdamW in backward",
        "AdamW, all frozen but the head",
    ),
    "our GPT, naive, dropout": ("AdamW",),
    "GRU": ("AdamW",),
    "convolutions, batch norm": ("AdamW",),
    "nn.TransformerEncoder": ("AdamW",),
}
ROWS = [row for row in rows() if row.way.name in FAST.get(row.animal.name, ())]


def test_there_is_a_row_for_each_name():
    assert len(ROWS) == sum(map(len, FAST.values())) == 25


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_a_prediction_for_the_cpu_is_what_is_measured_there(row):
    found = compare(row)
    assert found.refusal is None
    assert found.residual <= SLACK, found.sentence
    assert found.same_phase and found.same_types
