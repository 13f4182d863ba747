"""The lessons keep their form: short, true at every scale, and with options that exist."""

import ast
import functools
import importlib
import inspect
import itertools
import re
from typing import NamedTuple

import nbformat
import pytest

from memlab import measure, predict
from memlab.course.cards import GPUS
from memlab.course.notebook import find_root, lesson, lessons
from memlab.meters.fake_ranks import fake_ranks
from memlab.results.lessons import load_cards
from memlab.workloads.fine_tuning import fine_tune
from memlab.workloads.geometries import find_geometry
from memlab.workloads.lessons import GPT2_124M, SMALL
from tools.diagrams import diagram

ROOT = find_root()
LESSONS = lessons(ROOT)
#: Lessons that teach no technique: they have no loop before and after it, and so no card.
WITHOUT_TECHNIQUE = {"e8_will_it_fit"}
of_each_lesson = pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
of_each_technique = pytest.mark.parametrize(
    "path",
    [path for path in LESSONS if path.stem not in WITHOUT_TECHNIQUE],
    ids=lambda path: path.stem,
)

MOST_CELLS = 30
MORE_CELLS = {"00_measuring_memory": 40, "11_capstone": 40}
MOST_WORDS = 1200
MOST_CODE_LINES = 200

#: Words that only this course would know.
PRIVATE_WORDS = re.compile(r"\b(far side|lean start|rungs?|places)\b", re.IGNORECASE)


def cells_of(path, kind):
    return [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == kind]


def prose(path):
    """What a lesson says, without code, tables that are generated, and pictures' descriptions."""
    text = "\n".join(cell.source for cell in cells_of(path, "markdown"))
    left_out = (
        r"^```.*?^```",
        r"<!-- memlab:(\w+):begin -->.*?<!-- memlab:\1:end -->",
        r"!\[.*?\]\(.*?\)",
        r"<[^>]+>",
    )
    for pattern in left_out:
        text = re.sub(pattern, "", text, flags=re.MULTILINE | re.DOTALL)
    return text


# The form -----------------------------------------------------------------------------------------


@of_each_lesson
def test_a_lesson_is_short(path):
    cells = nbformat.read(path, as_version=4).cells
    lines = [line for c in cells_of(path, "code") for line in c.source.splitlines() if line.strip()]
    assert len(cells) <= MORE_CELLS.get(path.stem, MOST_CELLS)
    assert len(prose(path).split()) <= MOST_WORDS
    assert len(lines) <= MOST_CODE_LINES


@of_each_lesson
def test_a_lesson_speaks_the_words_of_the_field(path):
    assert PRIVATE_WORDS.findall(prose(path)) == []


def test_a_lesson_leads_to_the_next():
    core = [path for path in LESSONS if path.parent.name == "notebooks"]
    for path, following in itertools.pairwise(core):
        last = nbformat.read(path, as_version=4).cells[-1].source
        assert re.search(rf"Next: \[{following.stem[:2]} · .+?\]\({following.name}\)\.$", last), (
            path.stem
        )


@of_each_lesson
def test_the_time_is_that_of_slow_readers(path):
    """150 words and 8 lines of code a minute, 10 minutes an exercise."""
    code = [line for c in cells_of(path, "code") for line in c.source.splitlines() if line.strip()]
    exercises = [c for c in cells_of(path, "code") if "exercise" in c.metadata.get("tags", ())]
    minutes = len(prose(path).split()) / 150 + len(code) / 8 + 10 * len(exercises)
    assert lesson(path).about["minutes"] >= minutes


@of_each_technique
def test_a_lesson_has_its_card_and_one_diagram(path):
    text = "\n".join(cell.source for cell in cells_of(path, "markdown"))
    assert text.count("<!-- memlab:card:begin -->") == 1
    shown = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", text)
    (drawing,) = [(path.parent / name).resolve() for name in shown]
    assert drawing == (ROOT / f"notebooks/diagrams/{path.stem}.svg").resolve()
    drawn = drawing.read_text(encoding="utf-8")
    assert drawn == str(diagram(path.stem)), "run: python -m tools.diagrams"


# In your trainer ----------------------------------------------------------------------------------


def trainer_code(path):
    text = "\n".join(cell.source for cell in cells_of(path, "markdown"))
    section = text.partition("## In your trainer")[2].partition("\n## ")[0]
    return "\n".join(re.findall(r"^```python\n(.*?)^```", section, flags=re.MULTILINE | re.DOTALL))


def unknown_options(code):
    """What an import of this code does not find, and keywords that a call does not take."""
    known = {}
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module)
            for name in node.names:
                if not hasattr(module, name.name):
                    yield f"{node.module} has no {name.name}"
                known[name.asname or name.name] = getattr(module, name.name, None)
    for node in ast.walk(ast.parse(code)):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        owner, *attributes = called.split(".")
        function = known.get(owner)
        for attribute in attributes:
            function = getattr(function, attribute, None)
        if function is None:
            continue
        try:
            taken = inspect.signature(function).parameters
        except ValueError:  # written in C: its documentation begins with its signature
            taken = {name: None for name in re.findall(r"(\w+)=", function.__doc__ or "")}
        open_ended = any(p is not None and p.kind is p.VAR_KEYWORD for p in taken.values())
        for keyword in node.keywords:
            if keyword.arg not in taken and not open_ended:
                yield f"{called} takes no {keyword.arg}"


@of_each_technique
def test_the_options_for_a_trainer_exist(path):
    code = trainer_code(path)
    assert "import" in code
    assert list(unknown_options(code)) == []


def test_an_option_that_does_not_exist_is_found():
    code = (
        "from torch.optim import AdamW, NoSuch\nAdamW(p, fusedd=True, lr=1)\n"
        "from torch.nn.functional import scaled_dot_product_attention\n"
        "scaled_dot_product_attention(q, k, v, causal=True)"
    )
    assert list(unknown_options(code)) == [
        "torch.optim has no NoSuch",
        "AdamW takes no fusedd",
        "scaled_dot_product_attention takes no causal",
    ]


# The story, at three scales -----------------------------------------------------------------------
#
# The CPU's run is measured, GPT-2's is predicted for a GPU. Of the large model, two short ones are
# predicted, and the card's numbers lie on the line through them: so the card is of today's code.


class Story(NamedTuple):
    """What a lesson says of its peak, before and after.

    `column` shrinks most, and what remains of it is at most the part `remains` of what was there.
    """

    column: str
    phases: set[str]  # of both peaks
    times_less: tuple[float, float]  # at least, at most
    remains: float = 0.5
    largest_before: bool = True  # whether the column is the largest of all before


STORIES = {
    "00_measuring_memory": Story("activations", {"forward", "backward"}, (2.0, 3.3)),
    "01_mixed_precision": Story("activations", {"forward"}, (1.2, 1.8), remains=0.65),
    "02_low_precision": Story(
        "optimizer_state", {"forward", "backward", "optimizer"}, (1.7, 2.0), remains=0.51
    ),
    "03_gradient_checkpointing": Story("activations", {"forward", "backward"}, (2.0, 3.0)),
    # Of the 8B with 4 x 512 tokens the frozen weights are as large as the activations.
    "04_gradient_accumulation": Story(
        "activations", {"forward"}, (1.5, 2.3), remains=0.35, largest_before=False
    ),
    "05_sharding": Story("optimizer_state", {"backward", "optimizer"}, (1.7, 7.0), remains=0.14),
    "06_data_loading": Story(
        "kept", {"forward", "backward"}, (1.05, 1.5), remains=0.01, largest_before=False
    ),
    "07_in_place": Story(
        "temporaries", {"optimizer", "backward"}, (1.1, 1.25), remains=0.35, largest_before=False
    ),
    "08_offloading": Story("activations", {"forward", "backward"}, (2.3, 3.0), remains=0.05),
    "09_lean_optimizers": Story(
        "optimizer_state", {"forward", "backward", "optimizer"}, (1.35, 1.65), remains=0.3
    ),
    "10_compilation_and_fusion": Story(
        "temporaries", {"forward", "backward"}, (1.4, 1.8), largest_before=False
    ),
    "11_capstone": Story("activations", {"forward", "backward"}, (4.0, 20.0)),
    "e2_pruning": Story("activations", {"forward"}, (1.2, 1.7), remains=0.8),
    "e3_dynamic_length": Story("activations", {"forward"}, (1.8, 2.5), remains=0.3),
    "e4_chunked_input": Story("activations", {"forward"}, (1.4, 1.6), remains=0.53),
    # The optimizer state is larger. What remains is the gradient of the embedding.
    "e9_optimizer_in_backward": Story(
        "gradients", {"backward", "forward"}, (1.15, 1.3), remains=0.35, largest_before=False
    ),
}

#: The options of a lesson's loop: before, and after.
RUNS = {
    "00_measuring_memory": ({}, {"attention": "sdpa", "fused_loss": True}),
    "01_mixed_precision": ({}, {"change": "apply_mixed_precision"}),
    "02_low_precision": (
        {},
        {"change": "cast_to_low_precision", "make_optimizer": "rounding_adamw"},
    ),
    "03_gradient_checkpointing": ({}, {"change": "apply_gradient_checkpointing"}),
    "04_gradient_accumulation": ({}, {"compute_gradients": "accumulate"}),
    "05_sharding": ({}, {"change": "shard"}),
    "06_data_loading": ({}, {"batches": "streamed"}),
    "07_in_place": ({}, {"make_optimizer": "fused"}),
    "08_offloading": ({}, {"offload": "offload"}),
    "09_lean_optimizers": ({}, {"make_optimizer": "adamw_8bit"}),
    "10_compilation_and_fusion": ({}, {"change": "apply_fused_loss"}),
    "11_capstone": ({}, {"on": "RECIPE"}),
    "e2_pruning": ({}, {"change": "halve"}),
    "e3_dynamic_length": ({}, {"cut": "within_budget"}),
    "e4_chunked_input": ({}, {"change": "in_chunks"}),
    "e9_optimizer_in_backward": ({}, {"attach": "with_helper"}),
}

#: How many layers of the 8B are predicted, where one and two are too few. If all weights are
#: trained, the peak of less than 8 layers is in forward, when the fused loss is computed; on each
#: of 8 ranks that of less than about 20, and with a vocabulary as large as Qwen3's of less than 13.
FEW_LAYERS = {
    "02_low_precision": (8, 10),
    "05_sharding": (24, 25),
    "09_lean_optimizers": (8, 10),
    "11_capstone": (8, 10),
    "e9_optimizer_in_backward": (14, 15),
}

#: How many ranks a lesson's loop has. What is measured and predicted is one of them.
RANKS = {"05_sharding": 8}


def loop_of(path):
    """A lesson's loop: its set-up cell and the cell tagged `loop`, run."""
    names = {}
    cells = cells_of(path, "code")
    for cell in (cells[0], *(c for c in cells if "loop" in c.metadata.get("tags", ()))):
        exec(cell.source.replace("    %pip", "    pass  #"), names)
    runs = [
        {
            key: names.get(value, value) if isinstance(value, str) else value
            for key, value in o.items()
        }
        for o in RUNS[path.stem]
    ]
    return names["train"], runs


def check_story(name, before, after):
    story = STORIES[name]
    shrinks = {each: before.columns[each] - after.columns[each] for each in before.columns}
    assert max(shrinks, key=shrinks.get) == story.column
    if story.largest_before:
        assert max(before.columns, key=before.columns.get) == story.column
    least, most = story.times_less
    assert least <= before.peak_bytes / after.peak_bytes <= most
    assert after.columns[story.column] < story.remains * before.columns[story.column]
    assert before.phase in story.phases and after.phase in story.phases


@of_each_technique
def test_every_lesson_has_a_story(path):
    assert path.stem in STORIES and path.stem in RUNS


@functools.cache
def on_the_cpu(path):
    train, runs = loop_of(path)
    with fake_ranks(RANKS.get(path.stem)):
        return [measure(train, size=SMALL, device="cpu", **o) for o in runs]


@functools.cache
def gpt2_on_a_gpu(path):
    train, runs = loop_of(path)
    same = {"size": GPT2_124M, "gpu": "H100 80GB", "ranks": RANKS.get(path.stem)}
    return [predict(train, progress=False, **same, **o) for o in runs]


@of_each_technique
def test_the_story_holds_on_the_cpu(path):
    check_story(path.stem, *on_the_cpu(path))


@of_each_technique
def test_the_story_holds_for_gpt2_on_a_gpu(path):
    check_story(path.stem, *gpt2_on_a_gpu(path))


@of_each_technique
def test_the_story_holds_for_a_large_model_and_its_card_is_of_todays_code(path):
    card = load_cards(ROOT)[path.stem]
    check_story(path.stem, card.before, card.after)
    about = lesson(path).about["card"]["predicted"]
    layers_of_all = find_geometry(about["options"]["model"]).layers
    for name in ("before", "after"):
        options = tuple(sorted((about["options"] | about[name]).items()))
        few, more = FEW_LAYERS.get(path.stem, (1, 2))
        short, longer = (peak_of_layers(options, layers) for layers in (few, more))
        each = (longer - short) / (more - few)
        expected = short + (layers_of_all - few) * each
        assert getattr(card, name).peak_bytes == pytest.approx(expected, rel=0.01)


def test_more_than_two_of_three_tensors_of_logits_go_at_every_scale():
    """What comes instead is small in FP32. Under autocast, as for the 8B, one has 16 bits."""
    path = ROOT / "notebooks/10_compilation_and_fusion.ipynb"
    card = load_cards(ROOT)[path.stem]
    sizes = {
        SMALL.tokens * SMALL.config.vocabulary_size: on_the_cpu(path),
        GPT2_124M.tokens * GPT2_124M.config.vocabulary_size: gpt2_on_a_gpu(path),
        2 * 4096 * 128_256: [card.before, card.after],
    }
    for logits, (before, after) in sizes.items():
        assert 2 < (before.peak_bytes - after.peak_bytes) / (4 * logits) < 3


def test_the_trip_of_an_8b_is_as_long_as_lesson_08_says():
    """All activations are 29 GiB, the inputs of checkpointed blocks 1.08 GiB."""
    path = ROOT / "notebooks/08_offloading.ipynb"
    options = lesson(path).about["card"]["predicted"]["options"]
    for checkpoints, gibibytes in ((False, 29.0), (True, 1.08)):
        chosen = options | {"offload": True, "checkpoints": checkpoints}
        one, two = (
            predict(fine_tune, gpu="H100 80GB", progress=False, layers=layers, **chosen).host_bytes
            for layers in (1, 2)
        )
        assert one + 31 * (two - one) == pytest.approx(gibibytes * 2**30, rel=0.01)


@functools.cache
def peak_of_layers(options, layers):
    """What one lesson has after its technique, the next one has before it: predicted once."""
    chosen = dict(options) | {"layers": layers}
    return predict(fine_tune, gpu=GPUS["80 GB"], progress=False, **chosen).peak_bytes
