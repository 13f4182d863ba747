"""NumPy's arrays, noted by NumPy's own hook."""

import subprocess
import sys
import threading

import numpy as np

from memlab.ledger import Ledger, lives
from memlab.meters import arrays as rooms
from memlab.meters.arrays import LEAST, Arrays

FLOAT = 8


def noted(work):
    """The bytes of what comes (positive) and goes (negative) while something runs."""
    arrays = Arrays()
    arrays.start()
    try:
        work()
    finally:
        arrays.stop()
    return [event.bytes for event in arrays.events]


def test_what_comes_and_what_goes():
    def work():
        first = np.empty(1000)
        both = np.concatenate([first, np.zeros(1000)])
        del first
        both.resize(3000, refcheck=False)
        np.empty(LEAST // FLOAT - 1)  # too small
        np.empty(0)
        both[::2].sum()  # a view has no memory

    sizes = [FLOAT * count for count in (1000, 1000, 2000, -1000, -1000, -2000, 3000, -3000)]
    assert noted(work) == sizes


def test_the_peak_is_that_of_old_and_new_together():
    arrays = Arrays()
    arrays.start()
    kept = np.ones(1000)
    for _ in range(3):
        kept = np.concatenate([kept, np.ones(1000)])
    arrays.stop()
    assert Ledger(lives(arrays.events)).peak_bytes == FLOAT * (3000 + 1000 + 4000)


def test_outside_of_it_nothing_is_noted_and_nobody_stands_in_between():
    kept = []
    before = rooms._get_handler()
    arrays, later = Arrays(), Arrays()
    arrays.start()
    kept.append(np.ones(1000))
    arrays.stop()
    assert rooms._get_handler() is before
    kept.append(np.ones(1000))
    later.start()
    kept.clear()
    later.stop()
    assert [event.bytes for event in arrays.events] == [FLOAT * 1000]
    assert later.events == []  # they were not seen to come
    arrays.stop()  # once more does nothing


def test_another_thread_frees_what_this_one_made():
    def work():
        kept = [np.ones(1000)]
        thread = threading.Thread(target=kept.clear)
        thread.start()
        thread.join()

    assert noted(work) == [FLOAT * 1000, -FLOAT * 1000]


def test_without_numpys_hook_nothing_is_noted(monkeypatch):
    monkeypatch.setattr(rooms, "_get_handler", None)
    assert noted(lambda: np.ones(1000)) == []


def test_a_process_that_ends_in_the_midst_of_it_ends_well():
    code = (
        "import numpy as np; from memlab.meters.arrays import Arrays; a = Arrays(); a.start();"
        " np.kept = [np.ones(10**6)]; np.kept.append(np.kept); b = np.ones(10**6)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
