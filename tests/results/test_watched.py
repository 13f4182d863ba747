"""The runs of a watched loop, kept in files."""

import pytest

from memlab.results.watched import WatchedRun, folder_of, keep_watched, load_watched
from tests.records import ENVIRONMENT, GPU


def watched(environment=ENVIRONMENT, **changes):
    numbers = dict(
        steps=1000,
        layers=8,
        width=64,
        batch=64,
        seconds_a_step=0.002,
        watched_seconds_a_step=0.003,
        enter_seconds=0.5,
        exit_seconds=1.0,
        resident_bytes=2**20,
        recorded=30,
        verdict="Steady.",
        environment=environment,
    )
    return WatchedRun(**numbers | changes)


def test_a_run_takes_the_place_of_an_older_one_of_the_same_loop(tmp_path):
    assert load_watched(tmp_path) == []
    long, short, newer = watched(steps=5000), watched(), watched(recorded=31)
    on_gpu = watched(GPU)
    for run in (long, short, newer, on_gpu):
        path = keep_watched(tmp_path, run)
    assert path.parent == folder_of(tmp_path)
    assert load_watched(tmp_path) == [newer, long, on_gpu]
    assert len(list(folder_of(tmp_path).iterdir())) == 2


def test_a_file_that_is_not_valid_is_named(tmp_path):
    path = keep_watched(tmp_path, watched())
    path.write_text(path.read_text().replace("1000", "0"))
    with pytest.raises(ValueError, match=r"cpu\.json: runs\[0\]\.steps"):
        load_watched(tmp_path)
