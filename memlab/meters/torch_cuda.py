"""`torch.cuda` as it would answer beside a GPU that is not there."""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from unittest import mock

import torch
import torch.cuda.nvtx

from memlab.meters.gpus import GPU
from memlab.units import format_bytes


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
        for place, found in (
            (torch.cuda, answers),
            (torch.cuda.memory, answers | _history()),
            (torch.cuda.nvtx, dict.fromkeys(("mark", "range_push", "range_pop", "range"), _Stream)),
            (torch.accelerator, _memory(gpu, memory)),
            (torch.Tensor, {"record_stream": _nothing}),
        ):
            for name, answer in found.items():
                if hasattr(place, name):
                    stack.enter_context(mock.patch.object(place, name, answer))
        yield


def _nothing(*arguments: object, **keywords: object) -> None:
    return None


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
        "init": _nothing,
        "_lazy_init": _nothing,
        "set_device": _nothing,
        "synchronize": _nothing,
        "device": _Stream,
        "Stream": _Stream,
        "Event": _Stream,
        "stream": _Stream,
        "current_stream": lambda device=None: _Stream(),
        "default_stream": lambda device=None: _Stream(),
        "set_stream": _nothing,
        "ipc_collect": _nothing,
        "is_current_stream_capturing": lambda: False,
        "set_per_process_memory_fraction": _nothing,
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
        "reset_max_memory_allocated": reset,
        "mem_get_info": free_and_all,
        "memory_stats": lambda device=None: _statistics(memory()),
        "memory_summary": lambda device=None, abbreviated=False: _summary(memory()),
    }


def _statistics(memory: SimpleNamespace) -> dict[str, int]:
    """The allocator's numbers by PyTorch's names; the others are 0."""
    found = collections.defaultdict(int)
    for name in ("allocated", "reserved"):
        found[f"{name}_bytes.all.current"] = getattr(memory, name)
        found[f"{name}_bytes.all.peak"] = getattr(memory, f"peak_{name}")
    return found


def _summary(memory: SimpleNamespace) -> str:
    now = f"allocated {format_bytes(memory.allocated)}, reserved {format_bytes(memory.reserved)}"
    most = f"{format_bytes(memory.peak_allocated)} and {format_bytes(memory.peak_reserved)}"
    return f"predicted: {now}; at most {most}"


def _history() -> dict[str, object]:
    """Nothing is recorded of a device that is not there."""
    return {"_record_memory_history": _nothing, "_dump_snapshot": _nothing}


def _random() -> dict[str, object]:
    return {
        "manual_seed": _nothing,
        "manual_seed_all": _nothing,
        "seed": _nothing,
        "seed_all": _nothing,
        "get_rng_state": lambda device="cuda": torch.zeros(16, dtype=torch.uint8),
        "get_rng_state_all": lambda: [torch.zeros(16, dtype=torch.uint8)],
        "set_rng_state": _nothing,
        "set_rng_state_all": _nothing,
    }
