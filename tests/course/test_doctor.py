"""What the doctor says of this machine and of the meter."""

import dataclasses
import re
import sys

import pytest
import torch

from memlab.course import doctor
from memlab.workloads import gpt, scale


@pytest.fixture
def small(monkeypatch):
    """A GPT whose step takes milliseconds."""
    sizes = dataclasses.replace(scale("cpu"), gpt=gpt.tiny(layers=1), sequence_length=16)
    monkeypatch.setattr(doctor, "scale", lambda: sizes)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # many threads in a small step wait for one another
    yield
    torch.set_num_threads(threads)


def test_doctor_says_what_this_machine_is(small, capsys):
    assert doctor.run("1.2.3", step_seconds=0.0001, repeats=2) == 0
    printed = capsys.readouterr().out
    for expected in (
        r"^memlab +1\.2\.3, commit ",
        rf"^python +3\.\d+\.\d+, torch {re.escape(torch.__version__)}, \d+ threads$",
        r"^device +cpu$",
        r"^free memory +[\d.]+ GiB of [\d.]+ GiB$",
        r"^scale +cpu on cpu: ",
        r"^BF16 +(native|emulated|none)$",
        r"^meter +OK: 8,390,144 bytes allocated, 8,390,144 bytes measured$",
        (
            r"^ +[\d.]+ x: a step takes [\d.]+ s with the meter, [\d.]+ s without \(the fastest of"
            r" 2 each; batch 8 x 16\)"
        ),
    ):
        assert re.search(expected, printed, flags=re.MULTILINE), (expected, printed)


def test_doctor_fails_when_the_meter_is_wrong(monkeypatch, capsys):
    monkeypatch.setenv("MEMLAB_SCALE", "cpu")
    right = doctor.measure

    def wrong(*arguments, **options):
        return dataclasses.replace(right(*arguments, **options), peak_bytes=8390145)

    monkeypatch.setattr(doctor, "measure", wrong)
    monkeypatch.setattr(doctor, "overhead", lambda *arguments: "-")
    assert doctor.run("1.2.3") == 1
    assert "WRONG: 8,390,144 bytes allocated, 8,390,145 bytes measured" in capsys.readouterr().out


def test_doctor_works_where_packages_are_missing(monkeypatch, capsys):
    monkeypatch.setenv("MEMLAB_SCALE", "cpu")
    monkeypatch.setattr(
        doctor, "find_spec", lambda name: None if name in ("sklearn", "nbclient") else True
    )
    monkeypatch.setitem(sys.modules, "psutil", None)
    monkeypatch.setattr(doctor, "overhead", lambda *arguments: "-")
    assert doctor.run("1.2.3") == 0
    printed = capsys.readouterr().out
    assert "free memory  not known (psutil is not installed)" in printed
    assert (
        "missing      nbclient (runs the notebooks), sklearn (the real images (scikit-learn)): "
        "pip install 'memlab[course]'" in printed
    )


def clock(monkeypatch, *seconds):
    """A clock by which the steps take these seconds, one after the other; the meter, before the
    last two, half of one.
    """
    ticks, now = [], 0.0
    for number, each in enumerate(seconds):
        if number == len(seconds) - 2:
            ticks.append(now)
            now += 0.5
        ticks += [now, now + each]
        now += each
    monkeypatch.setattr(doctor.time, "perf_counter", lambda: ticks.pop(0) if ticks else now)


@pytest.mark.parametrize(
    ("seconds", "found"),
    [
        # A warm-up, two to find the batch (8, then 20), the steps without the meter, those with it.
        (
            (9, 0.4, 1.0, 1.0, 1.1, 1.2, 1.3),
            r"^1\.20 x: a step takes 1\.200 s with .* 1\.000 s without .*batch 20 x 16",
        ),
        ((9, 0.4, 1.0, 1.0, 1.1, 1.4, 1.25), r"^1\.25 x: (?!.*(Not to be|That is|This step))"),
        ((9, 0.4, 1.0, 1.0, 1.1, 1.4, 1.4), r"^1\.40 x: .*That is more than the 1\.3 x"),
        (
            (9, 0.4, 1.0, 1.0, 1.5, 1.4, 1.4),
            r"Not to be relied on: the steps took 1\.000 to 1\.500 s without",
        ),
        (
            (9, 0.4, 1.0, 1.0, 1.1, 0.8, 0.9),
            r"^0\.80 x: .*Not to be relied on: .*, 0\.800 to 0\.900 s with it",
        ),
        # The batch stops at 128 sequences, however fast the machine is.
        ((9, 0.01, 0.2, 0.2, 0.2, 0.2, 0.2), r"^1\.00 x: .*batch 128 x 16.*This step is short"),
    ],
)
def test_the_overhead_in_words(small, monkeypatch, seconds, found):
    clock(monkeypatch, *seconds)
    text = doctor.overhead(step_seconds=1.0, repeats=2)
    assert re.search(found, text, flags=re.DOTALL), text
    assert "Beside the steps, 0.5 s to begin and to read" in text
