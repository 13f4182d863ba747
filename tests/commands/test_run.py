"""The commands, called as the shell does: what they print, and their exit status."""

import json
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

from memlab import __main__ as commands

SCRIPT = """
import torch

print("the script's own words")

def train(batch=1, width=1024, name=None):
    weight = torch.nn.Parameter(torch.zeros(width, width, device="cuda"))
    while True:
        loss = (torch.zeros(batch, width, width, device="cuda") + weight).sum()
        loss.backward()
        weight.grad = None
        yield loss

def fails():
    raise RuntimeError("out of ideas")
    yield

def switched(batch=1, fused_loss=False, other=False):
    size = 16 * 2**20 if fused_loss else 32 * 2**20
    weight = torch.zeros(size // 4, device="cuda", requires_grad=True)
    while True:
        yield weight[:1].sum()
"""


@pytest.fixture(autouse=True)
def script(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("train.py").write_text(SCRIPT)


def test_without_a_gpu_several_are_looked_at(capsys):
    assert commands.main(["predict", "train.py:train", "--steps", "1"]) == 0
    shown = capsys.readouterr().out
    assert "Predicted peak" in shown and "fits NVIDIA H100 80GB HBM3" in shown
    for name in ("Tesla T4", "NVIDIA GeForce RTX 4090", "NVIDIA H200"):
        assert f"\n{name}" in shown


def test_the_exit_status_says_whether_it_fits(capsys):
    arguments = ["predict", "train.py:train", "--gpu", "640 MiB", "--json"]
    shown = []
    for options, status in [
        (["--option", "batch=2"], 0),
        (["--option", "batch=200"], 3),
        (["--option", "batch=2", "--in-use", "110 MiB"], 3),
    ]:
        assert commands.main([*arguments, *options]) == status
        # What the script prints is not in between.
        shown.append(json.loads(capsys.readouterr().out))
    assert [fields["fits"] for fields in shown] == [True, False, False]
    small, large, narrow = shown
    assert large["allocated_bytes"] > small["allocated_bytes"] == narrow["allocated_bytes"]
    assert small["free_bytes"] - narrow["free_bytes"] == 110 * 2**20
    assert sum(small["columns"].values()) == small["allocated_bytes"]


def test_solve_prints_the_largest_value(capsys):
    arguments = ["solve", "train.py:train", "--gpu", "640 MiB", "--steps", "1"]
    assert commands.main([*arguments, "--high", "4"]) == 0
    assert "batch=4 is the largest that fits" in capsys.readouterr().out
    assert commands.main([*arguments, "--field", "width", "--low", "9999", "--json"]) == 3
    fields = json.loads(capsys.readouterr().out)
    assert fields["value"] is None and [tried["value"] for tried in fields["tried"]] == [9999]


def test_plan_prints_the_switches_that_make_it_fit(capsys):
    arguments = ["plan", "train.py:switched", "--option", "other=True", "--gpu"]
    assert commands.main([*arguments, "540 MiB"]) == 0
    assert "switched(other=True, batch=1, fused_loss=True)" in capsys.readouterr().out
    assert commands.main([*arguments, "518 MiB", "--json"]) == 3
    fields = json.loads(capsys.readouterr().out)
    assert fields["switches"] == ["fused loss"] and not fields["fits"]
    assert fields["rungs"][1]["took_bytes"] == 16 * 2**20


def test_an_error_of_the_script_is_shown_as_python_shows_it(capsys):
    assert commands.main(["predict", "train.py:fails"]) == 1
    shown = capsys.readouterr().err
    assert 'train.py", line 15, in fails' in shown and "RuntimeError: out of ideas" in shown


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["predict", "none.py:train"], "there is no file none.py"),
        (["predict", "train.py"], "with a colon"),
        (["predict", "train.py:learn"], "It has: train, fails, switched"),
        (["predict", "train.py:train", "--gpu", "RTX 5099"], "RTX 5090"),
        (["predict", "train.py:train", "--gpu", "A100"], 'Write "A100 40GB" or "A100 80GB"'),
        (["predict", "train.py:train", "--in-use", "a bit"], "'a bit' is not a size"),
        (["predict", "train.py:train", "--steps", "two"], "--steps has to be a whole number"),
        (["predict", "train.py:train", "--steps", "0"], "steps has to be a whole number"),
        (["predict", "train.py:train", "--option", "batch"], "--option is NAME=VALUE"),
        (["predict", "train.py:train", "--option", "a b=3"], "--option is NAME=VALUE"),
        (["predict", "train.py:train", "--option", "depth=3"], "argument 'depth'"),
        (
            ["predict", "train.py:train", "--option", "batch=3", "--option", "batch=4"],
            "--option batch was given twice",
        ),
        (["predict", "train.py:train", "--option", "gpu=T4"], "memlab has this name itself"),
        (["plan", "train.py:switched"], "which GPU?"),
        (["plan", "train.py:switched", "--gpu", "T4", "--lora", "all"], "--lora has to be a whole"),
        (["plan", "train.py:switched", "--gpu", "T4", "--option", "batch=3"], "this name itself"),
        (["plan", "train.py:train", "--gpu", "T4"], "no option that is a switch"),
        (["plan", "none.json", "--gpu", "T4"], "there is no such file"),
        (["solve", "train.py:train", "--field", "size"], "no option 'size'"),
        (["solve", "train.py:train", "--low", "1.5"], "--low has to be a whole number"),
        (["solve", "train.py:train", "--high", "all"], "--high has to be a whole number"),
        (["solve", "train.py:train", "--low", "4", "--high", "2"], "low has to be at most high"),
    ],
)
def test_wrong_input_is_said_and_is_status_2(arguments, said, capsys):
    assert commands.main(arguments) == 2
    shown = capsys.readouterr().err
    assert said in shown and "Traceback" not in shown


def test_an_option_of_the_run_is_not_one_of_the_command(capsys):
    with pytest.raises(SystemExit) as end:
        commands.main(["predict", "train.py:train", "--batch", "4"])
    assert end.value.code == 2
    shown = capsys.readouterr().err
    assert "'--batch 4'" in shown and "--option batch=8" in shown


def test_the_command_memlab_is_the_same():
    project = tomllib.loads(Path(__file__).parents[2].joinpath("pyproject.toml").read_text())
    place = project["project"]["scripts"]["memlab"]
    assert metadata.EntryPoint("memlab", place, "console_scripts").load() is commands.main
