"""A limit where the allocator has none: what operators return is counted while they run."""

import pytest
import torch

from memlab.meters import device

CPU = torch.device("cpu")


def test_a_limit_counts_and_stops_counting():
    passed = []

    def over(asked: int, operator: str) -> RuntimeError:
        passed.append((asked, operator))
        return RuntimeError("over")

    limit = device.limit_for(CPU, device.bytes_alive(CPU) + 5000, over)
    limit.start()
    try:
        kept = torch.zeros(1000)
        with pytest.raises(RuntimeError, match="over"):
            torch.zeros(1000)
    finally:
        limit.stop()
    assert passed == [(4000, "aten.zeros")] and kept.nbytes == 4000
    assert torch.zeros(10_000).nbytes == 40_000
