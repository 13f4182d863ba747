"""Autograd works on fake tensors of a CUDA device that is not there, and only inside."""

import pytest
import torch
from torch import nn

from memlab.meters import cuda_stand_in
from memlab.meters.fake import FakeMode

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is there")


def train_a_step():
    with torch.device("cuda"):
        model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(2, 8, device="cuda")).square().mean().backward()
    optimizer.step()
    return model, optimizer


def test_forward_backward_and_optimizer_run_on_a_device_that_is_not_there():
    # A backward of before: the engine has counted its devices by now.
    nn.Linear(2, 2)(torch.ones(1, 2)).sum().backward()
    for _ in range(2):
        with (
            cuda_stand_in.accelerator_stand_in(),
            torch.autograd.set_multithreading_enabled(False),
            FakeMode(),
        ):
            model, optimizer = train_a_step()
            weight = model[0].weight
            assert weight.grad.device == torch.device("cuda", 0)
            assert optimizer.state[weight]["exp_avg"].is_cuda
        assert torch.accelerator.current_accelerator() is None
    nn.Linear(2, 2)(torch.ones(1, 2)).sum().backward()


def test_what_is_missing_in_pytorch_is_said(monkeypatch):
    def missing(name):
        raise OSError(f"no library {name}")

    monkeypatch.setattr(cuda_stand_in, "_library", missing)
    with pytest.raises(RuntimeError, match=r"cannot predict a GPU without one.*no library c10"):
        with cuda_stand_in.accelerator_stand_in():
            pass
