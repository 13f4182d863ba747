"""`measure`: what it gives back, what it refuses, and that it leaves nothing switched on. Bytes:
tests/meters.
"""

import functools
import gc
import pickle
import queue
import threading
import weakref

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from memlab import COLUMNS, Measurement, MemoryLeakError, measure, watch
from memlab.ledger import PHASES, Block, Ledger
from memlab.meters.device import environment
from memlab.meters.live import live_objects, objects_set_aside
from memlab.timing import Seconds
from tests.helpers import global_hooks

FLOAT = 4
WIDTH, BATCH = 64, 32
LAYER = (WIDTH * WIDTH + WIDTH) * FLOAT


@pytest.fixture(autouse=True)
def _everything_is_off_afterwards():
    yield
    assert switched_on() == []


def switched_on() -> list[str]:
    """What a measurement switches on, and has to switch off again."""
    return list(global_hooks()) + ["the profiler"] * torch._C._autograd._profiler_enabled()


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH))


def build():
    torch.manual_seed(0)
    model, inputs = mlp(), torch.randn(BATCH, WIDTH)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step():
        optimizer.zero_grad()
        loss = model(inputs).square().mean()
        loss.backward()
        optimizer.step()
        return loss

    return step


@pytest.fixture(scope="module")
def ordinary() -> Measurement:
    return measure(build)


# What it gives back -------------------------------------------------------------------------------


def test_the_measurement(ordinary):
    assert isinstance(ordinary.peak_bytes, int)
    assert tuple(ordinary.columns) == COLUMNS
    assert sum(ordinary.columns.values()) == ordinary.peak_bytes
    assert ordinary.phase in PHASES
    assert ordinary.columns["parameters"] == 2 * LAYER
    assert ordinary.columns["batch"] == BATCH * WIDTH * FLOAT
    assert ordinary.bytes_after_step == (4 * LAYER + BATCH * WIDTH * FLOAT,) * 2


def test_what_a_device_does_not_have_is_none_and_never_zero(ordinary):
    assert ordinary.reserved_bytes is None
    assert ordinary.device_bytes is None
    assert ordinary.seconds is None


def test_the_environment_says_what_a_number_depends_on(ordinary):
    assert ordinary.environment == environment("cpu")
    assert ordinary.environment["torch"] == torch.__version__
    assert ordinary.environment["device"] == "cpu"
    assert ordinary.environment["gpu"] is None and ordinary.environment["driver"] is None
    assert ordinary.environment["threads"] == torch.get_num_threads()


def test_the_timeline_is_cheap_to_plot(ordinary):
    timeline = ordinary.timeline
    assert timeline is ordinary.timeline
    assert timeline.total.max() == ordinary.peak_bytes
    assert tuple(timeline.bytes) == COLUMNS
    assert (np.diff(timeline.seconds) >= 0).all() and timeline.seconds[0] >= 0
    assert all(
        len(values) == len(timeline.total) == len(timeline.phase)
        for values in timeline.bytes.values()
    )
    assert set(timeline.phase) == set(PHASES) - {"optimizer"}  # plain SGD allocates nothing
    assert timeline.total[-1] == 0  # nothing of the run is left


def test_largest_says_what_made_the_blocks_at_the_peak(ordinary):
    largest = ordinary.largest(2)
    assert [(block.bytes, block.name) for block in largest] == [
        (WIDTH * WIDTH * FLOAT, "0.weight"),
        (WIDTH * WIDTH * FLOAT, "2.weight"),
    ]
    assert {block.column for block in ordinary.largest(100)} <= set(COLUMNS)
    assert sum(block.bytes for block in ordinary.largest(10_000)) == ordinary.peak_bytes


def test_losses_are_what_the_steps_return():
    found = measure(build, steps=3).losses
    assert len(found) == 3 and found[0] > found[1] > found[2] > 0
    assert all(isinstance(loss, float) for loss in found)


@pytest.mark.parametrize(
    "returned, losses",
    [
        (3, (3.0,)),
        (2.5, (2.5,)),
        (np.float32(1.5), (1.5,)),
        (torch.tensor(4.0), (4.0,)),
        (torch.tensor([[5.0]]), (5.0,)),
        (None, None),
        (True, None),
        ("0.5", None),
        (torch.ones(2), None),
        ({"loss": 1.0}, None),
    ],
)
def test_a_step_may_return_anything(returned, losses):
    assert measure(lambda: lambda: returned, steps=1).losses == losses


def test_losses_are_given_only_if_every_step_returned_one():
    results = iter([1.0, None, 2.0])
    assert measure(lambda: lambda: next(results), steps=3).losses is None


def test_seconds_come_from_separate_runs_with_nothing_switched_on():
    seen = []

    def watched():
        step = build()

        def look():
            seen.append(bool(switched_on()))
            step()

        return look

    measured = measure(watched, steps=2, repeats=3)
    assert seen == [True] * 2 + [False] * 4  # one warms up
    assert isinstance(measured.seconds, Seconds)
    assert measured.seconds.repeats == 3
    assert 0 < measured.seconds.median and 0 <= measured.seconds.spread
    assert "a step" in str(measured)


def test_it_pickles():
    measured = measure(build, repeats=1)
    again = pickle.loads(pickle.dumps(measured))
    for name in (
        "peak_bytes",
        "columns",
        "phase",
        "seconds",
        "losses",
        "environment",
        "bytes_after_step",
    ):
        assert getattr(again, name) == getattr(measured, name)
    assert again.timeline.total.tolist() == measured.timeline.total.tolist()
    assert str(again) == str(measured)


def test_it_reads_well_as_text_and_as_html(ordinary):
    text, page = str(ordinary), ordinary._repr_html_()
    assert repr(ordinary) == text
    assert f"{ordinary.peak_bytes:,} bytes" in text and f"in {ordinary.phase}" in text
    for name in COLUMNS:
        assert (name.replace("_", " ") in text) == bool(ordinary.columns[name])
        assert (name.replace("_", " ") in page) == bool(ordinary.columns[name])
    assert "loss " in text and "None" not in text
    assert page.count("<table>") == page.count("</table>") == 1


def test_a_run_that_allocates_nothing():
    measured = measure(lambda: lambda: None)
    assert (measured.peak_bytes, measured.phase, measured.bytes_after_step) == (
        0,
        "building",
        (0, 0),
    )
    assert "Peak 0 B" in str(measured) and "Peak 0 B" in measured._repr_html_()
    assert len(measured.timeline.total) == 0 and measured.largest() == []


def test_the_same_run_gives_the_same_bytes_whatever_ran_before(ordinary):
    big = measure(lambda: lambda: torch.ones(1000, 1000).sum())
    again = measure(build)
    assert big.peak_bytes > ordinary.peak_bytes
    assert (again.peak_bytes, again.columns, again.phase) == (
        ordinary.peak_bytes,
        ordinary.columns,
        ordinary.phase,
    )


def test_other_models_that_live_in_the_process_are_not_counted(ordinary):
    other, kept = build(), torch.ones(1000, 1000)
    other()
    assert measure(build).columns == ordinary.columns
    assert kept is not None


# Bad input ----------------------------------------------------------------------------------------


@functools.cache
def outer() -> nn.Sequential:
    return mlp()


def frozen(run):
    def inner():
        model, inputs = mlp().requires_grad_(False), torch.randn(BATCH, WIDTH)
        return lambda: run(model(inputs).mean())

    return inner


def without_gradients():
    model, inputs = mlp(), torch.randn(BATCH, WIDTH)

    def step():
        with torch.no_grad():
            loss = model(inputs).mean()
        loss.backward()

    return step


def on_meta():
    with torch.device("meta"):
        model, inputs = mlp(), torch.randn(BATCH, WIDTH)
    return lambda: model(inputs)


def optimizer_on_meta():
    with torch.device("meta"):
        optimizer = torch.optim.SGD(mlp().parameters())
    return optimizer.step


def with_outer_model():
    inputs = torch.randn(BATCH, WIDTH)
    return lambda: outer()(inputs).mean()


def with_half_an_outer_model():
    model, inputs = mlp(), torch.randn(BATCH, WIDTH)
    model[0] = outer()[0]
    return lambda: model(inputs).mean()


def measuring_inside():
    measure(build)
    return build()


def measuring_inside_the_step():
    return lambda: measure(build)


def watching_inside_the_step():
    def step():
        with watch():
            pass

    return step


BAD_INPUT = {
    "nothing": (
        None,
        {},
        ValueError,
        "build has to be a function that makes the model.*not nothing",
    ),
    "a number": (3, {}, ValueError, "build has to be a function that makes the model.*not int 3"),
    "a model": (
        mlp(),
        {},
        ValueError,
        r"measure\(\) was given a model.*with watch\(model, optimizer\)",
    ),
    "a build that returns nothing": (
        lambda: None,
        {},
        ValueError,
        r"build\(\) has to return the step.*nothing \(None\)",
    ),
    "a build that returns a loss": (
        lambda: torch.ones(1),
        {},
        ValueError,
        r"build\(\) has to return the step to call.*Tensor",
    ),
    "a build that returns a model": (
        mlp,
        {},
        ValueError,
        r"build\(\) returned a model. It has to return the step",
    ),
    "no steps": (
        build,
        {"steps": 0},
        ValueError,
        "steps has to be a whole number of at least 1, not 0",
    ),
    "negative steps": (
        build,
        {"steps": -2},
        ValueError,
        "steps has to be a whole number of at least 1, not -2",
    ),
    "half a step": (
        build,
        {"steps": 1.5},
        ValueError,
        "steps has to be a whole number of at least 1, not 1.5",
    ),
    "yes steps": (
        build,
        {"steps": True},
        ValueError,
        "steps has to be a whole number of at least 1, not True",
    ),
    "negative repeats": (
        build,
        {"repeats": -1},
        ValueError,
        "repeats has to be a whole number of at least 0, not -1",
    ),
    "half a repeat": (
        build,
        {"repeats": 0.5},
        ValueError,
        "repeats has to be a whole number of at least 0, not 0.5",
    ),
    "a device that is none": (build, {"device": "tpu9"}, ValueError, "'tpu9' is not a device"),
    "a device without a meter": (build, {"device": "mps"}, ValueError, "no meter for 'mps'"),
    "the meta device": (build, {"device": "meta"}, ValueError, 'the "meta" device has no memory'),
    "a frozen model": (
        frozen(lambda loss: loss.backward()),
        {},
        ValueError,
        "needs no gradient. Is every parameter frozen",
    ),
    "a frozen model, no backward": (
        frozen(lambda loss: loss),
        {},
        ValueError,
        "nothing in this step needs a gradient: every parameter .* frozen",
    ),
    "no_grad": (without_gradients, {}, ValueError, r"needs no gradient.*torch.no_grad\(\)"),
    "a model on the meta device": (
        on_meta,
        {},
        ValueError,
        "parameter '0.weight' is on the meta device",
    ),
    "an optimizer on the meta device": (
        optimizer_on_meta,
        {},
        ValueError,
        "a parameter of the optimizer is on the meta device",
    ),
    "a model from outside": (
        with_outer_model,
        {},
        ValueError,
        "the model was built before the measurement began: 32.50 KiB",
    ),
    "part of a model from outside": (
        with_half_an_outer_model,
        {},
        ValueError,
        r"the model was built before .* 16.25 KiB .*\('.*weight' is one\)",
    ),
    "a measurement inside build": (
        measuring_inside,
        {},
        RuntimeError,
        "a measurement is running already",
    ),
    "a measurement inside a step": (
        measuring_inside_the_step,
        {},
        RuntimeError,
        "a measurement is running already",
    ),
    "a watch inside a step": (
        watching_inside_the_step,
        {},
        RuntimeError,
        "a measurement is running already",
    ),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_gets_an_error_of_its_own(case, ordinary):
    given, options, kind, message = BAD_INPUT[case]
    outer()
    with pytest.raises(kind, match=message):
        measure(given, **options)
    assert switched_on() == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is there")
def test_a_gpu_that_is_not_there():
    with pytest.raises(ValueError, match="no CUDA device is there"):
        measure(build, device="cuda")


def test_no_two_kinds_of_bad_input_share_a_message():
    """Each says what was wrong in its own words: a match for one is no match for another kind."""
    messages = [BAD_INPUT[case][3] for case in BAD_INPUT]
    assert len(set(messages)) >= len(messages) - 2  # three ways to nest are one mistake


def test_a_run_is_fine_again_after_a_refusal(ordinary):
    for case in ("a frozen model", "a model on the meta device", "a measurement inside a step"):
        with pytest.raises((ValueError, RuntimeError)):
            measure(BAD_INPUT[case][0])
    assert measure(build).columns == ordinary.columns


# Not bad input ------------------------------------------------------------------------------------


def test_a_gradient_through_a_frozen_model_is_training_all_the_same():
    """An adversarial example, a prompt: the parameters are frozen, and something else
    is trained.
    """

    def through():
        model, inputs = mlp().requires_grad_(False), torch.randn(BATCH, WIDTH, requires_grad=True)

        def step():
            inputs.grad = None
            loss = model(inputs).mean()
            loss.backward()
            return loss.detach()

        return step

    assert measure(through).columns["activations"] > 0


def test_a_module_without_parameters_can_be_measured():
    def attention():
        softmax, scores = nn.Softmax(-1), torch.randn(BATCH, WIDTH)
        return lambda: softmax(scores)

    assert measure(attention).peak_bytes == 2 * BATCH * WIDTH * FLOAT


def test_a_detached_loss_is_fine():
    def detached():
        step = build()
        return lambda: step().detach()

    assert measure(detached).losses is not None


# Exceptions ---------------------------------------------------------------------------------------


class Boom(Exception):
    pass


def failing(where: str, error: type[BaseException]):
    def boom(*args, **kwargs):
        raise error(where)

    def inner():
        if where == "build":
            boom()
        model, inputs = mlp(), torch.randn(BATCH, WIDTH)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        if where == "forward":
            model[1].forward = boom
        elif where == "a forward pre-hook":
            model[1].register_forward_pre_hook(boom)
        elif where == "a forward hook":
            model[1].register_forward_hook(boom)
        elif where == "a tensor's hook in backward":
            model[2].weight.register_hook(boom)
        elif where == "a module's hook in backward":
            model[1].register_full_backward_hook(boom)
        elif where == "the optimizer":
            optimizer.register_step_pre_hook(boom)
        elif where == "after the optimizer":
            optimizer.register_step_post_hook(boom)

        def step():
            optimizer.zero_grad()
            loss = model(inputs).mean()
            if where == "between forward and backward":
                boom()
            loss.backward()
            optimizer.step()

        return step

    return inner


PLACES = [
    "build",
    "forward",
    "a forward pre-hook",
    "a forward hook",
    "between forward and backward",
    "a tensor's hook in backward",
    "a module's hook in backward",
    "the optimizer",
    "after the optimizer",
]


@pytest.mark.parametrize("error", [Boom, KeyboardInterrupt])
@pytest.mark.parametrize("where", PLACES)
def test_an_exception_goes_through_and_everything_is_switched_off(where, error, recwarn):
    with pytest.raises(error, match=where):
        measure(failing(where, error))
    assert switched_on() == []
    assert not [warning for warning in recwarn if "hook" in str(warning.message)]


def test_after_exceptions_the_numbers_are_the_same(ordinary):
    for where in ("build", "forward", "a tensor's hook in backward", "the optimizer"):
        with pytest.raises(KeyboardInterrupt):
            measure(failing(where, KeyboardInterrupt))
    again = measure(build)
    assert (again.peak_bytes, again.columns) == (ordinary.peak_bytes, ordinary.columns)


# Leaks --------------------------------------------------------------------------------------------

KEPT: list = []


@pytest.fixture
def kept():
    yield KEPT
    KEPT.clear()
    gc.collect()


def keeping(what: str):
    def inner():
        model, inputs = nn.Linear(256, 256), torch.randn(128, 256)
        if what == "parameters":
            KEPT.append(model)

        def step():
            loss = torch.tanh(model(inputs)).square().mean()
            if what == "activations":
                KEPT.append(loss)  # and with it the graph, and all that is saved in it
            elif what == "temporaries":
                KEPT.append(torch.randn(200, 200))
            return loss.item()

        return step

    return inner


@pytest.mark.parametrize("column", ["parameters", "activations", "temporaries"])
def test_what_outlives_the_run_is_an_error(kept, column):
    with pytest.raises(
        MemoryLeakError, match="allocated in this run are still alive after it"
    ) as caught:
        measure(keeping(column))
    held = str(caught.value).partition("(")[2].partition(")")[0]
    if column != "temporaries":  # a tensor in a list belongs to no column
        assert column in held
    assert "a global list" in str(caught.value) and "loss.item()" in str(caught.value)
    assert isinstance(caught.value, RuntimeError)


def test_a_hook_that_refers_to_its_own_parameter_is_a_leak():
    """Python's garbage collector does not see through PyTorch's hooks, so such a cycle is never
    freed.
    """
    references = []

    def cyclic():
        model, inputs = nn.Linear(256, 256), torch.randn(4, 256)
        handle = model.weight.register_post_accumulate_grad_hook(lambda _: model.zero_grad())
        references.append(handle)
        return lambda: model(inputs).mean().backward()

    with pytest.raises(MemoryLeakError, match="a hook on a tensor that refers to it"):
        measure(cyclic)
    references[0].remove()


def test_small_constants_that_pytorch_keeps_are_no_leak(kept):
    def small():
        KEPT.append(torch.ones(100))
        return lambda: torch.ones(100_000).sum().item()

    assert measure(small).peak_bytes >= 400_000


def leaky(kind: str):
    def inner():
        model, inputs = mlp(), torch.randn(BATCH, WIDTH)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        losses = []

        def step():
            if kind != "no zero_grad":
                optimizer.zero_grad()
            loss = model(inputs).square().mean()
            loss.backward(retain_graph=kind != "no zero_grad")
            optimizer.step()
            if kind == "a kept loss":
                losses.append(loss)
            elif kind == "a reference cycle":
                cycle = [loss]
                cycle.append(cycle)

        return step

    return inner


def test_a_kept_loss_shows_in_the_bytes_after_each_step():
    """Its graph holds what the layers saved: Tanh's output, the model's output (for the square),
    and the loss.
    """
    after = measure(leaky("a kept loss"), steps=4).bytes_after_step
    assert set(np.diff(after)) == {2 * BATCH * WIDTH * FLOAT + FLOAT}


def test_a_reference_cycle_shows_in_the_bytes_after_each_step():
    gc.disable()  # the garbage collector frees it sooner or later; until then it is a leak
    try:
        after = measure(leaky("a reference cycle"), steps=4).bytes_after_step
    finally:
        gc.enable()
    assert set(np.diff(after)) == {2 * BATCH * WIDTH * FLOAT + FLOAT}


def test_a_missing_zero_grad_does_not_grow_after_the_second_step():
    """The gradients are wrong, since they add up; their memory is that of one backward."""
    after = measure(leaky("no zero_grad"), steps=4).bytes_after_step
    assert set(np.diff(after)) == {0}


def test_a_loop_that_does_not_leak_is_flat():
    assert len(set(measure(build, steps=4).bytes_after_step)) == 1


# Threads, and memory that is not the allocator's --------------------------------------------------


class Ramp(Dataset):
    def __len__(self):
        return 2 * BATCH

    def __getitem__(self, index):
        return torch.full((WIDTH,), float(index)), torch.full((WIDTH,), float(index))


def from_a_loader(workers: int):
    def inner():
        torch.manual_seed(0)
        model = mlp()
        optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
        loader = DataLoader(Ramp(), batch_size=BATCH, num_workers=workers)

        def step():
            for inputs, targets in loader:
                optimizer.zero_grad()
                loss = F.mse_loss(model(inputs), targets)
                loss.backward()
                optimizer.step()
            return loss.item()

        return step

    return inner


PAIR = 2 * BATCH * WIDTH * FLOAT


def test_a_data_loader_in_this_process():
    measured = measure(from_a_loader(0))
    # Inputs and targets, though the targets are given to no module; and the batch before them,
    # until it is replaced.
    assert PAIR <= measured.columns["batch"] <= 2 * PAIR
    assert measured.outside_bytes == 0
    assert measured.columns["unattributed"] == 0


def test_a_data_loader_with_two_workers():
    """The workers' batches come in shared memory, which no allocator of this process handed out."""
    here, workers = measure(from_a_loader(0)), measure(from_a_loader(2))
    assert workers.losses == here.losses
    assert workers.columns["batch"] == 0
    assert workers.columns["parameters"] == here.columns["parameters"] == 2 * LAYER
    assert workers.columns["optimizer_state"] == here.columns["optimizer_state"]
    assert workers.outside_bytes >= PAIR and workers.outside_bytes % (BATCH * WIDTH * FLOAT) == 0
    assert workers.outside_memory_bytes == 0
    assert workers.outside_shared_bytes == workers.outside_bytes  # the targets, too
    assert "not counted" in str(workers) and "shared memory" in str(workers)


class Prefetching:
    """A step fed by a thread that makes the batches."""

    def __init__(self, batches: int):
        self.model = mlp()
        self.optimizer = torch.optim.SGD(self.model.parameters())
        self.queue: queue.Queue = queue.Queue()
        thread = threading.Thread(target=self.make, args=(batches,))
        thread.start()
        thread.join()

    def make(self, batches: int) -> None:
        for _ in range(batches):
            self.queue.put((torch.randn(BATCH, WIDTH), torch.randn(BATCH, WIDTH)))

    def __call__(self) -> float:
        inputs, targets = self.queue.get()
        self.optimizer.zero_grad()
        loss = F.mse_loss(self.model(inputs), targets)
        loss.backward()
        self.optimizer.step()
        return loss.item()


def test_what_a_prefetching_thread_makes_is_said_to_be_outside():
    """The profiler sees one thread. What others make is not in the ledger, and that is not passed
    over in silence.
    """
    measured = measure(lambda: Prefetching(3), steps=2)
    assert measured.outside_bytes == measured.outside_memory_bytes == 3 * PAIR
    assert measured.columns["batch"] == 0
    assert measured.columns["parameters"] == measured.columns["gradients"] == 2 * LAYER
    assert "other threads" in str(measured)


def test_numpy_arrays_and_memory_maps_are_outside(tmp_path):
    def inner():
        model = mlp()
        from_numpy = torch.from_numpy(np.ones((BATCH, WIDTH), dtype=np.float32))
        mapped = torch.from_file(str(tmp_path / "data"), shared=True, size=BATCH * WIDTH).view(
            BATCH, WIDTH
        )
        return lambda: F.mse_loss(model(from_numpy), mapped).backward()

    measured = measure(inner)
    assert measured.outside_bytes == PAIR
    assert measured.outside_memory_bytes == PAIR // 2  # the array
    assert measured.outside_shared_bytes == 0
    assert measured.columns["batch"] == 0


def test_a_batch_from_outside_the_run_is_outside():
    data = torch.randn(BATCH, WIDTH)

    def inner():
        model = mlp()
        return lambda: model(data).mean().backward()

    measured = measure(inner)
    assert measured.outside_bytes == measured.outside_memory_bytes == data.nbytes
    assert measured.columns["batch"] == 0


def test_a_model_that_runs_in_another_thread_is_refused():
    """Its activations would be missing, and a number without them would be wrong."""

    def inner():
        step = build()

        def elsewhere():
            thread = threading.Thread(target=step)
            thread.start()
            thread.join()

        return elsewhere

    with pytest.raises(RuntimeError, match="Sequential ran in another thread than the measurement"):
        measure(inner)


def test_an_optimizer_that_steps_in_another_thread_is_refused():
    def inner():
        model, inputs = mlp(), torch.randn(BATCH, WIDTH)
        optimizer = torch.optim.AdamW(model.parameters())

        def elsewhere():
            model(inputs).mean().backward()
            thread = threading.Thread(target=optimizer.step)
            thread.start()
            thread.join()

        return elsewhere

    with pytest.raises(RuntimeError, match=r"AdamW.step\(\) ran in another thread"):
        measure(inner)


@pytest.mark.parametrize("freed", ["a tensor", "a graph"])
def test_what_another_thread_frees_is_an_error_and_no_leak(freed):
    """The profiler does not see it return, so it would be counted for ever."""

    def inner():
        model, inputs = nn.Linear(256, 256), torch.randn(128, 256)

        def step():
            loss = torch.tanh(model(inputs)).square().mean()
            box = [torch.ones(200, 200) if freed == "a tensor" else loss]
            del loss
            thread = threading.Thread(target=box.clear)
            thread.start()
            thread.join()

        return step

    with pytest.raises(RuntimeError, match="another thread freed them") as caught:
        measure(inner)
    assert not isinstance(caught.value, MemoryLeakError)


def test_a_leak_stays_a_leak_where_other_threads_run(kept):
    stop = threading.Event()

    def busy():
        while not stop.is_set():
            torch.ones(100).sum()

    thread = threading.Thread(target=busy)
    thread.start()
    try:
        with pytest.raises(MemoryLeakError):
            measure(keeping("activations"))
        measured = measure(build)
        assert measured.columns["unattributed"] == 0
    finally:
        stop.set()
        thread.join()


def test_a_step_that_returns_a_function_was_not_called_yet():
    def build_other():
        return lambda: None

    with pytest.raises(ValueError, match="not yet called"):
        measure(lambda: lambda: build_other, device="cpu")


# What is alive already ----------------------------------------------------------------------------


def collected():
    """A step that leaves its tensor in a cycle, which the garbage collector has to find before the
    run is over.
    """

    def build():
        def step():
            cycle = {"tensor": torch.zeros(2**20)}
            cycle["itself"] = cycle

        return step

    return build


def test_what_is_alive_already_is_set_aside_and_comes_back():
    kept = [torch.zeros(10)]
    cycle = {"tensor": kept[0]}
    cycle["itself"] = cycle
    reference = weakref.ref(kept[0])
    before = gc.get_freeze_count()
    assert measure(collected(), device="cpu").peak_bytes in (4 * 2**20, 8 * 2**20)
    assert gc.get_freeze_count() == before
    del cycle, kept
    gc.collect()
    assert reference() is None


def test_it_comes_back_after_an_error():
    before = gc.get_freeze_count()
    with pytest.raises(ZeroDivisionError):
        measure(lambda: lambda: 1 / 0, device="cpu")
    assert gc.get_freeze_count() == before


def test_what_somebody_else_has_frozen_stays_frozen():
    plain = measure(collected(), device="cpu")
    gc.freeze()
    try:
        frozen = gc.get_freeze_count()
        assert measure(collected(), device="cpu").peak_bytes == plain.peak_bytes
        assert gc.get_freeze_count() >= 0.99 * frozen > 1000  # less what went by itself
    finally:
        gc.unfreeze()


def test_a_model_from_before_is_still_found_while_it_is_set_aside():
    model = nn.Linear(8, 8)
    with objects_set_aside():
        assert not any(thing is model for thing in gc.get_objects())
        assert any(thing is model for thing in live_objects(nn.Module))
        assert any(thing is model.weight for thing in live_objects(torch.Tensor))
        inside = nn.Linear(8, 8)
        assert any(thing is inside for thing in live_objects(nn.Module))
        reference = weakref.ref(model)
        del model
        assert reference() is None  # it was not held
    with pytest.raises(ValueError, match="built before the measurement"):
        measure(lambda: lambda: inside(torch.ones(2, 8)).sum().backward(), device="cpu")


def test_a_memory_map_from_before_that_nobody_uses_is_no_part_of_the_run(tmp_path):
    kept = [torch.from_file(str(tmp_path / "numbers"), shared=True, size=1000, dtype=torch.float32)]
    assert measure(collected(), device="cpu").outside_bytes == 0
    assert kept[0].nbytes == 4000
    (tmp_path / "other").write_bytes(bytes(4000))

    def build():
        other = torch.from_file(str(tmp_path / "other"), size=1000, dtype=torch.float32)
        return lambda: (other * 2).sum()

    assert measure(build, device="cpu").outside_bytes == 4000


def test_what_is_in_no_tensor_is_left_out_of_the_known_bytes():
    blocks = [
        Block(1000, 1, 0, column="parameters"),
        Block(24, 2, 0, column="unattributed"),
        Block(50, 3, 0, column="temporaries", scratch=True),
    ]
    ledger = Ledger(blocks)
    measured = Measurement(1074, ledger.peak_columns(), "forward", ledger, {})
    assert measured.known_bytes == sum(measured.known_columns.values()) == 1000
    assert measured.known_columns["parameters"] == 1000
