"""`torch.cuda` as it would answer beside a GPU that is not there."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from unittest import mock

import torch

from memlab.meters.gpus import GPU


class _Stream(contextlib.AbstractContextManager):
    """A CUDA stream or event: whatever it is asked, it does nothing."""

    device = torch.device("cuda", 0)
    device_index = 0
    cuda_stream = stream_id = 0
    priority = 0

    def __init__(self, *arguments: object, **keywords: object):
        pass

    def __exit__(self, *exception: object) -> None:
        return None

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: object) -> float:
        return 0.0

    def record_event(self, event: object = None) -> _Stream:
        return event if event is not None else _Stream()

    def _nothing(self, *arguments: object, **keywords: object) -> None:
        return None

    synchronize = wait_stream = wait_event = record = wait = _nothing


_PLAIN_GENERATOR = torch.Generator


class _Generators(type(_PLAIN_GENERATOR)):
    def __instancecheck__(cls, value: object) -> bool:
        return isinstance(value, _PLAIN_GENERATOR)


class _Generator(_PLAIN_GENERATOR, metaclass=_Generators):
    """A GPU's random generator: one of the host's, from which no number is drawn."""

    def __new__(cls, device: object = "cpu") -> torch.Generator:
        on_gpu = torch.device(device).type == "cuda"
        return super().__new__(cls, "cpu" if on_gpu else device)


@contextlib.contextmanager
def torch_cuda_stand_in(gpu: GPU, memory: Callable[[], SimpleNamespace]) -> Iterator[None]:
    """Have `torch.cuda` describe one GPU, and count what is predicted for it.

    Args:
        gpu: the GPU.
        memory: what the allocator holds now: `allocated`, `reserved`, `peak_allocated`,
            `peak_reserved` (bytes) and `empty_cache()`, `reset_peak()`.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(torch, "Generator", _Generator))
        answers = {**_device(gpu), **_memory(gpu, memory), **_random()}
        for name, answer in answers.items():
            if hasattr(torch.cuda, name):
                stack.enter_context(mock.patch.object(torch.cuda, name, answer))
        yield


def _device(gpu: GPU) -> dict[str, object]:
    major, minor = gpu.architecture or (9, 0)
    properties = SimpleNamespace(
        name=gpu.name,
        total_memory=gpu.memory_bytes,
        major=major,
        minor=minor,
        multi_processor_count=gpu.multiprocessors or 132,
        is_integrated=False,
        gcnArchName="",
    )

    def nothing(*arguments: object, **keywords: object) -> None:
        return None

    return {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_name": lambda device=None: gpu.name,
        "get_device_capability": lambda device=None: (major, minor),
        "get_device_properties": lambda device=None: properties,
        "is_bf16_supported": lambda including_emulation=True: (
            major >= 8 or bool(including_emulation)
        ),
        "init": nothing,
        "_lazy_init": nothing,
        "set_device": nothing,
        "synchronize": nothing,
        "device": _Stream,
        "Stream": _Stream,
        "Event": _Stream,
        "stream": _Stream,
        "current_stream": lambda device=None: _Stream(),
        "default_stream": lambda device=None: _Stream(),
        "set_stream": nothing,
    }


def _memory(gpu: GPU, memory: Callable[[], SimpleNamespace]) -> dict[str, object]:
    def free_and_all(device: object = None) -> tuple[int, int]:
        return gpu.memory_bytes - gpu.context_bytes - memory().reserved, gpu.memory_bytes

    def reset(device: object = None) -> None:
        memory().reset_peak()

    return {
        "memory_allocated": lambda device=None: memory().allocated,
        "max_memory_allocated": lambda device=None: memory().peak_allocated,
        "memory_reserved": lambda device=None: memory().reserved,
        "max_memory_reserved": lambda device=None: memory().peak_reserved,
        "empty_cache": lambda: memory().empty_cache(),
        "reset_peak_memory_stats": reset,
        "mem_get_info": free_and_all,
    }


def _random() -> dict[str, object]:
    def nothing(*arguments: object, **keywords: object) -> None:
        return None

    return {
        "manual_seed": nothing,
        "manual_seed_all": nothing,
        "seed": nothing,
        "seed_all": nothing,
        "get_rng_state": lambda device="cuda": torch.zeros(16, dtype=torch.uint8),
        "get_rng_state_all": lambda: [torch.zeros(16, dtype=torch.uint8)],
        "set_rng_state": nothing,
        "set_rng_state_all": nothing,
    }
