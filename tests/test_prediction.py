"""Whether it fits, in words and in numbers."""

import pytest
import torch
from torch import nn

from memlab import compare, measure, predict
from memlab.meters.gpus import find_gpu
from memlab.units import GiB, MiB


def train():
    model = nn.Linear(1000, 1000, bias=False).cuda()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    while True:
        loss = model(torch.randn(8, 1000, device="cuda")).mean()
        loss.backward()
        optimizer.step()
        yield loss


@pytest.fixture(scope="module")
def prediction():
    return predict(train, gpu="T4", progress=False)


def test_it_fits_by_what_the_process_needs(prediction):
    gpu = find_gpu("T4")
    fit = prediction.fits()
    assert fit and fit.gpu == gpu.name
    assert prediction.process_bytes == prediction.reserved_bytes + gpu.context_bytes
    assert fit.needed_bytes == prediction.process_bytes
    assert fit.free_bytes == gpu.memory_bytes
    assert fit.margin_bytes == gpu.memory_bytes - prediction.process_bytes
    assert str(fit).startswith("fits Tesla T4: ") and str(fit).endswith("left (predicted)")


def test_what_others_use_counts(prediction):
    assert prediction.fits("2 GiB")
    refused = prediction.fits("2 GiB", in_use="1.9 GiB")
    assert not refused and refused.free_bytes == 2 * GiB - int(1.9 * GiB)
    assert str(refused).startswith("does not fit ") and "too much (predicted)" in str(refused)


def test_the_workspaces_are_those_of_the_gpu_that_is_asked_for(prediction):
    larger = find_gpu("H100 80GB").workspace_bytes - find_gpu("T4").workspace_bytes
    fit = prediction.fits("H100 80GB")
    assert fit.reserved_bytes - prediction.reserved_bytes == 2 * larger


def test_an_unknown_gpu_is_refused(prediction):
    with pytest.raises(ValueError, match="RTX 4090"):
        prediction.fits("RTX 4091")


def test_it_is_called_a_prediction(prediction):
    assert str(prediction).startswith("Predicted peak ")
    assert "CUDA's context is an estimate" in str(prediction)
    assert "for Tesla T4" in str(prediction)


def test_beside_a_measurement_it_is_outlined_and_called_predicted(prediction):
    def at_home():
        model = nn.Linear(1000, 1000, bias=False)
        while True:
            loss = model(torch.randn(8, 1000)).mean()
            loss.backward()
            yield loss

    compared = compare(measure(at_home, device="cpu"), prediction)
    assert [variant.name for variant in compared.variants] == ["before", "after, predicted"]
    assert "peak MiB" in compared.to_frame() and "measured MiB" not in compared.to_frame()
    assert compared.verdict.endswith(" (predicted)")
    figure = compared.plot()
    bars = [patch for patch in figure.axes[0].patches if patch.get_width()]
    widths = {round(patch.get_linewidth(), 1) for patch in bars}
    assert widths == {0.6, 1.2}  # filled and outlined
    assert "after, predicted" in figure.alt
    below = {axes.get_title(loc="left"): axes.get_xlabel() for axes in figure.axes[1:]}
    assert "seconds" in below["before"] and "no time" in below["after, predicted"]


def test_what_is_only_cached_is_given_back_before_it_fails():
    def train():
        weight = torch.nn.Parameter(torch.ones(1, device="cuda"))
        while True:
            for megabytes in (32, 64):
                blocks = [torch.empty(megabytes * MiB, dtype=torch.uint8, device="cuda")]
                blocks += [torch.empty_like(blocks[0]) for _ in range(640 // megabytes - 1)]
                del blocks
            loss = weight.sum()
            loss.backward()
            yield loss

    prediction = predict(train, gpu="T4", progress=False)
    context = prediction.gpu.context_bytes
    assert prediction.allocated_bytes < 641 * MiB < 1280 * MiB <= prediction.reserved_bytes
    assert prediction.fits(1290 * MiB + context) and not prediction.fits(600 * MiB + context)
    fit = prediction.fits(800 * MiB + context)
    assert fit and fit.gives_back and "cached blocks" in str(fit)
    assert 640 * MiB <= fit.reserved_bytes <= 800 * MiB
    assert fit.needed_bytes == fit.reserved_bytes + context
