"""A GPU's bytes: the history that the allocator records, made by hand here; on a GPU also the real
one.
"""

import inspect

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from memlab import budget, measure, watch
from memlab.ledger import COLUMNS, Event, build_ledger
from memlab.meters.cuda import (
    _MAX_ENTRIES,
    Meter,
    clear_workspaces,
    workspace_bytes,
)
from memlab.workloads import gpt

MiB = 2**20
CUDA = torch.device("cuda", 0)


def gpu(test):
    """Marks a test that needs a CUDA device. Where there is none it is skipped, and says so."""
    reason = "needs a CUDA device, and torch sees none here"
    return pytest.mark.gpu(pytest.mark.skipif(not torch.cuda.is_available(), reason=reason)(test))


# Without a GPU ------------------------------------------------------------------------------------


def test_what_the_gpus_meter_calls_takes_the_arguments_that_it_gives():
    """The history is private in PyTorch, and cannot run here: at least the names and arguments are
    there.
    """
    history = inspect.signature(torch.cuda.memory._record_memory_history)
    assert {"enabled", "context", "max_entries"} <= history.parameters.keys()
    assert "device" in inspect.signature(torch.cuda.memory._snapshot).parameters
    for name in (
        "empty_cache",
        "max_memory_allocated",
        "max_memory_reserved",
        "mem_get_info",
        "memory_allocated",
        "memory_reserved",
        "memory_snapshot",
        "reset_peak_memory_stats",
        "set_per_process_memory_fraction",
        "get_per_process_memory_fraction",
        "synchronize",
        "get_device_properties",
    ):
        assert callable(getattr(torch.cuda, name)), name


def test_clearing_workspaces_does_nothing_where_there_is_no_gpu():
    if torch.cuda.is_available():
        pytest.skip("a CUDA device is there")
    clear_workspaces()
    assert not torch.cuda.is_initialized()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is there")
@pytest.mark.parametrize(
    "use", [lambda: measure(lambda: print, device="cuda"), lambda: watch(device="cuda")]
)
def test_a_gpu_that_is_not_there_is_an_error_and_never_a_zero(use):
    """`torch.cuda.max_memory_allocated()` returns 0 without a GPU."""
    with pytest.raises(ValueError, match="no CUDA device is there"):
        use()


# On a GPU -----------------------------------------------------------------------------------------


def build(batch: int = 8):
    """A training step of a small GPT; its first step makes all the state there is."""

    def inner():
        torch.manual_seed(0)
        model = gpt.GPT(gpt.small(layers=4)).to(CUDA)
        optimizer = torch.optim.AdamW(model.parameters())
        tokens = torch.randint(256, (batch, 257), device=CUDA)

        def step():
            optimizer.zero_grad()
            loss = model(tokens[:, :-1], tokens[:, 1:].contiguous())
            loss.backward()
            optimizer.step()
            return loss.detach()

        return step

    return inner


@pytest.fixture
def warm():
    """The first matrix product of a process makes cuBLAS's handles, which no later run
    makes again.
    """
    build()()()
    torch.cuda.synchronize()
    yield
    torch.cuda.empty_cache()


def history_is_off() -> bool:
    return not torch._C._cuda_isHistoryEnabled()


@gpu
def test_the_peak_is_the_rise_of_the_allocators_counter(warm):
    measured = measure(build(), device="cuda")
    clear_workspaces()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(CUDA)
    torch.cuda.reset_peak_memory_stats(CUDA)
    step = build()()
    step()
    step()
    assert measured.workspace_bytes == workspace_bytes(CUDA) > 0
    assert (
        measured.peak_bytes + measured.workspace_bytes
        == torch.cuda.max_memory_allocated(CUDA) - before
    )


@gpu
def test_the_columns_sum_to_the_peak_and_little_is_left_over(warm):
    measured = measure(build(), device="cuda")
    assert tuple(measured.columns) == COLUMNS
    assert sum(measured.columns.values()) == measured.peak_bytes
    assert measured.columns["unattributed"] < 0.02 * measured.peak_bytes
    assert measured.environment["device"] == "cuda" and measured.environment["gpu"]


@gpu
def test_parameters_are_exact_up_to_the_allocators_rounding(warm):
    measured = measure(build(), device="cuda")
    torch.manual_seed(0)
    parameters = {
        p.untyped_storage().data_ptr(): p for p in gpt.GPT(gpt.small(layers=4)).parameters()
    }.values()
    rounded = sum(-(-p.numel() * 4 // 512) * 512 for p in parameters)
    assert measured.columns["parameters"] == rounded
    assert measured.columns["optimizer_state"] >= 2 * sum(p.numel() * 4 for p in parameters)


@gpu
def test_the_same_run_gives_the_same_bytes(warm):
    first, again = measure(build(), device="cuda"), measure(build(), device="cuda")
    assert first.peak_bytes == again.peak_bytes
    assert {k: v for k, v in first.columns.items()} == {k: v for k, v in again.columns.items()}


@gpu
def test_three_numbers_are_shown_and_never_mixed_up(warm):
    measured = measure(build(), device="cuda")
    assert measured.peak_bytes <= measured.reserved_bytes <= measured.device_bytes
    assert measured.device_bytes <= torch.cuda.get_device_properties(CUDA).total_memory
    for word in ("allocated", "reserved", "device"):
        assert word in str(measured)


@gpu
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_the_history_is_switched_off_afterwards_whatever_happens(warm, error):
    def failing():
        step = build()()

        def fail():
            step()
            raise error("no")

        return fail

    assert history_is_off()
    measure(build(), device="cuda")
    assert history_is_off()
    with pytest.raises(error):
        measure(failing, device="cuda")
    assert history_is_off()


@gpu
def test_the_history_is_bounded(warm, monkeypatch):
    """An overrun is not a wrong number: the counter's peak stays, and all of it is unattributed."""
    whole = measure(build(), device="cuda")
    monkeypatch.setattr("memlab.meters.cuda._MAX_ENTRIES", 100)
    cut = measure(build(), device="cuda")
    assert cut.peak_bytes == cut.columns["unattributed"] == whole.peak_bytes
    assert _MAX_ENTRIES > 100


@gpu
def test_watch_counts_what_was_there_before(warm):
    model = nn.Linear(1024, 1024, device=CUDA)
    optimizer = torch.optim.AdamW(model.parameters())
    inputs = torch.randn(64, 1024, device=CUDA)

    def loop():
        optimizer.zero_grad()
        model(inputs).mean().backward()
        optimizer.step()

    loop()
    clear_workspaces()
    with watch(model, optimizer) as w:
        loop()
    found = w.measurement
    assert found.columns["parameters"] == 1024 * 1024 * 4 + 1024 * 4
    assert found.columns["optimizer_state"] >= 2 * 1024 * 1024 * 4
    assert sum(found.columns.values()) == found.peak_bytes
    assert 0 < found.workspace_bytes <= workspace_bytes(CUDA)
    assert found.peak_bytes + found.workspace_bytes == torch.cuda.max_memory_allocated(CUDA)


@gpu
def test_a_model_on_the_cpu_is_refused_when_the_gpu_is_measured(warm):
    def on_the_cpu():
        model, inputs = nn.Linear(8, 8), torch.randn(4, 8)
        return lambda: model(inputs).mean().backward()

    with pytest.raises(ValueError, match="are on cpu, but cuda:0 is measured"):
        measure(on_the_cpu, device="cuda")


@gpu
def test_the_budget_raises_on_the_gpu_as_on_the_cpu(warm):
    torch.cuda.empty_cache()
    fraction = torch.cuda.get_per_process_memory_fraction(CUDA)
    with pytest.raises(torch.OutOfMemoryError) as caught:
        with budget(torch.cuda.memory_reserved(CUDA) + 64 * MiB, device="cuda"):
            build(batch=1024)()()
    message = str(caught.value)
    assert "out of memory: the budget is" in message
    assert "together, by column: " in message and "parameters" in message
    assert "The largest column is" in message and "Try " in message
    assert "An operator in " in message  # the module, as far as it had got
    assert torch.cuda.get_per_process_memory_fraction(CUDA) == fraction
    build(batch=64)()()  # and the limit is gone


@gpu
def test_a_budget_that_is_kept_changes_nothing(warm):
    free = measure(build(), device="cuda")
    with budget("4 GiB", device="cuda"):
        kept = measure(build(), device="cuda")
    # A large block that is free may be handed out whole, if less than 1 MiB of it would be left
    # over.
    assert abs(kept.peak_bytes - free.peak_bytes) <= 2 * MiB


@gpu
def test_a_budget_below_what_is_alive(warm):
    held = torch.ones(64 * MiB, device=CUDA)
    with pytest.raises(ValueError, match="below what is alive already"):
        with budget("32 MiB", device="cuda"):
            pass
    del held


@gpu
def test_the_trace_sees_a_known_allocation():
    meter = Meter(CUDA)
    meter.start()
    held = torch.empty(1000, dtype=torch.uint8, device=CUDA)
    address = held.data_ptr()
    del held
    readings = meter.stop()
    assert [(e.address, e.bytes) for e in readings.events if e.address == address] == [
        (address, 1024),
        (address, -1024),
    ]
    assert readings.complete


@gpu
def test_checkpointing_shows_in_the_columns(warm):
    from torch.utils.checkpoint import checkpoint

    def layers(run):
        def inner():
            torch.manual_seed(0)
            blocks = nn.ModuleList(
                nn.Sequential(nn.Linear(256, 1024), nn.GELU(), nn.Linear(1024, 256))
                for _ in range(6)
            )
            blocks, inputs = blocks.to(CUDA), torch.randn(4096, 256, device=CUDA)

            def step():
                x = inputs
                for block in blocks:
                    x = run(block, x)
                F.mse_loss(x, inputs).backward()

            return step

        return inner

    plain = measure(layers(lambda block, x: block(x)), device="cuda")
    saved = measure(
        layers(lambda block, x: checkpoint(block, x, use_reentrant=False)), device="cuda"
    )
    assert saved.columns["activations"] < plain.columns["activations"] / 2
