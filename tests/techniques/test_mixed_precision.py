"""Mixed precision: which bytes change and which do not, the gradients of a handwritten autocast
block, and loss scaling.
"""

import inspect
import json
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from memlab.techniques import mixed_precision
from memlab.techniques.gradient_checkpointing import apply_gradient_checkpointing
from memlab.techniques.mixed_precision import (
    apply_mixed_precision,
    bf16_support,
    precision_support,
)
from tests.helpers import small_gpt2

BATCH, INPUTS, HIDDEN, OUTPUTS = 16, 24, 32, 8


def mlp():
    return nn.Sequential(nn.Linear(INPUTS, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, OUTPUTS))


def saved_tensors(run, exclude=()):
    """What hooks around `run` see saved: one tensor a storage, without those of `exclude`, in order
    of saving."""
    storages = {}

    def pack(tensor):
        storages.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = run()
    for tensor in exclude:
        storages.pop(tensor.untyped_storage().data_ptr(), None)
    return list(storages.values()), output


def gradients(model, run):
    model.zero_grad()
    run().float().square().mean().backward()
    return [parameter.grad for parameter in model.parameters()]


def equal(one, other):
    return len(one) == len(other) and all(map(torch.equal, one, other))


# --- What the device can do -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("has", "bf16", "fp16"),
    [
        ({"avx2": True, "avx512_f": True, "avx512_bf16": False}, "emulated", "emulated"),
        ({"avx512_bf16": True}, "native", "emulated"),
        ({"amx_bf16": True, "amx_fp16": False}, "native", "emulated"),
        ({"avx512_bf16": True, "avx512_fp16": True}, "native", "native"),
        (
            {"architecture": "arm64", "neon": True, "fp16_arith": True, "bf16": False},
            "emulated",
            "native",
        ),
        (
            {"architecture": "arm64", "neon": True, "fp16_arith": True, "bf16": True},
            "native",
            "native",
        ),
        ({}, "emulated", "emulated"),
    ],
)
def test_a_cpu_is_native_when_it_has_the_instructions(monkeypatch, has, bf16, fp16):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has)
    assert bf16_support("cpu") == precision_support(torch.bfloat16, torch.device("cpu")) == bf16
    assert precision_support(torch.float16, "cpu") == fp16


def test_this_machine_answers():
    names = set(torch.cpu.get_capabilities())
    known = {name for names in mixed_precision._CPU_INSTRUCTIONS.values() for name in names}
    assert names & known  # else the names have changed, and everything would be "emulated"
    assert bf16_support() in ("native", "emulated", "none")


@pytest.mark.parametrize(
    ("native", "emulated", "answer"),
    [(True, True, "native"), (False, True, "emulated"), (False, False, "none")],
)
def test_emulation_is_told_apart_on_cuda(monkeypatch, native, emulated, answer):
    """A T4 answers False and True: plain `is_bf16_supported()` would hide that."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        torch.cuda, "device", lambda device: torch.autograd.profiler.record_function("no device")
    )
    monkeypatch.setattr(
        torch.cuda,
        "is_bf16_supported",
        lambda including_emulation=True: emulated if including_emulation else native,
    )
    assert bf16_support("cuda") == answer
    assert precision_support(torch.float16, "cuda:0") == "native"


def test_questions_without_an_answer_are_refused(monkeypatch):
    for dtype in (torch.float32, torch.int8, "bfloat16"):
        with pytest.raises(ValueError, match="must be torch.bfloat16 or torch.float16"):
            precision_support(dtype, "cpu")
    with pytest.raises(ValueError, match="Nothing is known of meta devices"):
        bf16_support("meta")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="no CUDA device"):
        bf16_support("cuda")


@pytest.mark.gpu
def test_a_gpu_answers():
    major, _ = torch.cuda.get_device_capability()
    assert bf16_support() == bf16_support("cuda") == ("native" if major >= 8 else "emulated")


# --- Which bytes change ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_saved_activations_halve_and_the_copy_of_a_weight_costs_two_bytes_a_parameter(dtype):
    model, x = mlp(), torch.randn(BATCH, INPUTS)
    weights = list(model.parameters())
    before, _ = saved_tensors(lambda: model(x), weights)
    assert [(tensor.dtype, tensor.shape) for tensor in before] == [
        (torch.float32, (BATCH, INPUTS)),
        (torch.float32, (BATCH, HIDDEN)),
    ]
    handle = apply_mixed_precision(model, dtype)
    after, output = saved_tensors(lambda: model(x), weights)
    assert output.dtype == dtype
    assert {tensor.dtype for tensor in after} == {dtype}
    sizes = sorted(tensor.untyped_storage().nbytes() for tensor in after)
    # The input, the hidden layer, and the second layer's weight. The first layer's is not saved: no
    # gradient goes to the input.
    assert sizes == sorted([2 * BATCH * INPUTS, 2 * BATCH * HIDDEN, 2 * HIDDEN * OUTPUTS])
    handle.remove()
    assert equal(saved_tensors(lambda: model(x), weights)[0], before)


def test_with_a_small_batch_more_is_saved_than_in_fp32_and_with_a_large_one_less():
    def saved(model, batch):
        tensors, _ = saved_tensors(lambda: model(torch.randn(batch, INPUTS)), model.parameters())
        return sum(tensor.untyped_storage().nbytes() for tensor in tensors)

    # Half of 4 (INPUTS + HIDDEN) bytes a sample is saved, 2 HIDDEN OUTPUTS bytes of weight are
    # added: they balance at HIDDEN OUTPUTS / (INPUTS + HIDDEN) samples, 4.57.
    model = mlp()
    full = {batch: saved(model, batch) for batch in (4, 5)}
    apply_mixed_precision(model)
    assert saved(model, 4) > full[4] and saved(model, 5) < full[5]
    assert math.floor(HIDDEN * OUTPUTS / (INPUTS + HIDDEN)) == 4


@pytest.mark.parametrize(("cache_weights", "copies"), [(True, 1), (False, 2)])
def test_the_cache_makes_one_copy_of_a_weight_that_is_used_twice(cache_weights, copies):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(HIDDEN, HIDDEN, bias=False)

        def forward(self, x):
            return self.linear(self.linear(x))

    model, x = Twice(), torch.randn(BATCH, HIDDEN, requires_grad=True)
    apply_mixed_precision(model, cache_weights=cache_weights)
    tensors, _ = saved_tensors(lambda: model(x), [model.linear.weight])
    saved = sum(tensor.untyped_storage().nbytes() for tensor in tensors)
    assert saved - 2 * 2 * BATCH * HIDDEN == copies * 2 * model.linear.weight.numel()
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize(("cache_weights", "bytes_each"), [(True, 2), (False, 0)])
def test_the_cache_holds_two_bytes_for_each_parameter_until_autocast_ends(
    cache_weights, bytes_each, tmp_path
):
    model, x = mlp(), torch.randn(BATCH, INPUTS)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    apply_mixed_precision(model, cache_weights=cache_weights)
    model(x)
    # Nothing is saved for backward, and the outer context keeps the cache from being emptied too
    # early.
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            output = model(x)
    profiler.export_chrome_trace(str(tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    left = sum(event["args"]["Bytes"] for event in events if event["name"] == "[memory]")
    assert left == bytes_each * parameters + output.nbytes


def test_weights_gradients_and_adam_state_stay_fp32_to_the_byte():
    model, x = mlp(), torch.randn(BATCH, INPUTS)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    apply_mixed_precision(model)
    optimizer = torch.optim.Adam(model.parameters())
    model(x).float().sum().backward()
    optimizer.step()
    gradients = [parameter.grad for parameter in model.parameters()]
    state = [
        value for entry in optimizer.state.values() for value in entry.values() if value.ndim > 0
    ]
    for tensors, bytes_each in ((list(model.parameters()), 4), (gradients, 4), (state, 8)):
        assert {tensor.dtype for tensor in tensors} == {torch.float32}
        assert sum(tensor.nbytes for tensor in tensors) == bytes_each * parameters


# --- The same numbers -----------------------------------------------------------------------------


@pytest.mark.parametrize("cache_weights", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_are_those_of_a_handwritten_autocast_block(dtype, cache_weights):
    model, x = mlp(), torch.randn(BATCH, INPUTS)

    def by_hand():
        with torch.autocast("cpu", dtype):
            return model(x)

    expected = gradients(model, by_hand)
    full = gradients(model, lambda: model(x))
    assert not equal(expected, full)
    handle = apply_mixed_precision(model, dtype, cache_weights=cache_weights)
    assert equal(gradients(model, lambda: model(x)), expected)
    handle.remove()
    handle.remove()
    assert equal(gradients(model, lambda: model(x)), full)
    assert "forward" not in vars(model)


@pytest.mark.parametrize(("dtype", "epsilon"), [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
def test_gradients_are_close_to_fp32(dtype, epsilon):
    """A rounding is at most `epsilon`, and over 30 seeds the largest difference was 1.7 of these.
    That is so for a smooth activation: a ReLU turns some sums near zero off or on by rounding,
    which made 36 of it."""
    model, x = mlp(), torch.randn(256, INPUTS)
    model[1] = nn.GELU()
    full = gradients(model, lambda: model(x))
    apply_mixed_precision(model, dtype)
    for mixed, exact in zip(gradients(model, lambda: model(x)), full, strict=True):
        error = (mixed - exact).norm() / exact.norm()
        assert 0 < error < 3 * epsilon


def test_outputs_keep_their_form():
    class Nested(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(INPUTS, OUTPUTS)

        def forward(self, x, *, tag):
            y = self.linear(x)
            return {"logits": y, "rest": (tag, [F.softmax(y, -1), None])}

    model, x, tag = Nested(), torch.randn(BATCH, INPUTS), object()
    signature = inspect.signature(model.forward)
    apply_mixed_precision(model)
    output = model(x, tag=tag)
    assert output["logits"].dtype == torch.bfloat16  # as autocast leaves it
    assert output["rest"][0] is tag and output["rest"][1][1] is None
    assert torch.equal(output["rest"][1][0], F.softmax(output["logits"], -1))
    assert inspect.signature(model.forward) == signature


def test_a_hugging_face_model_keeps_its_output_type():
    model = small_gpt2(vocab_size=50, n_positions=8)
    tokens = torch.randint(50, (2, 8))
    plain = model.eval()(input_ids=tokens, labels=tokens, use_cache=False)
    apply_mixed_precision(model)
    mixed = model(input_ids=tokens, labels=tokens, use_cache=False)
    assert type(mixed) is type(plain) and list(mixed) == list(plain)
    assert mixed.logits.dtype == torch.bfloat16 and mixed.loss.dtype == torch.float32
    assert abs(mixed.loss - plain.loss) < 2**-8 * plain.loss
    mixed.loss.backward()
    assert {parameter.grad.dtype for parameter in model.parameters()} == {torch.float32}


def test_under_checkpointing_the_recomputation_is_in_mixed_precision_too():
    model = nn.Sequential(*(nn.Sequential(mlp(), nn.Linear(OUTPUTS, INPUTS)) for _ in range(3)))
    x = torch.randn(BATCH, INPUTS)
    apply_mixed_precision(model)
    expected = gradients(model, lambda: model(x))
    apply_gradient_checkpointing(model, list(model))
    assert equal(gradients(model, lambda: model(x)), expected)


# --- Applying and removing ------------------------------------------------------------------------


def test_applying_twice_is_refused():
    model = mlp()
    handle = apply_mixed_precision(model)
    with pytest.raises(ValueError, match="already: remove"):
        apply_mixed_precision(model, torch.float16)
    handle.remove()
    apply_mixed_precision(model, torch.float16)


@pytest.mark.parametrize(
    ("model", "dtype", "error", "message"),
    [
        (torch.sin, torch.bfloat16, TypeError, "must be a torch.nn.Module"),
        (nn.ReLU(), torch.bfloat16, ValueError, "ReLU has no parameters"),
        (nn.Linear(2, 2), torch.float32, ValueError, "must be torch.bfloat16 or torch.float16"),
        (nn.Linear(2, 2), torch.float64, ValueError, "must be torch.bfloat16 or torch.float16"),
        (nn.Linear(2, 2).bfloat16(), torch.bfloat16, ValueError, "but Linear has torch.bfloat16"),
        (nn.Linear(2, 2).half(), torch.bfloat16, ValueError, "but Linear has torch.float16"),
        (nn.Linear(2, 2).double(), torch.bfloat16, ValueError, "but Linear has torch.float64"),
        (nn.Linear(2, 2, device="meta"), torch.bfloat16, ValueError, "Nothing is known of meta"),
        (
            nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta")),
            torch.bfloat16,
            ValueError,
            "one kind of device, but it is on cpu, meta",
        ),
    ],
)
def test_what_cannot_be_mixed_is_refused(model, dtype, error, message):
    with pytest.raises(error, match=message):
        apply_mixed_precision(model, dtype)
    assert "forward" not in getattr(model, "__dict__", {})


def test_a_dtype_that_the_device_lacks_is_refused(monkeypatch):
    monkeypatch.setattr(mixed_precision, "precision_support", lambda dtype, device: "none")
    with pytest.raises(ValueError, match="cpu does not support torch.bfloat16"):
        apply_mixed_precision(mlp())


# --- Loss scaling, which FP16 needs ---------------------------------------------------------------


def test_scaling_saves_gradients_that_would_be_zero():
    """The reason for it all: 1e-8 is below FP16's smallest number, 6e-8."""
    weight = nn.Parameter(torch.ones(4))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    scaler = torch.amp.GradScaler("cpu")

    def loss():
        return (weight.half() * 1).float().sum() * 1e-8

    loss().backward()
    assert not weight.grad.any()
    optimizer.zero_grad()
    scaler.scale(loss()).backward()
    scaler.unscale_(optimizer)
    assert torch.allclose(weight.grad, torch.full((4,), 1e-8), rtol=2**-11, atol=0)


def test_a_step_whose_gradients_overflow_is_skipped_and_the_next_ones_train():
    model = mlp()
    apply_mixed_precision(model, torch.float16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    # 2^24 times the gradients overflows FP16: the scale falls until none does, then it may grow.
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24, growth_interval=4)
    x, y = torch.randn(BATCH, INPUTS), torch.randn(BATCH, OUTPUTS)
    stepped, scales = [], [scaler.get_scale()]
    for _ in range(14):
        optimizer.zero_grad()
        before = [parameter.clone() for parameter in model.parameters()]
        scaler.scale(F.mse_loss(model(x).float(), y)).backward()
        scaler.step(optimizer)
        scaler.update()
        stepped.append(not equal(before, list(model.parameters())))
        scales.append(scaler.get_scale())
    assert not stepped[0] and any(stepped)
    for did, scale, next_scale in zip(stepped, scales, scales[1:], strict=False):
        assert next_scale == scale / 2 if not did else next_scale in (scale, 2 * scale)
    assert any(after > before for before, after in zip(scales, scales[1:], strict=False))


@pytest.mark.gpu
def test_weights_that_wait_on_the_host_do_not_keep_autocast_from_the_gpu():
    """As where they are streamed: the model computes on the GPU, wherever its first
    parameter is.
    """

    class Streamed(nn.Linear):
        def forward(self, x):
            return nn.functional.linear(x, self.weight.to(x.device), self.bias)

    model = Streamed(8, 8)
    model.bias = nn.Parameter(model.bias.detach().cuda())
    apply_mixed_precision(model, torch.bfloat16)
    assert model(torch.randn(2, 8, device="cuda")).dtype == torch.bfloat16
