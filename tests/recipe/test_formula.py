from pathlib import Path

import pytest

from memlab import measure, recipe, results
from memlab.recipe import RUNGS, Setting
from memlab.workloads import gpt

LINES = tuple(recipe.LADDER)
ROOT = Path(__file__).parents[2]


def combinations():
    """The rungs; and, all on the device, the exact lines with one approximate line."""
    near = [name for name in LINES if not name.endswith("far") and name != "lean start"]
    with_one = [
        tuple(name for name in near if name not in recipe.APPROXIMATE or name == approximate)
        for approximate in recipe.APPROXIMATE
    ]
    return [*RUNGS.values(), *with_one]


def assert_predicted(lines, setting=None):
    """What an operator takes for itself is left out: it depends on the processor."""
    run = measure(recipe.training(*lines, setting=setting))
    _, expected = recipe.predict(lines, setting)
    assert abs(run.known_bytes - expected) < 0.05 * expected


@pytest.mark.parametrize(
    "lines", combinations(), ids=lambda lines: f"{len(lines)} to {lines[-1]}" if lines else "naive"
)
def test_the_peak_is_what_the_formula_says(lines):
    """On the notebook's own model."""
    assert_predicted(lines)


WIDE = gpt.tiny(layers=2, hidden=256)  # more columns than a micro-batch has rows
LONG = gpt.tiny(layers=2, context_length=256, vocabulary_size=512)


@pytest.mark.parametrize("config", [WIDE, LONG], ids=["wide", "long"])
@pytest.mark.parametrize("sequences", [1, 2, 4])
@pytest.mark.parametrize("rung", ["micro-batches", "tied, in tiles", "blocks far", "embedding far"])
def test_larger_pieces(rung, sequences, config):
    """The first micro-batch finds no gradients to add to, the others do."""
    setting = Setting(
        config=config,
        batch_size=4,
        sequence_length=config.context_length,
        micro_batch_size=sequences,
        tile_words=2 * config.hidden,
        slice_size=2**16,
    )
    assert_predicted(RUNGS[rung], setting)


# --- What an H100 needs beside it ----------------------------------------------------------------


def bytes_of_a_sum(rows, columns, processors=132):
    """What PyTorch's kernel (ATen/native/cuda/Reduce.cuh) takes to sum the rows of a BF16 matrix:
    an FP32 number for each thread and each of the four columns that it reads. A block has 32 x 4
    threads, a thread 16 rows, or more where the GPU is full: with 16 blocks a processor.
    """
    blocks = min(rows // 4 // 16, 16 * processors // (columns // 128))
    return 4 * 128 * columns * blocks


def test_what_an_h100_needs_beside_the_formula_is_a_sum():
    """A GPU's ledger counts an operator's scratch, and the formula has none. With the blocks far it
    holds the peak: the sum over the rows that is the gradient of the MLP's first bias. Beside it
    are 6 of a block's 15 numbers, the 4 that are summed, a block's weights or their gradients, and
    5 hidden states of the batch: the input, the gradients that come and go, two under way.
    """
    found = {}
    for record in results.load(ROOT / "results/nvidia-h100-80gb-hbm3-large.json").records:
        far = [v for v in record.variants if v.name.startswith("embedding far")]
        if record.notebook != "11_capstone" or not far:
            continue
        hidden = record.sizes.get("hidden", 768)
        sequences = record.sizes.get("batch_size", 8)
        for variant in far:
            at_a_time = int(variant.name.split()[2]) if "at a time" in variant.name else 1
            rows = 1024 * at_a_time
            beside = 2 * hidden * (10 * rows + 5 * 1024 * sequences + 12 * hidden)
            expected = beside + bytes_of_a_sum(rows, 4 * hidden)
            columns = variant.columns
            found[sequences, hidden, variant.name] = (
                columns["activations"] + columns["temporaries"]
            ) / expected
    assert len(found) == 6
    assert list(found.values()) == pytest.approx([1] * len(found), abs=0.002)
