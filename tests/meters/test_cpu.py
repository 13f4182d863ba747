"""The CPU's bytes are exact: they equal a hand count, the allocator's own events, and another
tool's count.
"""

import gc
import json
import os
import subprocess
import sys
import textwrap
import threading

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile, schedule

import memlab.meters.cpu as cpu
from memlab import measure
from memlab.ledger import COLUMNS
from memlab.meters.cpu import Meter, read_trace
from memlab.workloads import gpt, vit
from tests.helpers import small_gpt2, small_llama

FLOAT = 4


# The hand count -----------------------------------------------------------------------------------


def mlp_step():
    """1024-4096-1024, batch 256, AdamW one parameter after the other; prediction and loss stay in
    variables.
    """
    model = nn.Sequential(nn.Linear(1024, 4096), nn.ReLU(), nn.Linear(4096, 1024))
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
    inputs, targets = torch.randn(256, 1024), torch.randn(256, 1024)

    def step():
        optimizer.zero_grad()
        prediction = model(inputs)
        loss = F.mse_loss(prediction, targets)
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def test_the_hand_count_of_an_mlp():
    weight, bias_1, bias_2 = (
        1024 * 4096,
        4096,
        1024,
    )  # both weights have the same number of elements
    parameters = weight + bias_1 + weight + bias_2
    output = 256 * 1024
    by_hand = {
        "parameters": FLOAT * parameters,
        "gradients": FLOAT * parameters,
        # AdamW: two moments a parameter, and a step counter (a tensor of one FP32 number) for each
        # of four tensors.
        "optimizer_state": 2 * FLOAT * parameters + 4 * FLOAT,
        # The prediction, which `loss.backward()` does not free while a variable holds it; and the
        # loss: a tensor with no dimensions, whose storage has room for the squared differences that
        # it is the mean of.
        "activations": FLOAT * output + FLOAT * output,
        "batch": 2 * FLOAT * 256 * 1024,
        "kept": 0,
        # While AdamW updates the second weight: sqrt(second moment), and that divided by the bias
        # correction. The variable `denom` of the bias before it lives until it is assigned again.
        # Two wrapped Python numbers: one in FP64, and one moved to FP32.
        "temporaries": FLOAT * weight + FLOAT * weight + FLOAT * bias_1 + 8 + 4,
        "unattributed": 0,
    }
    measured = measure(mlp_step)
    assert measured.columns == by_hand
    assert measured.known_bytes == sum(by_hand.values()) == 172_064_796
    assert measured.phase == "optimizer"
    # After a step nobody holds gradients' temporaries, prediction or loss: what stays is the
    # training state.
    stays = sum(
        by_hand[column] for column in ("parameters", "gradients", "optimizer_state", "batch")
    )
    assert measured.bytes_after_step == (stays, stays)


# Real models --------------------------------------------------------------------------------------


def training(model: nn.Module, loss_of, expected: dict, **options):
    """A step with AdamW; `expected` is told what the columns of the model have to be."""
    tensors = [*model.parameters(), *model.buffers()]
    expected["parameters"] = sum(
        {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values()
    )
    trained = list(model.parameters())
    expected["gradients"] = sum(p.numel() * p.element_size() for p in trained)
    expected["optimizer_state"] = sum(2 * p.numel() * p.element_size() + FLOAT for p in trained)
    optimizer = torch.optim.AdamW(model.parameters(), **options)

    def step():
        optimizer.zero_grad()
        loss = loss_of()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def build_mlp(expected, **options):
    model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))
    inputs, targets = torch.randn(32, 64), torch.randn(32, 64)
    return training(model, lambda: F.mse_loss(model(inputs), targets), expected, **options)


def build_conv(expected, **options):
    """oneDNN reorders weights and images inside its operators: memory that no tensor ever owned."""
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
    images, labels = torch.randn(16, 3, 32, 32), torch.randint(10, (16,))
    return training(model, lambda: F.cross_entropy(model(images), labels), expected, **options)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(32, 64, 2, batch_first=True)
        self.head = nn.Linear(64, 32)

    def forward(self, x):
        return self.head(self.lstm(x)[0])


def build_lstm(expected, **options):
    model, inputs = Recurrent(), torch.randn(8, 16, 32)
    return training(model, lambda: F.mse_loss(model(inputs), inputs), expected, **options)


def build_gpt(expected, batch=4, sequence=64, **options):
    model, tokens = gpt.GPT(gpt.tiny()), torch.randint(256, (batch, sequence + 1))
    return training(
        model, lambda: model(tokens[:, :-1], tokens[:, 1:].contiguous()), expected, **options
    )


def build_vit(expected, **options):
    model, images = vit.ViT(vit.small(layers=2, hidden=64)), torch.randn(4, 1, 32, 32)
    labels = torch.randint(10, (4,))
    return training(model, lambda: model(images, labels), expected, **options)


def build_hugging_face_gpt2(expected, **options):
    dropout = {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1}
    model = small_gpt2(vocab_size=500, n_positions=64, n_embd=64, **dropout)
    tokens = torch.randint(500, (4, 32))
    return training(model, lambda: model(input_ids=tokens, labels=tokens).loss, expected, **options)


def build_hugging_face_llama(expected, batch=4, sequence=32, **options):
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False}
    sizes = {"vocab_size": 500, "hidden_size": 64, "intermediate_size": 128}
    model = small_llama(max_position_embeddings=64, **sizes, **heads)
    tokens = torch.randint(500, (batch, sequence))
    return training(model, lambda: model(input_ids=tokens, labels=tokens).loss, expected, **options)


def name_of(build) -> str:
    return build.__name__.removeprefix("build_")


MODELS = [
    build_mlp,
    build_conv,
    build_lstm,
    build_gpt,
    build_vit,
    build_hugging_face_gpt2,
    build_hugging_face_llama,
]


@pytest.fixture
def traces(monkeypatch):
    """The profiler's exported traces, as they were handed to the meter."""
    seen = []

    def read(trace):
        seen.append(trace)
        return read_trace(trace)

    monkeypatch.setattr(cpu, "read_trace", read)
    return seen


def replay(trace: dict) -> tuple[int, int]:
    """The peak of a trace, twice: by adding up its blocks, and by the allocator's own running
    total.
    """
    events = [entry for entry in trace["traceEvents"] if entry.get("name") == "[memory]"]
    events.sort(key=lambda entry: (entry["ts"], entry["args"]["Ev Idx"]))
    blocks, total, peak, own_peak = {}, 0, 0, 0
    own_before = None
    for entry in events:
        args = entry["args"]
        size, address, own = args["Bytes"], args["Addr"], args["Total Allocated"]
        assert args["Device Type"] == 0
        if own_before is None:
            own_before = own_start = own - size
        assert own == own_before + size, "the allocator reports every event, one after the other"
        own_before = own
        if size > 0:
            assert address not in blocks, "an address is not handed out twice"
            blocks[address] = size
            total += size
        elif address in blocks:
            assert blocks.pop(address) == -size
            total += size
        else:
            own_start += (
                size  # a block from before, which an earlier measurement had seen being born
            )
        peak, own_peak = max(peak, total), max(own_peak, own - own_start)
    return peak, own_peak


@pytest.mark.parametrize("build", MODELS, ids=name_of)
def test_a_real_model_is_measured_to_the_byte(build, traces):
    def seeded():
        torch.manual_seed(0)
        return build(expected)

    expected: dict[str, int] = {}
    gc.collect()
    first, again = measure(seeded), measure(seeded)
    assert (first.peak_bytes, first.peak_bytes) == replay(traces[0])
    assert (again.peak_bytes, again.peak_bytes) == replay(traces[1])
    assert again.peak_bytes == first.peak_bytes
    assert again.columns == first.columns
    assert again.bytes_after_step == first.bytes_after_step
    assert again.losses == first.losses
    assert tuple(first.columns) == COLUMNS
    assert sum(first.columns.values()) == first.peak_bytes
    assert all(size >= 0 for size in first.columns.values())
    assert first.columns["unattributed"] < 0.02 * first.peak_bytes
    assert first.columns["parameters"] == expected["parameters"]
    assert first.columns["optimizer_state"] == expected["optimizer_state"]
    assert first.columns["batch"] > 0
    assert first.outside_bytes == 0
    assert first.timeline.total.max() == first.peak_bytes
    # The peak that is shown and the peak of the curves are the same moment.
    top = int(first.timeline.total.argmax())
    assert {
        name: int(values[top]) for name, values in first.timeline.bytes.items()
    } == first.columns
    assert first.timeline.phase[top] == first.phase


@pytest.mark.parametrize("build", [build_gpt, build_hugging_face_llama], ids=name_of)
def test_gradients_and_state_are_exact_at_a_peak_in_the_optimizer(build):
    """AdamW(foreach=True) holds about one more copy of the model: more than the activations of a
    batch this small.
    """
    expected: dict[str, int] = {}
    measured = measure(lambda: build(expected, batch=1, sequence=4, foreach=True))
    assert measured.phase == "optimizer"
    assert {name: measured.columns[name] for name in expected} == expected
    assert measured.columns["temporaries"] >= expected["parameters"] // 2


# Another tool -------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [build_mlp, build_gpt], ids=name_of)
def test_pytorchs_own_tracker_finds_the_same_peak(build):
    """`MemTracker` follows tensors in a dispatch mode. It keeps a wrapped number alive a little
    longer: 128 bytes.
    """
    tracker_module = pytest.importorskip("torch.distributed._tools.mem_tracker")
    expected: dict[str, int] = {}
    measured = measure(lambda: build(expected))
    with tracker_module.MemTracker() as tracker:
        step = build(expected)
        step()
        tracker.reset_mod_stats()  # it fails on a second iteration without
        step()
    snapshot = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]
    counted = {getattr(kind, "value", kind): size for kind, size in snapshot.items()}
    assert abs(measured.known_bytes - counted["Total"]) <= 128
    assert measured.columns["parameters"] == counted["Parameter"] + counted["Buffer"]
    # What an optimizer makes for the moment, the tracker calls its state.
    moment = measured.columns["temporaries"] if measured.phase == "optimizer" else 0
    assert measured.columns["optimizer_state"] + moment == pytest.approx(
        counted["Optstate"], abs=128
    )


# What is no memory of the allocator's -------------------------------------------------------------


# What operators take for themselves ---------------------------------------------------------------

#: Operators whose scratch depends on the processor or on the number of threads.
PROCESSOR_PROBE = """
    import torch
    from torch import nn
    from torch.nn import functional as F
    from memlab import measure

    def convolution():
        convolve = nn.Conv2d(16, 16, 3, padding=1)
        return nn.Sequential(nn.Conv2d(8, 16, 3), nn.BatchNorm2d(16), nn.LeakyReLU(), convolve)

    def low_precision():
        return nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 64)).bfloat16()

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.project = nn.Linear(32, 96)

        def forward(self, x):
            heads = self.project(x).unflatten(-1, (3, 4, 8)).transpose(1, 3)
            return F.scaled_dot_product_attention(*heads.unbind(2), is_causal=True)

    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(1000, 64)
            self.lstm = nn.LSTM(64, 64, batch_first=True)

        def forward(self, x):
            return F.layer_norm(self.lstm(self.table(x))[0], (64,))

    def run(make, batch):
        def build():
            torch.manual_seed(0)
            model = make()
            inputs = batch()

            def step():
                model(inputs).float().square().sum().backward()
                model.zero_grad()

            return step

        return measure(build, device="cpu")

    for make, batch in (
        (convolution, lambda: torch.randn(4, 8, 32, 32)),
        (low_precision, lambda: torch.randn(64, 256).bfloat16()),
        (Attention, lambda: torch.randn(2, 128, 32)),
        (Words, lambda: torch.randint(0, 1000, (8, 64))),
    ):
        print(make.__name__, run(make, batch).known_bytes)
"""


@pytest.mark.slow
def test_the_known_bytes_are_those_of_any_processor():
    """The same network has the same known bytes with other instructions and more threads."""

    def known_bytes(**settings):
        command = [sys.executable, "-c", textwrap.dedent(PROCESSOR_PROBE)]
        found = subprocess.run(
            command, env=os.environ | settings, capture_output=True, text=True, check=True
        )
        return found.stdout

    as_it_is = known_bytes()
    assert len(as_it_is.splitlines()) == 4
    old = {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41"}
    assert known_bytes(**old, OMP_NUM_THREADS="1") == as_it_is
    assert known_bytes(ONEDNN_MAX_CPU_ISA="AVX2", OMP_NUM_THREADS="4") == as_it_is


def test_a_convolutions_scratch_is_told_apart():
    def build():
        convolve = nn.Conv2d(8, 16, 3, bias=False)
        image = torch.randn(4, 8, 34, 34)
        return lambda: convolve(image).sum().backward()

    measured = measure(build, steps=1, device="cpu")
    scratch = [block for block in measured.ledger.blocks if block.scratch]
    assert {block.operator for block in scratch} >= {
        "aten::conv2d",
        "aten::convolution_backward",
    }
    # In backward: weight and image, the gradients of the weight and of what the convolution made,
    # and the loss with its gradient.
    weight, image, made = 16 * 8 * 3 * 3, 4 * 8 * 34 * 34, 4 * 16 * 32 * 32
    assert measured.known_bytes == FLOAT * (2 * weight + image + made) + 2 * FLOAT


def test_memory_maps_are_reported_apart(tmp_path):
    meter = Meter(torch.device("cpu"))
    meter.start()
    mapped = torch.from_file(str(tmp_path / "file"), shared=True, size=5000, dtype=torch.uint8)
    owned = torch.empty(3000, dtype=torch.uint8)
    shared = torch.empty(2000, dtype=torch.uint8).share_memory_()
    del mapped, owned, shared
    readings = meter.stop()
    assert [event.bytes for event in readings.mapped] == [5000, 2000, -5000, -2000]
    assert [event.bytes for event in readings.events if abs(event.bytes) >= 2000] == [
        3000,
        2000,
        -2000,
        -3000,
    ]


def test_an_offload_to_a_file_is_a_saving(tmp_path):
    """To the profiler a mapped file looks like an allocation. It is none: the file system gives it
    room.
    """

    def build(offload):
        torch.manual_seed(0)
        layers = nn.Sequential(
            *[module for _ in range(4) for module in (nn.Linear(64, 64), nn.Tanh())]
        )
        inputs, count = torch.randn(512, 64), 0

        def pack(tensor):
            nonlocal count
            if isinstance(tensor, nn.Parameter):
                return tensor
            count += 1
            path = str(tmp_path / f"{count}")
            return (
                torch.from_file(path, shared=True, size=tensor.numel())
                .view(tensor.shape)
                .copy_(tensor)
            )

        def step():
            for parameter in layers.parameters():
                parameter.grad = None
            hooks = torch.autograd.graph.saved_tensors_hooks(
                pack if offload else lambda t: t, lambda t: t
            )
            with hooks:
                loss = layers(inputs).sum()
            loss.backward()

        return step

    plain, offloaded = measure(lambda: build(False)), measure(lambda: build(True))
    activation = 512 * 64 * FLOAT
    assert plain.columns["activations"] == 3 * activation + 8
    assert offloaded.columns["activations"] == 8
    assert offloaded.known_bytes <= plain.known_bytes - 2 * activation
    # The output of each Tanh, the input of each linear layer, and (a view, so no Parameter) three
    # transposed weights.
    assert offloaded.outside_bytes == 8 * activation + 3 * 64 * 64 * FLOAT
    assert plain.outside_bytes == 0


# The profiler -------------------------------------------------------------------------------------


def profiler_is_off() -> bool:
    return not torch._C._autograd._profiler_enabled()


def test_a_running_profiler_is_refused_and_left_alone():
    """A second profiler would end the first without a word (its owner then finds nothing)."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as users:
        torch.ones(9)
        with pytest.raises(RuntimeError, match="profiler is recording already"):
            measure(lambda: build_mlp({}))
        torch.ones(9)
    assert {event.key: event.count for event in users.key_averages()}["aten::ones"] == 2
    assert profiler_is_off()


@pytest.mark.parametrize("when", [0, 1, 2])
def test_a_profiler_on_a_schedule_is_safe(when):
    """While it warms up it is not on yet, and a profiler started then would end the process."""
    with profile(
        activities=[ProfilerActivity.CPU], schedule=schedule(wait=1, warmup=1, active=1)
    ) as users:
        for iteration in range(3):
            torch.ones(9)
            if iteration == when == 0:
                assert measure(lambda: lambda: torch.ones(100)).peak_bytes >= 400
            elif iteration == when:
                with pytest.raises(RuntimeError, match="profiler is recording already"):
                    measure(lambda: lambda: torch.ones(100))
            users.step()
    assert any(event.key == "aten::ones" for event in users.key_averages())


def test_a_finished_profiler_is_no_obstacle():
    with profile(
        activities=[ProfilerActivity.CPU], schedule=schedule(wait=1, warmup=1, active=1)
    ) as users:
        for _ in range(3):
            users.step()
    assert measure(lambda: lambda: torch.ones(100)).peak_bytes >= 400
    assert users is not None


def test_a_profiler_that_is_started_inside_ends_the_measurement_with_an_error():
    """Reading our trace then would end the process."""

    def build():
        def step():
            with profile(activities=[ProfilerActivity.CPU]):
                torch.ones(9)

        return step

    with pytest.raises(RuntimeError, match="ended by another .*profile.* that ran inside it"):
        measure(build)
    assert profiler_is_off()
    assert measure(lambda: lambda: torch.ones(100)).peak_bytes >= 400


def test_standard_error_stays_clean():
    """The profiler announces itself there, and the allocator warns of blocks from before: a
    notebook would show it.
    """
    code = """
        import torch
        from torch import nn
        from memlab import measure, watch

        old = [nn.Linear(64, 64)]

        def build():
            model, inputs = nn.Linear(64, 64), torch.randn(4, 64)

            def step():
                old.clear()  # born before, freed inside
                model(inputs).sum().backward()

            return step

        measure(build)
        step = build()
        step()
        with watch() as w:
            step()
        old.append(nn.Linear(64, 64))
        with watch() as w:
            step()
        print(w.measurement.peak_bytes)
    """
    environment = {name: value for name, value in os.environ.items() if name != "KINETO_LOG_LEVEL"}
    ran = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
    )
    assert int(ran.stdout) > 0
    assert ran.stderr == ""


def test_another_threads_allocations_are_not_the_profilers():
    """Why the meter refuses a model that runs in another thread: it would count nothing of it."""
    meter = Meter(torch.device("cpu"))
    meter.start()
    kept = []
    thread = threading.Thread(target=lambda: kept.append(torch.empty(10_000, dtype=torch.uint8)))
    thread.start()
    thread.join()
    here = torch.empty(20_000, dtype=torch.uint8)
    kept.clear()
    readings = meter.stop()
    assert [event.bytes for event in readings.events if event.bytes in (10_000, 20_000)] == [20_000]
    del here


# What the meter builds on, and PyTorch does not promise -------------------------------------------


def test_the_trace_has_the_fields_that_the_meter_reads(tmp_path):
    """If this fails, PyTorch has changed its trace: `read_trace` in memlab/meters/cpu.py has to
    follow.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    weight = torch.ones(4, 4, requires_grad=True)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        loss = (weight @ torch.ones(4, 4)).sum()
        loss.backward()
    profiler.export_chrome_trace(str(tmp_path / "trace.json"))
    trace = json.loads((tmp_path / "trace.json").read_text())
    assert int(trace["baseTimeNanoseconds"]) > 0
    memory = [entry for entry in trace["traceEvents"] if entry.get("name") == "[memory]"]
    assert memory
    for entry in memory:
        assert {"Bytes", "Addr", "Ev Idx", "Total Allocated", "Device Type"} <= entry["args"].keys()
    operators: dict[str, dict] = {}
    for entry in sorted(
        (e for e in trace["traceEvents"] if e.get("cat") == "cpu_op"), key=lambda e: e["ts"]
    ):
        operators.setdefault(entry["name"], entry)  # the first of each name: forward's
    forward, node = operators["aten::mm"], operators[cpu._BACKWARD + "MmBackward0"]
    assert forward["ph"] == "X" and {"ts", "dur", "tid"} <= forward.keys()
    assert forward["args"]["Sequence number"] == node["args"]["Sequence number"] >= 0
    # What runs without gradients has no sequence number: a recomputation is told apart by that.
    assert "Sequence number" not in operators["aten::transpose"]["args"]


def test_pytorch_says_whether_a_profiler_runs():
    """`torch._C._autograd._profiler_enabled` is private; without it a second profiler ends the
    process.
    """
    assert cpu._profiler_enabled() is False
    with profile(activities=[ProfilerActivity.CPU]):
        assert cpu._profiler_enabled() is True
    assert cpu._profiler_enabled() is False


def test_the_loggers_level_is_put_back():
    """The level is optional: without it one more warning is seen, and nothing breaks."""
    level = cpu._log_level()
    if level is None:
        pytest.skip("this PyTorch does not show its logger's level")
    before = level.value
    meter = Meter(torch.device("cpu"))
    meter.start()
    assert level.value == 2
    meter.stop()
    assert level.value == before


def test_the_meter_works_without_the_loggers_level(monkeypatch):
    monkeypatch.setattr(cpu, "_log_level", lambda: None)
    assert measure(lambda: lambda: torch.ones(100)).peak_bytes >= 400


def test_read_trace_on_a_trace_made_by_hand():
    def memory(ts, index, address, size, total, device=0):
        args = {
            "Ev Idx": index,
            "Addr": address,
            "Bytes": size,
            "Total Allocated": total,
            "Device Type": device,
        }
        return {"name": "[memory]", "ph": "i", "ts": ts, "args": args}

    def operator(name, ts, dur, **args):
        return {
            "name": name,
            "ph": "X",
            "cat": "cpu_op",
            "ts": ts,
            "dur": dur,
            "tid": 7,
            "args": args,
        }

    trace = {
        "baseTimeNanoseconds": 1_000_000,
        "traceEvents": [
            memory(3.5, 9, 0xA, -100, 0),
            memory(2.0, 5, 0xC, 64, 0),  # a memory map: the total knows nothing of it
            memory(2.0, 4, 0xB, 50, 150),
            memory(1.25, 3, 0xA, 100, 100),
            memory(2.5, 6, 0xB, -50, 100),
            memory(4.0, 10, 0xC, -64, 0),
            memory(5.0, 11, 0xC, 30, 30),  # the address of a map that is gone, now the allocator's
            memory(5.5, 12, 0xC, -30, 0),
            memory(1.0, 2, 0xA, 512, 512, device=1),  # a GPU's
            operator("aten::mm", 1.0, 0.5, **{"Sequence number": 3}),
            operator(
                "autograd::engine::evaluate_function: MmBackward0",
                2.0,
                1.0,
                **{"Sequence number": 3},
            ),
            operator("aten::empty", 1.1, 0.1),
            {
                "name": "python_function",
                "ph": "X",
                "cat": "python_function",
                "ts": 0,
                "dur": 1,
                "tid": 7,
                "args": {},
            },
            {"name": "process_name", "ph": "M", "args": {}},
        ],
    }
    events, mapped, spans = read_trace(trace)
    assert events == [
        (1_001_250, 0xA, 100),
        (1_002_000, 0xB, 50),
        (1_002_500, 0xB, -50),
        (1_003_500, 0xA, -100),
        (1_005_000, 0xC, 30),
        (1_005_500, 0xC, -30),
    ]
    assert mapped == [(1_002_000, 0xC, 64), (1_004_000, 0xC, -64)]
    assert [(span.kind, span.name, span.start, span.end, span.sequence) for span in spans] == [
        ("operator", "aten::mm", 1_001_000, 1_001_500, 3),
        ("backward", "MmBackward0", 1_002_000, 1_003_000, 3),
        ("operator", "aten::empty", 1_001_100, 1_001_200, -1),
    ]
