"""`budget`: a small device out of a large one. It raises where that device would, and says what to
try.
"""

import gc
import threading
import warnings
import weakref

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from torch.utils.checkpoint import checkpoint

from memlab import budget, measure, watch
from memlab.budget import active_budget
from memlab.ledger import COLUMNS
from memlab.meters.device import bytes_alive, resolve_device
from memlab.meters.refusals import ADVICE, OverBudget
from tests.helpers import global_hooks

FLOAT = 4
MiB, KiB = 2**20, 2**10
CPU = torch.device("cpu")
WIDTH = 256
WEIGHT = WIDTH * WIDTH * FLOAT  # 256 KiB
LAYER = WEIGHT + WIDTH * FLOAT


pytestmark = pytest.mark.usefixtures("objects_frozen")


@pytest.fixture(autouse=True)
def _everything_is_off_afterwards():
    gc.collect()
    yield
    assert active_budget() is None
    assert _get_current_dispatch_mode_stack() == []
    assert global_hooks() == {}


def mlp(layers: int = 3) -> nn.Sequential:
    return nn.Sequential(
        *[part for _ in range(layers) for part in (nn.Linear(WIDTH, WIDTH), nn.Tanh())]
    )


def out_of_memory(size, run) -> torch.OutOfMemoryError:
    with pytest.raises(torch.OutOfMemoryError) as caught:
        with budget(bytes_alive(CPU) + size, device="cpu"):
            run()
    return caught.value


# It raises near the allocation that passes it -----------------------------------------------------


def test_in_the_forward_it_names_the_module():
    """Three layers are 770 KiB; each keeps a Tanh's output of 2 MiB for the backward."""

    def run():
        model = mlp()
        model(torch.randn(2048, WIDTH)).mean().backward()

    error = out_of_memory(8 * MiB, run)
    assert (
        "the budget is 8.00 MiB. aten.tanh in 3 asked for 2.00 MiB while 6.75 MiB were alive"
        in str(error)
    )
    assert error.columns["activations"] == 2 * 2 * MiB + 2 * MiB
    assert error.columns["batch"] == 2 * MiB
    assert error.columns["parameters"] == 3 * LAYER
    assert "The largest column is activations" in str(error)
    assert f"Try {ADVICE['activations']}." in str(error)


def test_in_the_backward_it_names_the_module_whose_backward_it_is():
    def run():
        model = mlp()
        model(torch.randn(8, WIDTH)).mean().backward()

    # Weights, and room for one gradient; that of the last layer comes first.
    error = out_of_memory(3 * LAYER + LAYER + 128 * KiB, run)
    assert "aten.mm in the backward of 2 asked for 256.00 KiB" in str(error)
    assert error.columns["gradients"] == LAYER
    assert error.columns["parameters"] == 3 * LAYER
    assert "The largest column is parameters" in str(error)


@pytest.mark.parametrize(
    "options", [{"foreach": False}, {"foreach": True}, {"fused": True}], ids=str
)
def test_in_the_optimizer_it_names_the_optimizer(options):
    def run():
        model = mlp()
        optimizer = torch.optim.AdamW(model.parameters(), **options)
        model(torch.randn(8, WIDTH)).mean().backward()
        optimizer.step()

    error = out_of_memory(2 * 3 * LAYER + 2 * LAYER + 128 * KiB, run)
    assert "in AdamW.step() asked for 256.00 KiB" in str(error)
    assert error.columns["gradients"] == error.columns["parameters"] == 3 * LAYER
    assert error.columns["optimizer_state"] >= 2 * LAYER


def test_in_a_recomputation_it_names_the_module():
    """Two layers with 1 MiB outputs: their forward fits. In backward, it comes on top of gradients
    and input.
    """
    ran = []

    def run():
        model, inputs = mlp(2), torch.randn(1024, WIDTH)
        loss = checkpoint(model, inputs, use_reentrant=False).mul(2).mean()
        ran.append("forward")
        loss.backward()

    error = out_of_memory(2 * LAYER + 5 * MiB - 1, run)
    assert ran == ["forward"]
    assert "aten.tanh in 3 asked for 1.00 MiB while 4.50 MiB were alive" in str(error)
    # Computed again: the first Tanh's output, and of the second layer both.
    assert error.columns["activations"] == pytest.approx(3 * MiB, abs=16 * KiB)
    assert error.columns["batch"] == error.columns["temporaries"] == MiB


def test_outside_any_module():
    error = out_of_memory(1 * MiB, lambda: torch.ones(1024, 1024))
    assert "outside any module asked for 4.00 MiB while 0 B were alive" in str(error)


def test_a_loop_that_keeps_its_losses_runs_out():
    model, inputs, kept = mlp(), torch.randn(512, WIDTH), []
    steps = 0

    def run():
        nonlocal steps
        while True:
            kept.append(model(inputs).mean())
            steps += 1

    error = out_of_memory(8 * MiB, run)
    assert steps == 4  # 1.5 MiB stay of each, and the fifth needs 2 MiB for a moment
    assert "The largest column is activations" in str(error)
    kept.clear()


def test_memory_that_comes_back_can_be_used_again():
    with budget(bytes_alive(CPU) + 3 * MiB, device="cpu"):
        for _ in range(20):
            held = torch.ones(512, 1024)  # 2 MiB
            del held


def test_the_exact_budget_is_enough_and_a_byte_less_is_not():
    with budget(bytes_alive(CPU) + 4 * MiB, device="cpu") as limit:
        held = torch.ones(1024, 1024)
        assert limit.alive() == limit.limit
        del held
    error = out_of_memory(4 * MiB - 1, lambda: torch.ones(1024, 1024))
    assert sum(error.columns.values()) == 4 * MiB


@pytest.mark.parametrize("short", [0, 1])
def test_gradients_of_a_weight_that_is_used_twice_are_added_up_in_place(short):
    weight = torch.zeros(64, 64, requires_grad=True)
    first, second = torch.ones(2, 1, 64)
    alive = bytes_alive("cpu")
    both = (first @ weight).sum() + (second @ weight).sum()
    # Two gradients at once, and never a third; what is smaller is less than half of one.
    room = 2 * weight.nbytes + weight.nbytes // 2
    with budget(alive + room - short * weight.nbytes):
        if short:
            with pytest.raises(OverBudget):
                both.backward()
        else:
            both.backward()
            assert weight.grad.sum() == 2 * 64 * 64


def test_views_and_in_place_operators_cost_nothing():
    with budget(bytes_alive(CPU) + 4 * MiB + KiB, device="cpu"):
        held = torch.ones(1024, 1024)
        held.view(-1).add_(1).t().reshape(2, -1)[:1].detach()


@pytest.mark.parametrize(
    "grow",
    [
        lambda: torch.empty(0).resize_(1024 * 1024),
        lambda: torch.add(torch.ones(1024, 1), torch.ones(1, 1024), out=torch.empty(0)),
        lambda: torch.ones(2).expand(512 * 1024, 2).clone(),
        lambda: torch.ones(1024, 1024, dtype=torch.uint8).float(),
        lambda: torch.split(torch.ones(1024, 1024), 1),
    ],
    ids=["resize_", "out=", "clone", "float", "split"],
)
def test_however_a_tensor_grows(grow):
    out_of_memory(3 * MiB, grow)


def test_a_storage_that_is_resized_counts_by_what_it_is_now():
    """FSDP frees a gathered parameter by resizing its storage to zero, and gathers it into the same
    one.
    """
    with budget(bytes_alive(CPU) + 6 * MiB, device="cpu") as limit:
        before = limit.alive()
        held = torch.ones(1024, 1024)
        for _ in range(5):
            held.untyped_storage().resize_(0)
            held.untyped_storage().resize_(4 * MiB)
            held.fill_(1)
        assert limit.alive() - before == 4 * MiB
        del held
        assert limit.alive() == before


def test_a_memory_map_is_free(tmp_path):
    """Offloading to a file has to be a saving here, too."""
    with budget(bytes_alive(CPU) + MiB, device="cpu") as limit:
        before = limit.alive()
        mapped = torch.from_file(str(tmp_path / "file"), shared=True, size=1024 * 1024)
        mapped.fill_(1).view(1024, -1).add_(1)
        assert limit.alive() - before < KiB


def test_compiled_and_fake_tensors_are_none_of_its_business():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with budget(bytes_alive(CPU) + MiB, device="cpu"):
        with FakeTensorMode():
            assert (torch.ones(4096, 4096) @ torch.ones(4096, 4096)).shape == (4096, 4096)
        assert torch.ones(4096, 4096, device="meta").sum().shape == ()


# The message --------------------------------------------------------------------------------------


def test_every_column_has_an_advice_and_the_message_gives_the_largest():
    assert tuple(ADVICE) == COLUMNS
    for column in COLUMNS:
        columns = dict.fromkeys(COLUMNS, 1) | {column: 3 * MiB}
        error = OverBudget(
            2 * MiB, MiB, "aten.mm in block.3", columns, detail=" asked for 1.00 MiB"
        )
        assert isinstance(error, torch.OutOfMemoryError)
        assert str(error).startswith(
            "out of memory: the budget is 2.00 MiB. aten.mm in block.3 asked for 1.00 MiB."
        )
        assert f"{column} 3.00 MiB" in str(error)
        assert f"The largest column is {column}. Try {ADVICE[column]}." in str(error)
        assert error.columns == columns
        assert (error.limit, error.asked) == (2 * MiB, MiB)
        assert error.place == "aten.mm in block.3" and not error.measured


def test_the_columns_of_the_error_sum_to_what_was_alive_and_asked_for():
    error = out_of_memory(8 * MiB, lambda: mlp()(torch.randn(2048, WIDTH)))
    alive, asked = 2 * MiB + 3 * LAYER + 4 * MiB, 2 * MiB
    assert sum(error.columns.values()) == alive + asked


# With the meter -----------------------------------------------------------------------------------


def training():
    torch.manual_seed(0)
    model, inputs = mlp(), torch.randn(512, WIDTH)
    optimizer = torch.optim.AdamW(model.parameters())

    def step():
        optimizer.zero_grad()
        loss = model(inputs).square().mean()
        loss.backward()
        optimizer.step()
        return loss

    return step


def convolution():
    """oneDNN may reorder inside its operators: memory that no tensor owns."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 10),
    )
    images = torch.randn(16, 3, 32, 32)
    return lambda: model(images).mean().backward()


class ScaledByNoise(nn.Module):
    def forward(self, x):
        return x * torch.randn(2**18).median()


def median_of_noise():
    """A median copies what it is given, on every processor: memory that no tensor owns, which a
    budget on the CPU cannot see live.
    """
    model = nn.Sequential(nn.Linear(8, 8), ScaledByNoise())
    return lambda: model(torch.ones(1, 8)).mean().backward()


def test_a_budget_that_is_kept_changes_no_byte():
    """But for wrapped Python numbers, of 8 bytes each, which a dispatch mode holds a
    little longer.
    """
    for build in (training, convolution):
        free = measure(build)
        with budget("1 GiB", device="cpu"):
            kept = measure(build)
        assert 0 <= kept.peak_bytes - free.peak_bytes <= 16
        assert kept.losses == free.losses
        for name in ("parameters", "gradients", "optimizer_state", "activations", "batch"):
            assert kept.columns[name] == free.columns[name]


def test_what_operators_take_for_themselves_is_caught_when_it_is_measured():
    """No operator's result passes this budget; what is inside one does. Alone the budget is the
    milder.
    """
    peak = measure(median_of_noise).peak_bytes
    with budget(bytes_alive(CPU) + peak - 1, device="cpu"):
        median_of_noise()()
    with pytest.raises(
        torch.OutOfMemoryError, match="aten::.* in .*: .* at the measured peak"
    ) as caught:
        with budget(bytes_alive(CPU) + peak - 1, device="cpu"):
            measure(median_of_noise)
    assert sum(caught.value.columns.values()) == peak
    assert "The largest column is temporaries" in str(caught.value)
    with budget(bytes_alive(CPU) + peak, device="cpu"):
        assert measure(median_of_noise).peak_bytes == peak


def test_a_measurement_that_runs_out_leaves_everything_as_it_was():
    before = measure(training)
    for size in (1 * MiB, 2 * MiB, 4 * MiB):
        out_of_memory(size, lambda: measure(training))
        assert not torch._C._autograd._profiler_enabled()
    after = measure(training)
    assert (after.peak_bytes, after.columns) == (before.peak_bytes, before.columns)


def test_what_was_alive_before_counts_against_the_budget_of_a_measurement():
    held = torch.ones(1024, 1024)
    peak = measure(training).peak_bytes
    with pytest.raises(torch.OutOfMemoryError):
        with budget(bytes_alive(CPU) - held.nbytes + peak, device="cpu"):
            measure(training)


def test_a_watch_inside_a_budget():
    step = training()
    step()
    with pytest.raises(torch.OutOfMemoryError):
        with budget(bytes_alive(CPU) + 256 * KiB, device="cpu"):
            with watch() as w:
                step()
    assert w.measurement.columns["parameters"] == 3 * LAYER


# One after the other ------------------------------------------------------------------------------


def test_an_optimizer_step_that_ran_out_is_told_as_one():
    weight = nn.Parameter(torch.zeros(1024))
    weight.grad = torch.zeros(1024)
    optimizer = torch.optim.AdamW([weight])
    with watch() as w, pytest.raises(OverBudget), budget(bytes_alive(CPU) + 6 * KiB):
        optimizer.step()
    assert w.measurement.phase == "optimizer"


def test_a_sequence_of_budgets():
    peak = measure(training).peak_bytes
    for size in (2 * peak, peak // 2, peak + KiB, peak // 4, 3 * peak):
        if size < peak:
            out_of_memory(size, lambda: measure(training))
        else:
            with budget(bytes_alive(CPU) + size, device="cpu"):
                measure(training)


def test_budgets_do_not_nest_and_the_outer_one_goes_on():
    with budget(bytes_alive(CPU) + 4 * MiB, device="cpu") as outer:
        with pytest.raises(
            RuntimeError, match="a budget of .* is in force already, and budgets do not nest"
        ):
            with budget("1 GiB", device="cpu"):
                pass
        assert active_budget() is outer
        with pytest.raises(torch.OutOfMemoryError):
            torch.ones(2048, 1024)


def test_everything_is_switched_off_by_any_exception():
    for error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error):
            with budget("1 GiB", device="cpu"):
                mlp()(torch.ones(1, WIDTH))
                raise error("no")
        assert active_budget() is None
        assert torch.ones(1024, 1024).sum() == 1024 * 1024


def test_a_finished_budget_keeps_nothing_alive():
    with budget("1 GiB", device="cpu") as limit:
        model = mlp()
        model(torch.ones(1, WIDTH)).mean().backward()
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    assert limit.limit == 1024 * MiB


def test_a_long_training_under_a_budget_does_not_pile_up_notes():
    step = training()
    with budget("1 GiB", device="cpu") as limit:
        step()
        step()
        few = (
            len(limit._observer.seen.latest)
            + len(limit._observer.spans)
            + len(limit._observer.seen.observations)
        )
        for _ in range(50):
            step()
        many = (
            len(limit._observer.seen.latest)
            + len(limit._observer.spans)
            + len(limit._observer.seen.observations)
        )
    assert many < 3 * few


def test_another_threads_allocations_are_not_limited():
    """The budget is that of the thread that set it; a thread that prepares data is not stopped."""
    made = []
    with budget(bytes_alive(CPU) + MiB, device="cpu"):
        thread = threading.Thread(target=lambda: made.append(torch.ones(1024, 1024)))
        thread.start()
        thread.join()
    assert made[0].nbytes == 4 * MiB


def test_what_another_thread_frees_is_seen():
    with budget(bytes_alive(CPU) + 6 * MiB, device="cpu") as limit:
        before = limit.alive()
        box = [torch.ones(1024, 1024)]
        thread = threading.Thread(target=box.clear)
        thread.start()
        thread.join()
        assert limit.alive() == before


# Bad input ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", ["2 gigs", "", "GiB", None, True, 2.5, 0, -1, "0 MiB"])
def test_a_size_that_is_none_is_refused(size):
    with pytest.raises(ValueError, match="size"):
        with budget(size, device="cpu"):
            pytest.fail("the budget was accepted")


def test_a_budget_below_what_is_alive_already_is_refused():
    held = torch.ones(1024, 1024)
    with pytest.raises(
        ValueError,
        match="a budget of 1.00 MiB is below what is alive already: .*Delete what is not needed",
    ):
        with budget("1 MiB", device="cpu"):
            pytest.fail("the budget was accepted")
    del held


@pytest.mark.parametrize(
    "device, message", [("meta", "has no memory"), ("mps", "no meter"), ("tpu9", "is not a device")]
)
def test_a_device_without_a_meter_is_refused(device, message):
    with pytest.raises(ValueError, match=message):
        with budget("1 GiB", device=device):
            pytest.fail("the budget was accepted")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is there")
def test_a_gpu_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="no CUDA device is there"):
        with budget("1 GiB", device="cuda"):
            pytest.fail("the budget was accepted")
    assert resolve_device() == CPU


def test_devices_are_read_as_pytorch_reads_them():
    for device in ("cpu", "cpu:0", CPU, torch.device("cpu", 0)):
        assert resolve_device(device) == CPU


def test_bytes_alive_is_what_tensors_hold():
    before = bytes_alive(CPU)
    held = torch.ones(1024, 1024)
    views = [held[:1], held.t(), held.detach()]
    assert bytes_alive(CPU) - before == 4 * MiB
    del held, views
    assert bytes_alive(CPU) == before


def test_the_module_of_a_backward_is_known_by_public_hooks_alone():
    """`Node.register_prehook` and `Node.metadata`: without them the message would say "outside any
    module".
    """
    output = nn.Linear(2, 2)(torch.ones(1, 2))
    assert isinstance(output.grad_fn.metadata, dict)
    reached = []
    output.grad_fn.register_prehook(reached.append)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        output.sum().backward()
    assert len(reached) == 1
