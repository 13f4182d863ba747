"""`watch`: the meter around code that was there before, and that has been running for a while."""

import gc
import threading
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from memlab import Measurement, measure, watch
from memlab.watch import CALLS_OF_AN_EVALUATION
from tests.helpers import global_hooks, small_gpt2

FLOAT = 4
WIDTH, BATCH = 64, 128
LAYER = (WIDTH * WIDTH + WIDTH) * FLOAT
INPUTS = BATCH * WIDTH * FLOAT


pytestmark = pytest.mark.usefixtures("objects_frozen")


@pytest.fixture(autouse=True)
def _everything_is_off_afterwards():
    gc.collect()
    yield
    assert global_hooks() == {}
    assert not torch._C._autograd._profiler_enabled()


class Training:
    """A training loop as people write it: three layers, AdamW, a batch."""

    def __init__(self):
        torch.manual_seed(0)
        self.model = nn.Sequential(
            *[part for _ in range(3) for part in (nn.Linear(WIDTH, WIDTH), nn.Tanh())]
        )
        self.optimizer = torch.optim.AdamW(self.model.parameters(), foreach=False)
        self.inputs = torch.randn(BATCH, WIDTH)

    def run(self, steps: int = 1) -> None:
        for _ in range(steps):
            self.optimizer.zero_grad()
            self.model(self.inputs).mean().backward()
            self.optimizer.step()


@pytest.fixture
def training():
    training = Training()
    training.run(2)
    return training


STATE = 2 * 3 * LAYER + 6 * FLOAT


# In mid-life --------------------------------------------------------------------------------------


@pytest.mark.parametrize("named", ["model and optimizer", "model", "optimizer", "nothing"])
def test_in_mid_life_the_numbers_are_those_of_a_run_measured_from_birth(training, named):
    """Models and optimizers need not be named: they are found. The old gradients are seen going."""
    from_birth = measure(lambda: Training().run, steps=4)
    things = {
        "model and optimizer": (training.model, training.optimizer),
        "model": (training.model,),
        "optimizer": (training.optimizer,),
        "nothing": (),
    }[named]
    with watch(*things) as w:
        training.run(2)
    measured = w.measurement
    assert isinstance(measured, Measurement)
    assert measured.columns == from_birth.columns
    assert measured.peak_bytes == from_birth.peak_bytes
    assert measured.phase == from_birth.phase
    assert measured.outside_bytes == 0


def test_what_is_alive_at_the_start_is_counted_once_by_what_it_is(training):
    with watch(training.model, training.optimizer) as w:
        pass
    assert w.measurement.columns == {
        "parameters": 3 * LAYER,
        "gradients": 3 * LAYER,
        "optimizer_state": STATE,
        "activations": 0,
        "batch": INPUTS,
        "kept": 0,
        "temporaries": 0,
        "unattributed": 0,
    }
    assert w.measurement.known_bytes == 3 * LAYER + 3 * LAYER + STATE + INPUTS
    assert w.measurement.phase == "other"


def test_the_end_of_what_was_alive_is_seen(training):
    with watch() as w:
        training.optimizer.zero_grad()
    ledger = w.measurement.ledger
    assert w.measurement.columns["gradients"] == 3 * LAYER
    assert ledger.columns_at(ledger.end)["gradients"] == 0
    assert ledger.columns_at(ledger.end)["parameters"] == 3 * LAYER


def test_blocks_from_before_that_die_make_room(training):
    old = torch.ones(1000, 1000)
    with watch() as w:
        del old
        new = torch.ones(500, 500)
    everything = 3 * LAYER + 3 * LAYER + STATE + INPUTS
    assert w.measurement.known_bytes == everything + 1000 * 1000 * FLOAT
    ledger = w.measurement.ledger
    assert sum(ledger.columns_at(ledger.end).values()) == everything + 500 * 500 * FLOAT
    del new


def test_a_graph_from_before_is_activations(training):
    """Watching only the backward: what the forward left is there, by what it is, and goes while
    backward runs.

    Not all of it, though: the last Tanh's output is held by autograd alone, where Python cannot
    find it.
    """
    loss = training.model(training.inputs).mean()
    with watch(training.model, training.optimizer) as w:
        loss.backward()
        training.optimizer.zero_grad()
    saved = 2 * INPUTS + FLOAT  # the outputs of two Tanh, and the loss
    start = w.measurement.ledger.columns_at(w.measurement.ledger.start)
    assert start["activations"] == saved
    assert start["unattributed"] == 0
    end = w.measurement.ledger.columns_at(w.measurement.ledger.end)
    assert end["activations"] == FLOAT
    assert end["gradients"] == 0


def test_outputs_that_a_variable_keeps_from_the_iteration_before(training):
    outputs = None

    def loop():
        nonlocal outputs
        training.optimizer.zero_grad()
        outputs = training.model(training.inputs)
        outputs.mean().backward()
        training.optimizer.step()

    loop()
    with watch(training.model) as w:
        loop()
    assert w.measurement.columns["unattributed"] == 0
    # In forward the old outputs are still there, beside what is saved.
    line = w.measurement.timeline
    assert (line.bytes["activations"] + line.bytes["kept"]).max() == 4 * INPUTS
    assert line.bytes["kept"].max() == INPUTS


def test_a_model_that_is_made_inside_is_found():
    with watch() as w:
        inside = Training()
        inside.run()
    assert w.measurement.columns["parameters"] == 3 * LAYER
    assert w.measurement.timeline.bytes["optimizer_state"].max() == STATE
    del inside


def test_two_models_one_after_the_other():
    """Python gives ids and addresses out again; nothing of the first must stick to the second."""
    with watch() as w:
        for _ in range(3):
            one = Training()
            one.run()
            del one
            gc.collect()
    assert w.measurement.timeline.bytes["parameters"].max() == 3 * LAYER
    assert w.measurement.timeline.bytes["gradients"].max() == 3 * LAYER
    assert sum(w.measurement.ledger.columns_at(w.measurement.ledger.end).values()) == 0


def test_it_can_be_used_again_and_again(training):
    peaks = []
    for _ in range(3):
        with watch(training.model, training.optimizer) as w:
            training.run()
        peaks.append(w.measurement.peak_bytes)
    assert len(set(peaks)) == 1


def test_one_watch_can_be_entered_twice(training):
    w = watch()
    with w:
        torch.ones(1000)
    first = w.measurement.known_bytes
    with w:
        torch.ones(2000)
    assert w.measurement.known_bytes == first + 1000 * FLOAT


def test_a_finished_watch_keeps_nothing_alive(training):
    with watch(training.model, training.optimizer) as w:
        training.run()
    gone = weakref.ref(training.model), weakref.ref(training.inputs)
    training.__dict__.clear()
    gc.collect()
    assert [reference() for reference in gone] == [None, None]
    assert w.measurement.peak_bytes > 0


def test_a_loop_over_a_data_loader(training):
    data = TensorDataset(torch.randn(4 * BATCH, WIDTH), torch.randn(4 * BATCH, WIDTH))

    def epoch():
        for inputs, targets in DataLoader(data, batch_size=BATCH):
            training.optimizer.zero_grad()
            F.mse_loss(training.model(inputs), targets).backward()
            training.optimizer.step()

    epoch()
    with watch(training.model, training.optimizer) as w:
        epoch()
    assert w.measurement.columns["unattributed"] < 0.02 * w.measurement.peak_bytes
    # The batch, and the batch before it until it is replaced.
    assert 2 * INPUTS <= w.measurement.columns["batch"] <= 4 * INPUTS
    # The data set, and the inputs of `training`.
    assert w.measurement.columns["kept"] == 8 * INPUTS + INPUTS


def test_a_hugging_face_model_in_an_ordinary_loop():
    dropout = {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1}
    model = small_gpt2(vocab_size=500, n_positions=64, n_embd=64, **dropout)
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
    rows = [{"input_ids": torch.randint(500, (32,))} for _ in range(8)]

    def collate(rows):
        tokens = torch.stack([row["input_ids"] for row in rows])
        return {"input_ids": tokens, "labels": tokens.clone()}  # given by keyword, as is usual

    def epoch():
        for batch in DataLoader(rows, batch_size=4, collate_fn=collate):
            outputs = model(**batch)
            outputs.loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    epoch()
    with watch(model, optimizer) as w:
        epoch()
    columns = w.measurement.columns
    storages = {
        p.untyped_storage().data_ptr(): p.untyped_storage().nbytes()
        for p in (*model.parameters(), *model.buffers())
    }
    count = sum(p.numel() for p in model.parameters())
    assert columns["parameters"] == sum(storages.values())
    assert columns["optimizer_state"] == 2 * FLOAT * count + FLOAT * len(list(model.parameters()))
    assert columns["unattributed"] < 0.02 * w.measurement.peak_bytes
    assert columns["batch"] >= 2 * 4 * 32 * 8
    assert w.measurement.timeline.bytes["gradients"].max() == FLOAT * count
    assert sum(columns.values()) == w.measurement.peak_bytes


# When things go wrong -----------------------------------------------------------------------------


@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt])
def test_code_that_raises_leaves_its_measurement(training, error):
    """Running out of memory is when one wants to know."""
    with pytest.raises(error):
        with watch(training.model, training.optimizer) as w:
            outputs = training.model(training.inputs)
            raise error("no")
    assert w.measurement.phase == "forward"
    assert w.measurement.columns["activations"] == 3 * INPUTS
    del outputs


def test_the_measurement_is_not_there_before_the_end(training):
    w = watch(training.model)
    with pytest.raises(RuntimeError, match="no measurement yet: read it after the `with watch"):
        w.measurement  # noqa: B018
    with w:
        with pytest.raises(RuntimeError, match="no measurement yet"):
            w.measurement  # noqa: B018
    assert w.measurement.peak_bytes > 0


def test_nested_watches_are_refused_and_the_outer_one_goes_on(training):
    with watch() as outer:
        with pytest.raises(RuntimeError, match="a measurement is running already"):
            with watch():
                pass
        with pytest.raises(RuntimeError, match="a measurement is running already"):
            measure(lambda: Training().run)
        training.run()
    assert outer.measurement.columns["parameters"] == 3 * LAYER


@pytest.mark.parametrize("thing", [3, None, "model", torch.ones(2), [nn.Linear(2, 2)], nn.Linear])
def test_what_is_neither_a_model_nor_an_optimizer_is_refused(thing):
    with pytest.raises(ValueError, match=r"watch\(\) takes models and optimizers, not"):
        watch(thing)


def test_a_model_on_the_meta_device_is_refused():
    model = nn.Linear(4, 4, device="meta")
    with pytest.raises(ValueError, match="parameter 'weight' is on the meta device"):
        with watch(model):
            pass


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is there")
def test_a_gpu_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="no CUDA device is there"):
        watch(device="cuda")


def test_a_lazy_model_is_seen_once_it_knows_its_shape():
    model = nn.Sequential(nn.LazyLinear(WIDTH))
    with watch(model) as w:
        model(torch.randn(BATCH, WIDTH)).mean().backward()
    assert w.measurement.columns["parameters"] == LAYER


def test_training_goes_on_when_it_cannot_be_measured(training):
    """Whoever asks for the measurement is told; the loop that it was put around is not ended."""
    before = training.model[0].weight.detach().clone()
    with watch(training.model, training.optimizer) as w:
        thread = threading.Thread(target=training.run)
        thread.start()
        thread.join()
    assert not torch.equal(before, training.model[0].weight)
    with pytest.raises(RuntimeError, match="ran in another thread than the measurement"):
        w.measurement  # noqa: B018


def test_a_profiler_inside_does_not_end_the_loop(training):
    with watch() as w:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as users:
            training.run()
    assert any(event.key == "aten::linear" for event in users.key_averages())
    with pytest.raises(RuntimeError, match="ended by another"):
        w.measurement  # noqa: B018
    with watch() as w:
        training.run()
    assert w.measurement.peak_bytes > 0


@pytest.mark.parametrize("as_keywords", [False, True])
def test_the_next_steps_batch_is_nothing_that_the_last_recorded_step_leaves(as_keywords):
    class Model(nn.Linear):
        def forward(self, x, y):
            return (super().forward(x) - y).square().mean()

    model = Model(64, 64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watch(model, optimizer, every=4) as w:
        for _ in range(70):
            batch = {"x": torch.randn(64, 64), "y": torch.randn(64, 64)}
            loss = model(**batch) if as_keywords else model(*batch.values())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    left = {step.bytes_left for step in w.measurement.steps[1:-1] if step.bytes_left is not None}
    assert len(left) == 1
    assert w.measurement.verdict.kind == "steady"


@pytest.mark.parametrize("before_step", [1, 3])
def test_a_long_evaluation_is_recorded_in_stretches_and_the_steps_as_ever(before_step):
    """As nanoGPT evaluates before its first step: hundreds of calls, which would take gigabytes."""
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(4)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recorded = []
    with watch(model, optimizer, every=1) as w:
        for number in range(1, 5):
            if number == before_step:
                with torch.no_grad():
                    for _ in range(CALLS_OF_AN_EVALUATION):
                        model(torch.ones(2 * BATCH, WIDTH))
                        recorded.append(len(w._recording.observer.spans) if w._recording else 0)
            model(torch.ones(BATCH, WIDTH)).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert max(recorded) <= CALLS_OF_AN_EVALUATION + 2 * 5
    steps = w.measurement.steps
    assert [step.number for step in steps if step.peak_bytes is None] == []
    assert len({step.peak_bytes for step in steps[1:]}) == 1


def test_the_peak_at_the_end_of_a_long_evaluation_is_seen():
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(8)))
    outputs = []
    with torch.no_grad(), watch(model) as w:
        for _ in range(CALLS_OF_AN_EVALUATION // 3):
            outputs.append(model(torch.ones(BATCH, WIDTH)))
    assert w.measurement.peak_bytes >= sum(output.nbytes for output in outputs)
