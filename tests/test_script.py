"""A script that is run and watched: as Python would run it, to the byte, whatever ends it."""

import gc
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from memlab import __main__ as commands
from memlab import receipt
from memlab.script import run_script
from memlab.units import parse_bytes

PACKAGE = Path(__file__).resolve().parents[1]

#: Parameters, gradients, and AdamW's two moments and two step counters, in bytes.
WEIGHTS = 4 * (16 * 32 + 32)
STATE = 2 * WEIGHTS + 2 * 4

TRAIN = """
import sys

import torch

model = torch.nn.Linear(16, 32)
optimizer = torch.optim.AdamW(model.parameters())
for step in range(3):
    loss = model(torch.randn(8, 16)).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The folder in which one is, and from which `python -m` imports."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.last_type = sys.last_value = sys.last_traceback = None  # they hold what a script made
    gc.collect()


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def run_alone(folder, *arguments, status=0):
    """Run the command in a process of its own: in this one, other tests have left models behind,
    and everything in it counts.
    """
    ended = subprocess.run(
        [sys.executable, *"-m memlab run train.py".split(), *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(PACKAGE), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == status, ended.stderr
    return ended


def test_a_whole_script_is_watched(folder):
    write(folder / "train.py", TRAIN)
    said = run_alone(folder, "--save", "receipt.json")
    assert said.stdout == "" and said.stderr.startswith("memlab: the receipt of train.py\nPeak ")
    assert re.search(
        r"Largest at the peak:\n  4\.00 KiB +2 x 2\.00 KiB .*optimizer state", said.stderr
    )
    kept = receipt.load(folder / "receipt.json")
    assert kept.known_columns["parameters"] == WEIGHTS
    assert kept.known_columns["optimizer_state"] == STATE


def test_a_script_finds_all_as_python_gives_it(folder, capsys):
    write(folder / "scripts/helper.py", "NAME = 'the one beside it'\n")
    write(
        folder / "scripts/show.py",
        "import json, sys, helper\n"
        "class Here: ...\n"
        "main = sys.modules['__main__']\n"
        "print(json.dumps([helper.NAME, sys.argv, __name__, __file__, main.Here is Here]))\n",
    )
    before = sys.argv, sys.path[:], sys.modules["__main__"]
    assert run_script("scripts/show.py", ["--lr", "0.1"]) == 0
    shown = json.loads(capsys.readouterr().out)
    file = "scripts/show.py"
    assert shown == ["the one beside it", [file, "--lr", "0.1"], "__main__", file, True]
    assert (sys.argv, sys.path, sys.modules["__main__"]) == before


def test_a_module_and_a_package_are_run_as_by_python_m(folder, capsys):
    show = (
        "import sys\nfrom . import VALUE\nprint(VALUE, __package__, __spec__.name, sys.argv[1:])\n"
    )
    write(folder / "of_script_test/__init__.py", "VALUE = 3\n")
    write(folder / "of_script_test/train.py", show)
    write(folder / "of_script_test/__main__.py", show)
    assert run_script("of_script_test.train", ["x"], as_module=True) == 0
    assert run_script("of_script_test", as_module=True) == 0
    assert capsys.readouterr().out.splitlines() == [
        "3 of_script_test of_script_test.train ['x']",
        "3 of_script_test of_script_test.__main__ []",
    ]


@pytest.mark.parametrize(
    ("last", "status", "said"),
    [
        ("raise ValueError('broken')", 1, "ValueError: broken"),
        ("raise KeyboardInterrupt", 130, "KeyboardInterrupt"),
        ("sys.exit(7)", 7, ""),
        ("sys.exit()", 0, ""),
        ("sys.exit('no data')", 1, "no data\n"),
    ],
)
def test_the_receipt_is_printed_whatever_ends_the_script(folder, capsys, last, status, said):
    write(folder / "train.py", TRAIN + last)
    assert run_script("train.py") == status
    err = capsys.readouterr().err
    assert said in err and "memlab: the receipt of train.py\nPeak " in err
    assert "memlab/script.py" not in err  # the script's own frames, as Python would print them


def test_over_a_budget_the_receipt_says_where_and_what_would_help(folder):
    loop = "layers = torch.nn.Sequential(*[torch.nn.Linear(256, 256) for _ in range(4)])\n"
    loop += "x = torch.randn(1024, 256)\nwhile True:\n    layers(x).mean().backward()\n"
    write(folder / "train.py", "import torch\n" + loop)
    err = run_alone(folder, "--budget", "4 MiB", "--report", "report.html", status=1).stderr
    assert "OverBudget: out of memory: the budget is 4.00 MiB" in err
    assert "The largest column at the peak is activations" in err
    together, counted = re.search(r"asked for, (.*) together, by column: (.*)\.", err).groups()
    sizes = [parse_bytes(size) for size in re.findall(r"[\d.]+ (?:B|KiB|MiB)", counted)]
    assert sum(sizes) == pytest.approx(parse_bytes(together), rel=0.01)
    assert "over the budget of 4.00 MiB: it counts also the" in err
    assert "next cell" not in err  # that is advice for a notebook
    assert "It ran out at train.py:5: layers(x).mean().backward()" in err
    assert re.search(r"up to 1\.\d\d MiB of activations: two micro-batches", err)
    assert "What would take bytes away" in (folder / "report.html").read_text()


def test_every_step_is_recorded_where_that_is_asked_for(folder, capsys):
    write(folder / "train.py", TRAIN.replace("range(3)", "range(150)"))
    assert commands.main(["run", "train.py"]) == 0
    assert "of 150 steps, and the peak is that of these" in capsys.readouterr().err
    assert commands.main(["run", "--every", "1", "train.py"]) == 0
    said = capsys.readouterr().err
    assert "recorded in full" not in said and "the host's heap is not judged" in said


def test_the_lines_are_said_that_made_most_and_which_of_them_grows(folder, capsys):
    made = "loss = model(torch.randn(8, 16))"
    kept = "kept.append(model(torch.randn(64, 16)))\n    loss = kept[-1]"
    leaks = TRAIN.replace(made, kept).replace("range(3)", "range(6)")
    write(folder / "train.py", leaks.replace("import torch\n", "import torch\n\nkept = []\n"))
    assert run_script("train.py", lines=True) == 0
    err = capsys.readouterr().err
    assert re.search(r"It grows by .* at train\.py:11, held by list `kept` \(6 entries\)", err)
    most = err.partition("Lines that made most of it:\n")[2]
    assert re.search(r"^ +[\d.]+ KiB  train\.py:11 +grows by [\d.]+ KiB a step$", most, re.M)


def test_optimizers_that_are_made_anew_and_held_stop_at_a_budget(folder):
    loop = (
        "import torch\nmodel = torch.nn.Linear(256, 256)\noptimizers = []\n"
        "for _ in range(100):\n"
        "    optimizers.append(torch.optim.AdamW(model.parameters()))\n"
        "    model(torch.randn(8, 256)).mean().backward()\n"
        "    optimizers[-1].step()\n"
    )
    write(folder / "train.py", loop)
    said = run_alone(folder, "--budget", "4 MiB", status=1).stderr
    assert re.search(
        r"It grows by 514\.01 KiB a step .*: optimizer state, held by .* `optimizers`", said
    )
    assert re.search(r"The peak, .* MiB, came after step \d, in a step that did not end", said)


def test_over_a_budget_the_receipt_says_who_holds_what(folder):
    loop = "    while True:\n        outputs.append(layer(torch.randn(64, 256)))\n"
    train = "def train(layer):\n    outputs = []\n" + loop + "train(torch.nn.Linear(256, 256))\n"
    write(folder / "train.py", "import torch\n" + train)
    assert re.search(
        r"held by list `outputs` \(\d+ entries\) in train\(\) at train\.py:3",
        run_alone(folder, "--budget", "2 MiB", status=1).stderr,
    )


def test_what_a_function_of_the_script_held_is_known_after_it(folder, capsys):
    head, loop = TRAIN.split("model = ")
    loop = loop.replace("range(3)", "range(6)").replace("8, 16", "64, 16")
    loop = loop.replace("loss = model", "output = model")
    loop = loop.replace(".square()", "\n    outputs.append(output)\n    loss = output.square()")
    function = f"outputs = []\nmodel = {loop}".replace("\n", "\n    ")
    write(folder / "train.py", f"{head}def train():\n    {function}\n\ntrain()\n")
    assert run_script("train.py") == 0
    err = capsys.readouterr().err
    assert "held by list `outputs`" in err and "in train() at train.py:" in err


def test_a_budget_that_is_kept_changes_nothing(folder):
    write(folder / "train.py", TRAIN)
    said = run_alone(folder, "--budget", "64 MiB", "--save", "receipt.json")
    assert "would take" not in said.stderr
    kept = receipt.load(folder / "receipt.json")
    assert kept.known_columns["optimizer_state"] == STATE
    assert {group.operator.partition("::")[0] for group in kept.blocks} <= {"aten", ""}


def test_what_cannot_be_run_is_said(folder):
    with pytest.raises(FileNotFoundError, match="there is no script none.py"):
        run_script("none.py")
    with pytest.raises(ValueError, match="there is no module 'no_such_module'"):
        run_script("no_such_module", as_module=True)
    write(folder / "train.py", TRAIN)
    with pytest.raises(ValueError, match="not a size"):
        run_script("train.py", size="a lot")


def test_the_arguments_of_the_script_come_after_two_dashes(folder, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(commands.script, "run_script", lambda *a, **k: asked.append((a, k)) or 0)
    assert commands.main(["run", "train.py", "--budget", "8 GiB", "--", "--lr", "--", "1"]) == 0
    [((name, arguments), options)] = asked
    assert (name, arguments) == ("train.py", ["--lr", "--", "1"])
    assert options["size"] == "8 GiB" and options["save"] is None and not options["lines"]
    with pytest.raises(SystemExit) as end:
        commands.main(["run", "train.py", "--lr", "1"])
    assert end.value.code == 2
    assert "python -m memlab run train.py -- --lr 1" in capsys.readouterr().err


def test_the_receipt_of_the_documentation_is_that_of_its_script(folder):
    page = (PACKAGE / "docs" / "in_your_own_run.md").read_text()
    blocks = re.findall(r"```(?:python|text)\n(.*?)```", page, re.S)
    number = next(n for n, block in enumerate(blocks) if block.startswith("memlab: the receipt"))
    write(folder / "train.py", blocks[number - 1])
    assert run_alone(folder).stderr == blocks[number]


@pytest.mark.slow
def test_each_rank_has_its_own_receipt(folder):
    write(
        folder / "train.py",
        "import torch\nimport torch.distributed as dist\ndist.init_process_group('gloo')\n"
        "model = torch.nn.Linear(8, 8)\nx = torch.randn(4 + 4 * dist.get_rank(), 8)\n"
        "wrapped = torch.nn.parallel.DistributedDataParallel(model)\n"
        "wrapped(x).sum().backward()\n"
        "dist.destroy_process_group()\n",
    )
    command = "-m torch.distributed.run --standalone --nproc-per-node 2 -m memlab run train.py"
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        [sys.executable, *command.split(), "--save", "kept.json"],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
    for rank in (0, 1):
        assert f"memlab: the receipt of train.py, rank {rank}\n" in ended.stderr
        kept = receipt.load(folder / f"kept.rank{rank}.json")
        weights = 4 * (8 * 8 + 8)
        assert kept.known_columns["parameters"] == weights
        # With the bucket in which the ranks sum them, and that of the bias not yet made.
        assert weights + 4 * 8 * 8 <= kept.known_columns["gradients"] < 3 * weights
