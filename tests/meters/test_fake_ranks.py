"""One rank of many is predicted, and held against real ones."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from memlab import measure, predict
from memlab.meters.fake_ranks import fake_ranks
from memlab.workloads import gpt

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="needs torch.distributed")


def train(place="cpu", fused=False):
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("nccl" if place == "cuda" else "gloo")
    mesh = dist.init_device_mesh(place, (dist.get_world_size(),))
    torch.manual_seed(0)
    model = gpt.GPT(gpt.tiny(layers=4)).to(place)
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), fused=fused, foreach=False)
    while True:
        tokens = torch.randint(100, (2, 16)).to(place)
        loss = model(tokens, tokens)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        yield loss


REAL = """
import sys
import torch.distributed as dist
from memlab import watch
from tests.meters.test_fake_ranks import train

rank, world, file = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=world)
dist.init_process_group = lambda *arguments: None
with watch() as watched:
    steps = train()
    for _ in range(2):
        next(steps)
measured = watched.measurement
if rank == 0:
    columns = measured.known_columns
    gathered = [b.bytes for b in measured.ledger.blocks if "allgather" in b.operator]
    print(measured.known_bytes, columns["parameters"], columns["optimizer_state"], max(gathered))
dist.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_a_rank_needs_what_a_real_one_does(world, tmp_path):
    command = [sys.executable, "-c", REAL]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(world), str(tmp_path / "meet")],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    said = [rank.communicate()[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * world
    peak, parameters, state, gathered = map(int, said[0].split())
    prediction = predict(train, device="cpu", ranks=world, progress=False)
    assert prediction.columns["parameters"] == parameters
    assert prediction.columns["optimizer_state"] == state
    # gloo copies what it gathers. That copy is no tensor of the run, and NCCL has none.
    assert 0 <= peak - prediction.peak_bytes <= gathered


def test_what_dtensor_tries_on_whole_shapes_is_no_part_of_the_run():
    """It asks a fused AdamW once for the shapes of its results: 16 bytes for each parameter."""
    # It asks once in a process. What was asked before, in another test, is asked no more.
    DTensor._op_dispatcher.sharding_propagator.propagate_op_sharding.cache_clear()
    predicted = predict(train, fused=True, device="cpu", ranks=4, progress=False)
    with fake_ranks(4):
        measured = measure(train, fused=True, device="cpu")
    assert predicted.known_bytes == measured.known_bytes


def test_on_a_gpu_each_rank_holds_its_part():
    alone = predict(train, place="cuda", steps=1, ranks=2, progress=False)
    many = predict(train, place="cuda", steps=1, ranks=8, progress=False)
    states = [p.ledger.columns_at(p.steps[0].end)["optimizer_state"] for p in (alone, many)]
    assert 3.5 < states[0] / states[1] < 4.1  # each small tensor is rounded to 512 bytes
    assert not dist.is_initialized()


def test_inside_it_is_rank_0_of_all():
    with fake_ranks(5):
        assert (dist.get_rank(), dist.get_world_size()) == (0, 5)
        assert os.environ["WORLD_SIZE"] == "5"
        with pytest.raises(ValueError, match="in a process group already"):
            with fake_ranks(2):
                pass
    assert not dist.is_initialized() and "WORLD_SIZE" not in os.environ
    with fake_ranks(None):
        assert not dist.is_initialized()
