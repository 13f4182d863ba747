"""Code that asks fake tensors and their storages where they are goes on; and what goes to the host
is predicted there.
"""

import contextlib

import torch

from memlab import predict
from memlab.techniques.offloading import (
    offload_activations,
    offload_optimizer_state,
    stream_parameters,
)
from memlab.workloads import gpt

CONFIG = gpt.tiny(layers=4)


def predicted(state=False, activations=""):
    def train():
        model = gpt.GPT(CONFIG).cuda()
        optimizer = torch.optim.AdamW(model.parameters())
        if state:
            offload_optimizer_state(optimizer)
        far = {
            "": contextlib.nullcontext,
            "ours": lambda: offload_activations(model, min_bytes=1024),
            "PyTorch's": lambda: torch.autograd.graph.save_on_cpu(pin_memory=True),
        }[activations]
        far = far()
        while True:
            tokens = torch.randint(100, (8, 64)).cuda()
            with far:
                loss = model(tokens, tokens)
            loss.backward()
            optimizer.step()
            model.zero_grad()
            yield loss

    return predict(train, progress=False)


def test_the_optimizers_state_is_on_the_host_where_it_was_offloaded():
    near, far = predicted(), predicted(state=True)
    moved = near.columns["optimizer_state"] - far.columns["optimizer_state"]
    assert moved > 2**20
    # On the host also a step count for each parameter.
    counts = 4 * len(list(gpt.GPT(CONFIG).parameters()))
    assert far.host_columns["optimizer_state"] == moved + counts
    assert near.host_columns["optimizer_state"] == 0


def test_activations_go_to_the_host_by_ours_and_by_pytorchs_means():
    near = predicted()
    for means in ("ours", "PyTorch's"):
        far = predicted(activations=means)
        assert far.peak_bytes < near.peak_bytes / 2
        assert far.host_bytes > near.columns["activations"]


def test_storages_say_where_they_would_be_and_then_no_more():
    found = []

    def train():
        numbers = torch.ones(10, device="cuda")
        other = torch.ones(10)
        for tensor in (numbers, other):
            storage = tensor.untyped_storage()
            found.append((storage.device.type, storage.is_cuda))
            assert storage.data_ptr() == tensor.data_ptr() == tensor[1:].data_ptr() - 4
        assert numbers.data_ptr() != other.data_ptr()
        assert torch.ones(4).pin_memory().is_pinned() and not other.is_pinned()
        assert torch.empty(4, pin_memory=True).is_pinned()
        again = torch.empty(0, device="cuda").set_(numbers.untyped_storage(), 0, (10,), (1,))
        assert again.data_ptr() == numbers.data_ptr()
        yield numbers.sum()

    prediction = predict(train, steps=1, progress=False)
    assert found == [("cuda", True), ("cpu", False)]
    assert prediction.ledger.columns_at(prediction.ledger.end - 1)["temporaries"] == 0
    real = torch.ones(3).untyped_storage()
    assert real.device.type == "cpu" and real.data_ptr() > 2**12


def test_streamed_parameters_their_gradients_and_state_are_on_the_host():
    def train():
        model = gpt.GPT(CONFIG).cuda()
        stream_parameters(model.blocks, min_bytes=2**13)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        while True:
            tokens = torch.randint(100, (8, 64)).cuda()
            with offload_activations(model, min_bytes=1024):
                loss = model(tokens, tokens)
            loss.backward()
            optimizer.step()
            model.zero_grad()
            yield loss

    streamed = sum(
        parameter.nbytes
        for parameter in gpt.GPT(CONFIG).blocks.parameters()
        if parameter.nbytes >= 2**13
    )
    far = predict(train, progress=False).host_columns
    assert far["parameters"] == far["optimizer_state"] == streamed
    assert far["gradients"] == streamed


def test_a_peak_that_the_run_sets_back_is_told_from_there_on():
    told = []

    def train():
        weight = torch.nn.Parameter(torch.ones(256, device="cuda"))
        large = torch.ones(2**20, device="cuda")
        del large
        told.append(torch.cuda.max_memory_allocated())
        torch.cuda.reset_peak_memory_stats()
        told.append(torch.cuda.max_memory_allocated())
        loss = weight.sum()
        loss.backward()
        yield loss

    prediction = predict(train, steps=1, gpu="T4", progress=False)
    assert told == [1024 + 2**22, 1024]
    assert prediction.allocated_bytes >= 1024 + 2**22


def test_there_are_no_values_for_numpy_and_none_to_save(tmp_path):
    def train():
        weight = torch.nn.Parameter(torch.ones(3, device="cuda"))
        values = weight.detach().cpu().numpy()
        assert values.shape == (3,) and not values.any()
        torch.save({"weight": weight}, tmp_path / "weights.pt")
        loss = weight.sum()
        loss.backward()
        yield loss

    prediction = predict(train, steps=1, gpu="T4", progress=False)
    assert not list(tmp_path.iterdir())
    assert any(".numpy()" in note for note in prediction.notes)
    assert any("torch.save() saved nothing" in note for note in prediction.notes)
    assert torch.ones(1).numpy() == 1
