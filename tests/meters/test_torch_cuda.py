"""`torch.cuda` describes a GPU that is not there, and only inside."""

from types import SimpleNamespace

import torch

from memlab.meters.gpus import find_gpu
from memlab.meters.torch_cuda import torch_cuda_stand_in


def test_it_answers_for_the_gpu_and_then_no_more():
    gpu = find_gpu("T4")
    memory = SimpleNamespace(
        allocated=5,
        reserved=7,
        peak_allocated=11,
        peak_reserved=13,
        empty_cache=lambda: None,
        reset_peak=lambda: None,
    )
    available = torch.cuda.is_available()
    with torch_cuda_stand_in(gpu, lambda: memory):
        assert torch.cuda.is_available() and torch.cuda.device_count() == 1
        assert torch.cuda.get_device_name() == gpu.name
        assert torch.cuda.get_device_capability() == (7, 5)
        assert torch.cuda.get_device_properties(0).total_memory == gpu.memory_bytes
        assert torch.cuda.memory_allocated() == 5 and torch.cuda.max_memory_reserved() == 13
        free, total = torch.cuda.mem_get_info()
        assert total - free == gpu.context_bytes + 7
        assert torch.cuda.memory_stats()["allocated_bytes.all.peak"] == 11
        assert torch.cuda.memory.memory_reserved() == 7
        assert "reserved 7 B" in torch.cuda.memory_summary()
        with torch.cuda.stream(torch.cuda.Stream()):
            event = torch.cuda.Event()
            event.record()
            torch.cuda.current_stream().wait_event(event)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.ipc_collect()
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.memory._record_memory_history()
        with torch.cuda.nvtx.range("forward"):
            torch.cuda.nvtx.mark("here")
    assert torch.cuda.is_available() == available
