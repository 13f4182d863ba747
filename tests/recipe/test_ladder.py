import importlib

import pytest

from memlab import recipe
from memlab.workloads import gpt

LINES = tuple(recipe.LADDER)


def test_each_rung_is_the_one_before_and_one_line_more():
    rungs = list(recipe.RUNGS.values())
    assert rungs[0] == () and rungs[-1] == LINES
    for before, rung in zip(rungs, rungs[1:], strict=False):
        assert rung[:-1] == before
    assert list(recipe.RUNGS)[1:] == list(LINES)
    assert set(recipe.EXACT) | set(recipe.APPROXIMATE) == set(LINES)


def test_each_line_names_a_technique_that_exists():
    for technique, shrinks in recipe.LADDER.values():
        importlib.import_module(f"memlab.techniques.{technique}")
        assert shrinks


@pytest.mark.parametrize("call", [recipe.training, lambda line: recipe.predict([line])])
def test_what_is_no_line_is_refused(call):
    with pytest.raises(ValueError, match=r"'SPDA' is no line of the ladder: SDPA, BF16 autocast"):
        call("SPDA")


def test_a_setting_left_out_is_the_ladders():
    usual = recipe.Setting()
    assert usual.config == gpt.small(layers=3, vocabulary_size=4096)
    assert (usual.batch_size, usual.sequence_length, usual.tile_words) == (2, 256, 64)
    assert recipe.Setting(micro_batch_size=8, batch_size=3).micro_batch_size == 3
    assert usual.slice_size == 2**16
