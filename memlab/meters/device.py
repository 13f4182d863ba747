"""Which device is measured. What differs from device to device stands in its own file.

Each of these files (`cpu`, `cuda`) has the same names: `Meter` (start, stop -> `Readings`), `Limit`
(for a budget), `resolve`, `synchronize`, `bytes_alive`, `free_bytes`, `has_own_memory`,
`properties`, `room_for` and `describe`. A new device is one file more, and one line here.
"""

from __future__ import annotations

import gc
import platform
from collections.abc import Callable
from types import ModuleType

import torch

from memlab.meters import cpu, cuda

_FILES: dict[str, ModuleType] = {"cpu": cpu, "cuda": cuda}


def resolve_device(device: str | torch.device | None = None) -> torch.device:
    """Return the device to measure: by default the current CUDA device, or the CPU without one.

    Raises:
        ValueError: the device is not there, or memlab has no meter for it.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f'{device!r} is not a device. Write "cpu" or "cuda"') from error
    if device.type == "meta":
        raise ValueError(
            'the "meta" device has no memory: nothing can be measured on it. Use "cpu" or "cuda"'
        )
    if device.type not in _FILES:
        raise ValueError(f'memlab has no meter for {device.type!r}. Use "cpu" or "cuda"')
    return _FILES[device.type].resolve(device)


def meter_for(device: torch.device) -> cpu.Meter | cuda.Meter:
    """Return a meter for a device that `resolve_device` gave."""
    return _FILES[device.type].Meter(device)


def limit_for(
    device: torch.device, limit: int, passed: Callable[[int, str], BaseException]
) -> cpu.Limit | cuda.Limit:
    """Return what holds a device to `limit` bytes; `passed` makes the error where it can."""
    return _FILES[device.type].Limit(device, limit, passed)


def synchronize(device: torch.device) -> None:
    """Wait until a device has done what it was asked for."""
    _FILES[device.type].synchronize(device)


def bytes_alive(device: torch.device | str) -> int:
    """Return the bytes that count against a budget now: live tensors' storages on the CPU, what the
    allocator holds from the driver on CUDA.
    """
    device = resolve_device(device)
    for _ in range(5):  # what one collection frees may set more free
        if not gc.collect():
            break
    return _FILES[device.type].bytes_alive(device)


def free_bytes(device: torch.device) -> tuple[int, int] | None:
    """Return a device's free bytes and all its bytes; None where nobody knows."""
    return _FILES[device.type].free_bytes(device)


def has_own_memory(device: torch.device) -> bool:
    """Return whether a device has memory beside the host's, as a GPU has: what is in the one may be
    under way to the other while the device computes. The device itself need not be there.
    """
    return _FILES[device.type].has_own_memory()


def properties(device: torch.device) -> dict[str, object]:
    """Return a GPU's `name`, `memory_bytes` and `native_bfloat16`; None for each on the CPU."""
    return _FILES[device.type].properties(device)


def room_for(limit: int, device: torch.device) -> int:
    """Return the budget in which `limit` bytes of tensors fit, whatever the allocator wastes."""
    return _FILES[device.type].room_for(limit)


def environment(device: str | torch.device | None = None) -> dict[str, object]:
    """Return what a number depends on: device, GPU, its bytes, torch, driver, Python, threads."""
    device = resolve_device(device)
    described = _FILES[device.type].describe(device)
    return {
        "device": device.type,
        "gpu": described["gpu"],
        "gpu_bytes": described["gpu_bytes"],
        "torch": torch.__version__,
        "driver": described["driver"],
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
    }
