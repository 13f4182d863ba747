"""The loop of notebook 11, as it stands in its cells: each line alone, each rung, and everything
without one line.
"""

import json
from pathlib import Path

import pytest
import torch

from memlab import measure, proof
from memlab.workloads import gpt

NOTEBOOK = Path(__file__).resolve().parents[1] / "notebooks" / "11_capstone.ipynb"
LINES = (
    "SDPA",
    "BF16 autocast",
    "fused loss",
    "checkpoints",
    "fused AdamW",
    "BF16 weights",
    "8-bit AdamW",
    "micro-batches",
    "optimizer in backward",
    "tied, in tiles",
    "activations far",
    "state far",
    "lean start",
    "blocks far",
    "embedding far",
)
APPROXIMATE = {"BF16 autocast", "BF16 weights", "8-bit AdamW"}


@pytest.fixture(scope="module")
def notebook():
    """The names that the cells define which need no measurement: the loop, the ladder and its
    formulas.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    names = {"__name__": "notebook"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEMLAB_SCALE", "cpu")
        patch.chdir(NOTEBOOK.parent)
        for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]:
            source = "".join(cell["source"])
            if "large" not in cell["metadata"].get("tags", ()) or "naive = measure" in source:
                continue
            if "%pip" in source:
                source = "import memlab\n" + source.split("    import memlab\n")[-1]
            if "measure(training(" in source:
                break
            exec(compile(source, NOTEBOOK.name, "exec"), names)
    yield names
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def setting(notebook):
    config = gpt.GPTConfig(vocabulary_size=512, context_length=32, layers=2, heads=2, hidden=128)
    return notebook["Setting"](config=config, batch_size=3, sequence_length=32)


@pytest.fixture(scope="module")
def naive(notebook, setting):
    return proof.first_step(notebook["training"](setting=setting))


def test_the_ladder_has_the_lines_that_are_tested_here(notebook):
    assert tuple(notebook["LADDER"]) == LINES and set(notebook["APPROXIMATE"]) == APPROXIMATE
    assert notebook["rungs"]["embedding far"] == LINES


def check(notebook, setting, naive, lines):
    """The gradients of the first step are the naive loop's, or as far off as 16 bits make them; and
    it goes on learning.
    """
    build = notebook["training"](*lines, setting=setting)
    difference = proof.gradient_difference(naive, proof.first_step(build))
    assert difference < (0.1 if {"BF16 autocast", "BF16 weights"} & set(lines) else 2e-5), lines
    step = build()
    first = step()
    for _ in range(3):
        last = step()
    assert torch.isfinite(last) and last < first, lines


@pytest.mark.parametrize("line", LINES)
def test_a_line_alone(notebook, setting, naive, line):
    check(notebook, setting, naive, [line])


@pytest.mark.parametrize("number", range(2, len(LINES) + 1))
def test_a_rung(notebook, setting, naive, number):
    check(notebook, setting, naive, LINES[:number])


@pytest.mark.parametrize("line", LINES)
def test_everything_without_one_line(notebook, setting, naive, line):
    gone = {line} | ({"embedding far"} if line == "tied, in tiles" else set())
    check(notebook, setting, naive, [name for name in LINES if name not in gone])


def combinations():
    """The rungs; and, all on the device, the exact lines with one approximate line."""
    near = [name for name in LINES if not name.endswith("far") and name != "lean start"]
    rungs = [LINES[:number] for number in range(len(LINES) + 1)]
    return rungs + [
        tuple(name for name in near if name not in APPROXIMATE or name == one)
        for one in APPROXIMATE
    ]


@pytest.mark.parametrize(
    "lines", combinations(), ids=lambda lines: f"{len(lines)} to {lines[-1]}" if lines else "naive"
)
def test_the_peak_is_what_the_formula_says(notebook, lines):
    """On the notebook's own model. What an operator takes for itself depends on the machine, and
    shows in small peaks.
    """
    peak, expected = measure(notebook["training"](*lines)).peak_bytes, notebook["predict"](lines)[1]
    assert abs(peak - expected) < 0.05 * expected + 2**18


def test_larger_pieces_give_the_same_gradients(notebook, setting, naive):
    larger = notebook["Setting"](
        config=setting.config,
        batch_size=3,
        sequence_length=32,
        micro_batch_size=2,
        tile_words=256,
        slice_size=2**17,
    )
    check(notebook, larger, naive, LINES)
