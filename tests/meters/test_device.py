"""Which device is measured, and that every device answers the same questions."""

import platform
import sys

import pytest
import torch

from memlab.meters import cpu, cuda, device

CPU = torch.device("cpu")


def test_every_device_has_the_same_names():
    assert set(cpu.__all__) == set(cuda.__all__)
    for module in (cpu, cuda):
        for name in module.__all__:
            assert callable(getattr(module, name)), (module.__name__, name)
        for name in ("start", "stop"):
            assert hasattr(module.Meter, name) and hasattr(module.Limit, name)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("gpu", "is not a device"),
        ("meta", "has no memory"),
        ("mps", "no meter for 'mps'"),
        (3.5, "is not a device"),
    ],
)
def test_a_device_that_is_none(given, message):
    with pytest.raises(ValueError, match=message):
        device.resolve_device(given)


def test_the_cpu_has_no_index():
    assert device.resolve_device("cpu:0") == CPU
    if not torch.cuda.is_available():
        assert device.resolve_device() == CPU


def test_bytes_alive_follow_a_tensor():
    before = device.bytes_alive("cpu")
    kept = torch.zeros(1000)
    assert device.bytes_alive("cpu") == before + kept.nbytes
    assert device.room_for(1000, CPU) == 1000


def test_free_bytes_are_a_part_of_all_bytes(monkeypatch):
    free, total = device.free_bytes(CPU)
    assert 0 < free < total
    monkeypatch.setitem(sys.modules, "psutil", None)
    assert device.free_bytes(CPU) is None


def test_a_gpu_that_is_not_there_has_memory_of_its_own():
    assert device.has_own_memory(torch.device("cuda")) and not device.has_own_memory(CPU)
    assert set(device.properties(CPU).values()) == {None}


def test_the_environment():
    about = device.environment("cpu")
    assert about["device"] == "cpu" and about["gpu"] is None and about["driver"] is None
    assert about["torch"] == torch.__version__ and about["python"] == platform.python_version()
