"""Two receipts compared: as a function, as a command, and as the fixture of the documentation."""

import re
from pathlib import Path

import pytest

from memlab import __main__ as commands
from memlab import measure, receipt
from tests.receipt.test_models import train

pytest_plugins = "pytester"

PAGE = Path(__file__).resolve().parents[2] / "docs" / "in_your_own_run.md"


@pytest.fixture(scope="module")
def receipts():
    """A run, and one of twice the width."""
    return measure(train).receipt(), measure(train, width=64).receipt()


def test_the_same_run_is_the_same(receipts):
    difference = receipt.diff(receipts[0], receipts[0])
    size = receipts[0].known_bytes
    assert not difference.grew and difference.growth == 0
    assert str(difference).endswith(f"({size:,} bytes): the same")


def test_what_grew_is_named(receipts):
    old, new = receipts
    difference = receipt.diff(old, new, "1%")
    assert difference.grew and difference.allowed == old.known_bytes // 100
    text = str(difference)
    assert f"{new.known_bytes - old.known_bytes:+,} bytes" in text and "more than the" in text
    assert re.search(r"\n  parameters +2\.12 KiB +4\.25 KiB +\+2,176\n", text)
    before, after = "1 x 2.00 KiB, FP32 (32, 16)", "1 x 4.00 KiB, FP32 (64, 16)"
    assert re.search(rf"\n  parameters, .*0\.weight: {re.escape(f'{before} → {after}')}", text)
    assert "batch" not in text


def test_a_run_may_need_less_and_the_environment_may_be_another(receipts):
    old, new = receipts
    elsewhere = old.environment.model_copy(update={"threads": 7, "python": "3.12.1"})
    difference = receipt.diff(new, old.model_copy(update={"environment": elsewhere}))
    assert not difference.grew and difference.growth < 0
    text = str(difference)
    assert f"python {old.environment.python} → 3.12.1" in text
    assert f"threads {old.environment.threads} → 7" in text and "torch" not in text


def test_a_run_that_now_grows_from_step_to_step_is_said(receipts):
    creep = receipts[0].verdict.model_copy(update={"kind": "creep", "sentence": "It grows."})
    later = receipts[0].model_copy(update={"verdict": creep})
    difference = receipt.diff(receipts[0], later, "50%")
    assert difference.grew and str(difference).endswith("Now: It grows.")
    assert not receipt.diff(later, later).grew and not receipt.diff(later, receipts[0]).grew


def test_what_moved_outside_is_said(receipts):
    moved = receipts[0].model_copy(update={"outside_bytes": 2048})
    assert "outside of this allocator: 0 B → 2.00 KiB" in str(receipt.diff(receipts[0], moved))


@pytest.mark.parametrize(
    ("at_most", "allowed"),
    [(0, 0), ("0%", 0), ("25 %", 500), ("0.1%", 2), ("1 KiB", 1024), (64, 64), ("64", 64)],
)
def test_how_much_it_may_grow(receipts, at_most, allowed):
    old = receipts[0].model_copy(update={"known_bytes": 2000})
    difference = receipt.diff(old, old.model_copy(update={"known_bytes": 2064}), at_most)
    assert difference.allowed == allowed and difference.grew == (allowed < 64)


@pytest.mark.parametrize("at_most", ["a little", "-1%", -5, "1 %%", True])
def test_what_says_not_how_much_is_refused(receipts, at_most):
    with pytest.raises(ValueError, match="does not say how much is allowed"):
        receipt.diff(*receipts, at_most)


def test_the_command_says_it_by_its_exit_status(receipts, tmp_path, capsys):
    files = [tmp_path / "old.json", tmp_path / "new.json"]
    for kept, path in zip(receipts, files, strict=True):
        kept.save(path)
    old, new = map(str, files)
    assert commands.main(["diff", old, old]) == 0
    assert commands.main(["diff", old, new, "--at-most", "1%"]) == 1
    assert "0.weight: 1 x 2.00 KiB, FP32 (32, 16) → 1 x 4.00 KiB" in capsys.readouterr().out
    assert commands.main(["diff", old, new, "--at-most", "200%"]) == 0
    assert commands.main(["diff", old, str(tmp_path / "none.json")]) == 2
    assert "none.json" in capsys.readouterr().err


def test_the_fixture_of_the_documentation_fails_when_a_run_grows(pytester):
    (fixture,) = re.findall(r"```python\n([^`]*def same_memory.*?)```", PAGE.read_text(), re.S)
    assert len(fixture.strip().splitlines()) <= 20
    pytester.makeconftest(fixture)
    source = Path(__file__).with_name("test_models.py").read_text()
    trains = "import torch\n\n\n" + source[source.index("def train") : source.index("@pytest")]
    test = "\n\ndef test_memory(same_memory):\n    same_memory(train{})\n"

    pytester.makepyfile(trains + test.format(""))
    pytester.runpytest_inprocess().assert_outcomes(failed=1)  # there is nothing to compare with yet
    pytester.runpytest_inprocess().assert_outcomes(passed=1)

    pytester.makepyfile(trains + test.format(", width=64"))
    grown = pytester.runpytest_inprocess()
    grown.assert_outcomes(failed=1)
    grown.stdout.fnmatch_lines(["*0.weight: 1 x 2.00 KiB*4.00 KiB*"])
