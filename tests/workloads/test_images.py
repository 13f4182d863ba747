import sys

import pytest
import torch

from memlab.workloads import images


@pytest.fixture(scope="module")
def digits():
    pytest.importorskip("sklearn")
    return images.load()


def test_load_gives_images_and_labels(digits):
    assert (len(digits.train.images), len(digits.validation.images)) == (1437, 360)
    for part in digits:
        assert part.images.shape[1:] == (1, 32, 32) and part.images.dtype == torch.float32
        assert part.labels.shape == part.images.shape[:1] and part.labels.dtype == torch.int64
        assert part.images.min() == 0 and 0.9 < part.images.max() <= 1
        # Every digit is in both parts, none of them rare.
        assert part.labels.bincount(minlength=10).min() > 0.08 * len(part.labels)
        assert len(part.labels.unique()) == 10


def test_size_8_is_the_data_set_itself():
    datasets = pytest.importorskip("sklearn.datasets")
    theirs = datasets.load_digits()
    ours = images.load(8)
    together = torch.cat((ours.train.images, ours.validation.images))
    torch.testing.assert_close(
        together[:, 0] * 16, torch.tensor(theirs.images, dtype=torch.float32)
    )
    assert torch.cat((ours.train.labels, ours.validation.labels)).tolist() == theirs.target.tolist()


def test_larger_images_show_the_same(digits):
    small = images.load(8).train.images
    # The mean over each 4 x 4 square of a bilinear enlargement is near the pixel it came from.
    back = torch.nn.functional.avg_pool2d(digits.train.images, 4)
    assert (back - small).abs().mean() < 0.1
    assert (back.roll(1, 0) - small).abs().mean() > 0.15


def test_load_is_deterministic(digits):
    again = images.load(32)
    for part, same in zip(digits, again, strict=True):
        assert torch.equal(part.images, same.images) and torch.equal(part.labels, same.labels)


@pytest.mark.parametrize("size", [7, 0, -1])
def test_too_small_a_size_is_refused(size):
    with pytest.raises(ValueError, match="at least 8"):
        images.load(size)


def test_without_scikit_learn_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match="pip install scikit-learn"):
        images.load()


NUMBERED = images.Split(torch.arange(20.0).view(20, 1, 1, 1).expand(20, 1, 4, 4), torch.arange(20))


def test_batch_keeps_images_and_labels_together():
    batch, labels = images.batch(NUMBERED, 12, seed=0)
    assert batch.shape == (12, 1, 4, 4) and labels.shape == (12,)
    assert torch.equal(batch[:, 0, 0, 0].long(), labels)
    assert len(labels.unique()) == 12
    assert sorted(images.batch(NUMBERED, 20, seed=0)[1].tolist()) == list(range(20))


def test_batch_depends_on_the_seed_alone():
    _, first = images.batch(NUMBERED, 12, seed=3)
    torch.manual_seed(99)
    state = torch.get_rng_state()
    _, again = images.batch(NUMBERED, 12, seed=3, device="cpu")
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, again)
    assert not torch.equal(first, images.batch(NUMBERED, 12, seed=4)[1])


@pytest.mark.gpu
def test_batch_is_the_same_on_the_gpu():
    here, there = (
        images.batch(NUMBERED, 12, seed=3),
        images.batch(NUMBERED, 12, seed=3, device="cuda"),
    )
    assert all(part.is_cuda for part in there)
    assert all(torch.equal(a, b.cpu()) for a, b in zip(here, there, strict=True))


def test_batch_owns_its_memory(digits):
    batch, labels = images.batch(digits.train, 16, seed=0)
    assert batch.untyped_storage().nbytes() == 16 * 32 * 32 * 4
    assert labels.untyped_storage().nbytes() == 16 * 8
    batch.zero_()
    assert digits.train.images.max() > 0.9


@pytest.mark.parametrize("batch_size", [0, 21])
def test_batch_refuses_what_does_not_fit(batch_size):
    with pytest.raises(ValueError, match="from 1 to 20"):
        images.batch(NUMBERED, batch_size, seed=0)
