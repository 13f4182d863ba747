"""What is kept, since when, and whether it grows: cases D2, D3, D5 to D7, D13, D15 to D17, C3."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn

from memlab import budget, measure, watch
from memlab.meters.device import bytes_alive
from memlab.meters.refusals import OverBudget
from memlab.meters.sightings import Sightings
from memlab.units import format_bytes
from tests.helpers import small_gpt2

CPU = torch.device("cpu")
FLOAT = 4
BATCH, WIDTH = 32, 64
INPUTS = BATCH * WIDTH * FLOAT
LAYER = (WIDTH * WIDTH + WIDTH) * FLOAT
MODEL = 2 * LAYER


def network():
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH))


class Loop:
    """A training, and what somebody keeps of it after each step."""

    def __init__(self, keep, steps=5):
        self.model = network()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        self.keep = keep
        self.steps = steps
        self.kept = []

    def run(self):
        for _ in range(self.steps):
            inputs = torch.randn(BATCH, WIDTH)
            targets = torch.randn(BATCH, WIDTH)
            loss = (self.model(inputs) - targets).square().mean()
            loss.backward()
            self.keep(self)
            self.optimizer.step()
            self.optimizer.zero_grad()
            del inputs, targets, loss

    def watched(self):
        with watch(self.model, self.optimizer) as w:
            self.run()
        return w.measurement


def came(measured, columns):
    """The bytes of what is kept, without what lay in this process before."""
    return columns["kept"] - measured.ledger.columns_at(measured.ledger.start)["kept"]


def columns_of_a_budget():
    """What a budget finds before anything runs: other tests have left some models behind."""
    gc.collect()
    with budget("1 TiB") as nothing:
        return nothing.columns()


def largest_that_came(error, before):
    came = {name: size - before[name] for name, size in error.columns.items()}
    return max(came, key=came.get)


def copy_of_the_weights(loop):
    loop.kept.append(copy.deepcopy(loop.model.state_dict()))


def best_weights(loop):
    loop.kept[:] = [{name: p.detach().clone() for name, p in loop.model.named_parameters()}]


def sums_of_gradients(loop):
    gradients = [parameter.grad.clone() for parameter in loop.model.parameters()]
    if loop.kept:
        gradients = [before.add_(new) for before, new in zip(loop.kept[0], gradients, strict=True)]
    loop.kept[:] = [gradients]


@pytest.mark.parametrize("keep", [copy_of_the_weights, best_weights, sums_of_gradients])
def test_d2_copies_of_weights_and_sums_of_gradients_are_kept(keep):
    measured = Loop(keep).watched()
    after = measured.steps[-1].columns_after
    copies = 5 if keep is copy_of_the_weights else 1
    assert came(measured, after) == copies * MODEL
    assert after["batch"] == 0
    assert measured.columns["batch"] <= 2 * INPUTS
    assert measured.verdict.kind == ("creep" if copies > 1 else "steady")


def test_d2_a_replay_buffer_from_before_and_what_is_added_to_it_are_kept():
    buffer = [torch.randn(BATCH, WIDTH) for _ in range(10)]
    loop = Loop(lambda loop: buffer.append(torch.randn(BATCH, WIDTH)))
    measured = loop.watched()
    assert measured.ledger.columns_at(measured.ledger.start)["kept"] >= 10 * INPUTS
    assert came(measured, measured.steps[-1].columns_after) == 5 * INPUTS
    assert measured.verdict.bytes_a_step == INPUTS
    assert "list `buffer` (15 entries)" in measured.verdict.holder


def test_d2_features_that_a_hook_leaks_are_kept():
    features = []
    loop = Loop(lambda loop: None)
    loop.model[1].register_forward_hook(lambda module, inputs, output: features.append(output))
    measured = loop.watched()
    # (What the last step made is an activation until it is over.)
    assert came(measured, measured.columns) == 4 * INPUTS
    verdict = measured.verdict
    assert (verdict.kind, verdict.column, verdict.operator) == ("creep", "kept", "aten::tanh")
    assert verdict.bytes_a_step == INPUTS
    assert "`features`" in verdict.holder


def test_d2_an_optimizer_that_keeps_its_state_on_itself():
    class Momentum(torch.optim.Optimizer):
        def __init__(self, parameters):
            super().__init__(parameters, {})
            self.moments = [torch.zeros_like(p) for p in self.param_groups[0]["params"]]

        def step(self):
            for parameter, moment in zip(self.param_groups[0]["params"], self.moments, strict=True):
                moment.mul_(0.9).add_(parameter.grad)
                parameter.data.sub_(moment, alpha=0.1)

    def train():
        model = network()
        optimizer = Momentum(model.parameters())
        for _ in range(3):
            model(torch.randn(BATCH, WIDTH)).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            yield None

    measured = measure(train, steps=3)
    assert measured.columns["optimizer_state"] == MODEL
    assert measured.columns["kept"] == 0


def evaluation(calls, collect):
    """An evaluation that keeps its outputs, put together anew after each batch or in a list."""
    model = network().eval()
    outputs = None if collect == "cat" else []
    with torch.no_grad():
        for _ in range(calls):
            output = model(torch.randn(BATCH, WIDTH))
            if collect == "list":
                outputs.append(output)
            else:
                outputs = output if outputs is None else torch.cat([outputs, output])
    return outputs


@pytest.mark.parametrize("collect", ["cat", "list"])
def test_d3_an_evaluation_keeps_its_predictions(collect):
    calls = 6
    with watch() as w:
        evaluation(calls, collect)
    measured = w.measurement
    if collect == "list":
        assert came(measured, measured.columns) == (calls - 1) * INPUTS
        return
    # The old ones and the new ones, in the last `cat`; its last output is the model's.
    assert came(measured, measured.columns) == (2 * calls - 1) * INPUTS
    new = [block for block in measured.largest(1000) if block.born > measured.ledger.start]
    assert new[0].operator == "aten::cat"


def test_d16_an_evaluation_that_moves_its_predictions_to_numpy(transformers, tmp_path):
    """They lie beside every tensor: no module is given them, and PyTorch's allocator knows of none.

    For `np.concatenate` the old ones and the new ones are there at once. The first batch's and the
    last batch's are not NumPy's: these arrays lie in tensors.
    """
    batches, batch, tokens, words = 8, 4, 96, 64
    model = small_gpt2(vocab_size=words, n_positions=tokens)
    rows = [{"input_ids": row, "labels": row} for row in torch.randint(words, (32, tokens))]
    arguments = transformers.TrainingArguments(
        tmp_path,
        per_device_eval_batch_size=batch,
        eval_accumulation_steps=1,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        label_names=["labels"],
    )
    trainer = transformers.Trainer(
        model, arguments, eval_dataset=rows, compute_metrics=lambda prediction: {}
    )
    with watch(model) as w:
        trainer.evaluate()
    logits = len(rows) * tokens * words * FLOAT
    labels = len(rows) * tokens * 8
    measured = w.measurement
    old_and_new = (2 * batches - 1) / batches * logits  # 1.88 of them
    assert measured.outside_array_bytes == old_and_new + (batches - 1) / batches * labels
    assert measured.outside_memory_bytes == measured.outside_array_bytes
    assert f"NumPy's arrays: {format_bytes(measured.outside_array_bytes)}" in str(measured)


def test_d5_watch_keeps_nothing_alive():
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
    model(torch.randn(BATCH, WIDTH)).mean().backward()
    optimizer.step()
    state = [value for of_one in optimizer.state.values() for value in of_one.values()]
    gradients = [parameter.grad for parameter in model.parameters()]
    held = [weakref.ref(tensor) for tensor in [*model.parameters(), *gradients, *state]]
    del state, gradients
    with watch(model, optimizer):
        del model, optimizer
        gc.collect()
        assert all(tensor() is None for tensor in held)


def blocks_made(measured):
    """How many blocks came during the recording; other tests' are there from before."""
    return sum(block.born > measured.ledger.start for block in measured.ledger.blocks)


def test_d6_a_long_loop_is_recorded_in_part_and_that_is_said():
    def watched(steps):
        model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(8)))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with watch(model, optimizer) as w:
            for _ in range(steps):
                model(torch.randn(BATCH, WIDTH)).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
        return w.measurement

    measured = watched(500)
    recorded = [step for step in measured.steps if step.peak_bytes is not None]
    assert len(measured.steps) == 500
    # 12 at first (108 calls of modules), then two of every hundred and at each doubling.
    doublings = {32, 64, 128, 256}
    begun = {number for number in range(100, 501, 100)} | doublings
    assert len(recorded) <= 12 + 2 * len(begun)
    # What is kept of them is the ledger of one stretch.
    assert blocks_made(measured) <= blocks_made(watched(12))
    assert f"recorded in full: {len(recorded)} of 500 steps" in str(measured)


def test_d7_a_loss_with_its_graph_is_held_by_a_list():
    losses = []
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watch(model, optimizer) as w:
        for _ in range(6):
            loss = model(torch.randn(BATCH, WIDTH)).square().mean()
            loss.backward(retain_graph=True)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss)
    verdict = w.measurement.verdict
    # The inputs, two outputs of a layer (Tanh's, and the last one's for the square), and the loss.
    assert verdict.bytes_a_step == 3 * INPUTS + FLOAT
    assert verdict.kind == "creep"
    assert verdict.holder.startswith("list `losses` (6 entries)")
    assert verdict.sentence in str(w.measurement)
    assert "loss.item()" in verdict.sentence


def test_d7_the_holder_is_known_when_the_loops_function_has_returned():
    def loop():
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        outputs = []
        for _ in range(8):
            outputs.append(model(torch.randn(BATCH, WIDTH)))
            outputs[-1].mean().backward()
            optimizer.step()

    with watch() as w:
        loop()
    assert w.measurement.verdict.kind == "creep"
    assert "list `outputs`" in w.measurement.verdict.holder


def test_d7_the_holder_is_that_of_what_grows_most():
    """A variable that holds the next batch, fetched ahead, is nearer, and grows by nothing."""
    outputs = []
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    fetched = [torch.randn(BATCH // 4, WIDTH) for _ in range(2)]
    with watch(model, optimizer, every=1) as w:
        for number in range(8):
            ahead, fetched = fetched[0], [fetched[1], torch.randn(BATCH // 4, WIDTH)]
            outputs.append(model(ahead).detach())
            outputs.append(model(ahead).detach())
            if number % 2:
                model(ahead).mean().backward()
                optimizer.step()
                optimizer.zero_grad()
    verdict = w.measurement.verdict
    assert verdict.kind == "creep" and "list `outputs`" in verdict.holder
    assert all("outputs" in holder.path for holder in w.measurement.holders)


def test_d13_a_data_set_in_a_list_is_kept():
    def train():
        data = [torch.randn(BATCH, WIDTH) for _ in range(500)]
        model = nn.Linear(WIDTH, 8192)
        for inputs in data:
            loss = model(inputs).mean()
            loss.backward()
            yield loss

    before = columns_of_a_budget()
    # The data are 4 MiB, the model 2 MiB; its gradients are too much. Other tests leave something
    # behind that may go meanwhile: a megabyte is room for it.
    limit = bytes_alive(CPU) + 7 * 2**20
    with pytest.raises(OverBudget, match="kept") as raised, budget(limit):
        measure(train, steps=3)
    assert largest_that_came(raised.value, before) == "kept"


def test_d13_features_that_an_evaluation_keeps_are_kept():
    def evaluate():
        model = network().eval()
        features = []

        @torch.no_grad()
        def step():
            for _ in range(1000):
                features.append(model(torch.randn(BATCH, WIDTH)))

        return step

    before = columns_of_a_budget()
    limit = bytes_alive(CPU) + 4 * 2**20
    with pytest.raises(OverBudget) as raised, budget(limit):
        measure(evaluate, steps=1)
    assert largest_that_came(raised.value, before) == "kept"


def test_d13_a_layer_that_is_being_built_is_parameters():
    def build():
        return nn.Linear(1000, 1000)

    before = columns_of_a_budget()
    limit = bytes_alive(CPU) + 2**21
    with pytest.raises(OverBudget) as raised, budget(limit):
        build()
    assert largest_that_came(raised.value, before) == "parameters"


def test_d15_the_peak_of_building_and_that_of_the_steps_stand_apart():
    def train():
        model = network().to(torch.bfloat16)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(3):
            inputs = torch.randn(1, WIDTH, dtype=torch.bfloat16)
            loss = model(inputs).float().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            yield loss

    measured = measure(train, steps=3)
    # All in FP32, and each weight in both types for a moment. The steps have weights and gradients
    # in BF16, and one row of a batch.
    of_steps = max(step.peak_bytes for step in measured.steps)
    assert measured.building_peak_bytes > MODEL > of_steps - 64 * 4 * WIDTH
    assert measured.building_peak_bytes > of_steps
    assert (measured.phase, measured.verdict.kind) == ("building", "building")


def test_c3_whole_outputs_are_kept_from_step_to_step():
    def train():
        model = network()
        outputs = []
        for _ in range(5):
            output = model(torch.randn(BATCH, WIDTH))
            output.mean().backward()
            outputs.append(output)
            yield None

    measured = measure(train, steps=5)
    assert measured.verdict.bytes_a_step == INPUTS
    assert [step.columns_after["kept"] for step in measured.steps] == [
        INPUTS * number for number in range(1, 6)
    ]
    assert "list `outputs`" in measured.verdict.holder


def test_d17_what_is_alive_already_is_set_aside_while_a_watch_looks_around(monkeypatch):
    look, set_aside = Sightings.look_around, []

    def looks(self, **when):
        set_aside.append(gc.get_freeze_count())
        look(self, **when)

    monkeypatch.setattr(Sightings, "look_around", looks)
    before = gc.get_freeze_count()
    with watch(network()):
        pass
    # Tens of thousands of objects of the libraries.
    assert set_aside[0] > before + 10_000
    assert gc.get_freeze_count() <= before
