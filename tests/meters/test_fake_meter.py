"""A fake device has the form of the other meters."""

import copy

import pytest
import torch
from torch import nn
from torch.optim import optimizer as optimizers

from memlab.meters import fake_meter, fake_patches, live
from memlab.meters.gpus import find_gpu

GPU = find_gpu("H100 80GB")
CUDA = torch.device("cuda", 0)


def test_the_gpus_bytes_are_rounded_and_reserved_with_two_workspaces():
    meter = fake_meter.Meter(CUDA, GPU, lambda note: None)
    meter.start()
    try:
        model = nn.Linear(100, 10, device="cuda")
        model(torch.ones(3, 100, device="cuda")).sum().backward()
        held = torch.cuda.memory_allocated()
        del model
    finally:
        readings = meter.stop()
    assert readings.workspace_bytes == 2 * GPU.workspace_bytes
    # Two small tensors and two gradients, rounded to 512 bytes each.
    assert held - readings.workspace_bytes == 2 * 4096 + 2 * 512
    assert all(event.bytes % 512 == 0 for event in readings.events)
    # The small ones lie in one segment of 2 MiB.
    assert readings.reserved_bytes == readings.workspace_bytes + 2**21
    assert any(span.kind == "backward" for span in readings.spans)
    assert {seen.dtype for seen in readings.observations} == {"float32"}


def test_all_is_as_before_afterwards_exceptions_included():
    with pytest.raises(ZeroDivisionError):
        with fake_patches.fake_tensors_taken():
            raise ZeroDivisionError
    for _ in range(2):
        meter = fake_meter.Meter(CUDA, GPU, lambda note: None)
        meter.start()
        meter.stop()
    assert live.made_up_address is None
    assert type(torch.ones(1)) is torch.Tensor
    assert torch.cuda.is_available() == torch.cuda.is_initialized()


def test_optimizers_step_all_parameters_at_once_as_they_do_on_a_gpu():
    meter = fake_meter.Meter(CUDA, GPU, lambda note: None)
    meter.start()
    try:
        weight = nn.Parameter(torch.ones(4, device="cuda"))
        taken, foreach = optimizers._default_to_fused_or_foreach([weight], False)
    finally:
        meter.stop()
    assert (taken, foreach) == (False, True)


def test_copies_of_the_random_state_are_noted():
    meter = fake_meter.Meter(torch.device("cpu"), None, lambda note: None)
    meter.start()
    try:
        state = torch.get_rng_state()
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(state)
    finally:
        readings = meter.stop()
    made = [event.bytes for event in readings.events if event.bytes > 0]
    assert made.count(state.nbytes) == 2


def test_a_model_can_be_copied():
    """`copy.deepcopy` copies storages, as `nn.TransformerEncoder` does with its layers."""
    meter = fake_meter.Meter(torch.device("cpu"), None, lambda note: None)
    meter.start()
    try:
        model = nn.Linear(4, 4, bias=False)
        copied = copy.deepcopy(model)
        assert copied.weight.device == model.weight.device and copied.weight is not model.weight
    finally:
        meter.stop()
