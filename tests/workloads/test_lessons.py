"""What the lessons train has GPT-2's shape at every size."""

import pytest
import torch

from memlab.workloads import lessons


@pytest.mark.parametrize(
    ("scale", "size"),
    [
        ("cpu", lessons.SMALL),
        ("t4", lessons.GPT2_124M_IN_SHORT),
        ("gpu", lessons.GPT2_124M),
        ("large", lessons.GPT2_124M),
    ],
)
def test_the_device_chooses_the_size(scale, size, monkeypatch):
    monkeypatch.setattr(lessons, "scale", lambda: type("Scale", (), {"name": scale}))
    assert lessons.size() is size


def test_the_same_tensors_are_large_in_both():
    small, large = lessons.SMALL, lessons.GPT2_124M
    for name in ("layers", "vocabulary_size"):
        assert getattr(small.config, name) / getattr(large.config, name) == pytest.approx(
            1 if name == "layers" else small.config.hidden / large.config.hidden, rel=0.03
        )
    scores = [size.config.heads * size.sequence / size.config.hidden for size in (small, large)]
    assert scores == [16, 16]


def test_a_batch_has_the_targets_one_token_later():
    tokens, targets = lessons.random_batch(lessons.SMALL)
    assert tokens.shape == targets.shape == (4, 256)
    assert torch.equal(tokens[:, 1:], targets[:, :-1])
    assert "3,460,864 parameters" in str(lessons.SMALL)
