"""Mixed precision: which bytes change and which do not, the gradients of a handwritten autocast
block, and loss scaling that agrees with torch.amp.GradScaler step by step."""

import copy
import inspect
import json
import math
import pickle
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from memlab.techniques import mixed_precision
from memlab.techniques.gradient_checkpointing import apply_gradient_checkpointing
from memlab.techniques.mixed_precision import (
    LossScaler,
    apply_mixed_precision,
    bf16_support,
    precision_support,
)

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
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 50, "n_positions": 8, "bos_token_id": None, "eos_token_id": None}
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_layer=2, n_head=2, n_embd=32, **sizes)
    )
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


def test_names_keys_and_classes_stay_and_copies_wait_for_remove():
    model, x = mlp(), torch.randn(BATCH, INPUTS)
    names, keys = [name for name, _ in model.named_parameters()], list(model.state_dict())
    handle = apply_mixed_precision(model)
    assert [name for name, _ in model.named_parameters()] == names and list(
        model.state_dict()
    ) == keys
    assert type(model) is nn.Sequential
    for duplicate in (copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="remove\\(\\) it before copying or pickling"):
            duplicate(model)
    handle.remove()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), model(x))


def test_applying_twice_is_refused():
    model = mlp()
    handle = apply_mixed_precision(model)
    with pytest.raises(ValueError, match="already: remove"):
        apply_mixed_precision(model, torch.float16)
    handle.remove()
    apply_mixed_precision(model, torch.float16)


def test_a_forward_that_somebody_wrapped_before_is_kept_and_after_is_respected():
    model, x = mlp(), torch.randn(BATCH, INPUTS)
    original = model.forward
    model.forward = doubled = lambda x: 2 * original(x)
    handle = apply_mixed_precision(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(x), doubled(x))
    ours, model.forward = model.forward, doubled
    with pytest.raises(RuntimeError, match="undo that first"):
        handle.remove()
    model.forward = ours
    handle.remove()
    assert model.forward is doubled


def test_a_deleted_model_is_freed_at_once():
    model = mlp()
    ghost = weakref.ref(model)
    handle = apply_mixed_precision(model)
    model(torch.randn(BATCH, INPUTS)).sum().backward()
    del model
    assert ghost() is None
    handle.remove()


@pytest.mark.parametrize(
    ("model", "dtype", "error", "message"),
    [
        (torch.sin, torch.bfloat16, TypeError, "must be a torch.nn.Module"),
        (nn.ReLU(), torch.bfloat16, ValueError, "ReLU has no parameters"),
        (nn.Linear(2, 2), torch.float32, ValueError, "must be torch.bfloat16 or torch.float16"),
        (nn.Linear(2, 2), torch.float64, ValueError, "must be torch.bfloat16 or torch.float16"),
        (
            nn.Linear(2, 2).bfloat16(),
            torch.bfloat16,
            ValueError,
            "must be FP32, but Linear has torch.bfloat16",
        ),
        (
            nn.Linear(2, 2).half(),
            torch.bfloat16,
            ValueError,
            "must be FP32, but Linear has torch.float16",
        ),
        (
            nn.Linear(2, 2).double(),
            torch.bfloat16,
            ValueError,
            "must be FP32, but Linear has torch.float64",
        ),
        (
            nn.Linear(2, 2, device="meta"),
            torch.bfloat16,
            ValueError,
            "Nothing is known of meta devices",
        ),
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


# --- Loss scaling ---------------------------------------------------------------------------------


def run_beside_grad_scaler(optimizer_class, make_loss, steps=14, clip=None, **settings):
    """Train twice, with ours and with GradScaler, and return what happened at each step of both."""
    torch.manual_seed(0)
    ours, theirs = mlp(), mlp()
    theirs.load_state_dict(ours.state_dict())
    scaler = LossScaler(**settings)
    grad_scaler = torch.amp.GradScaler("cpu", **settings)
    optimizers = [optimizer_class(model.parameters(), lr=0.05) for model in (ours, theirs)]
    logs = [], []
    for step in range(steps):
        x, y = torch.randn(BATCH, INPUTS), torch.randn(BATCH, OUTPUTS)
        weights = [parameter.clone() for parameter in theirs.parameters()]
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            loss = make_loss(model, x, y, step)
            (scaler if model is ours else grad_scaler).scale(loss).backward()
        if clip:
            scaler.unscale_(optimizers[0])
            grad_scaler.unscale_(optimizers[1])
            for model in (ours, theirs):
                nn.utils.clip_grad_norm_(model.parameters(), clip)
        stepped = scaler.step(optimizers[0])
        grad_scaler.step(optimizers[1])
        grad_scaler.update()
        logs[0].append(
            (stepped, scaler.scale_factor, *(parameter.clone() for parameter in ours.parameters()))
        )
        moved = not equal(weights, list(theirs.parameters()))
        logs[1].append(
            (
                moved,
                grad_scaler.get_scale(),
                *(parameter.clone() for parameter in theirs.parameters()),
            )
        )
    return logs


def fp16_loss(model, x, y, step):
    with torch.autocast("cpu", torch.float16):
        output = model(x)
    return F.mse_loss(output.float(), y)


def one_infinite_loss(model, x, y, step):
    return F.mse_loss(model(x), y) * (float("inf") if step in (2, 3, 9) else 1.0)


def one_nan_weight_gradient(model, x, y, step):
    loss = F.mse_loss(model(x), y)
    if step == 4:
        loss = (
            loss + (model[2].bias[3] * 0).sqrt()
        )  # its gradient is 0 / 0, and that of no other weight
    return loss


@pytest.mark.parametrize("clip", [None, 0.1])
@pytest.mark.parametrize("optimizer_class", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize(
    ("make_loss", "settings", "skips"),
    [
        # 2^24 times the gradients overflows FP16: the scale falls until none does, then it may grow
        # again.
        (fp16_loss, {"init_scale": 2.0**24, "growth_interval": 4}, None),
        (one_infinite_loss, {"init_scale": 2.0**16, "growth_interval": 3}, [2, 3, 9]),
        (one_nan_weight_gradient, {"growth_interval": 2}, [4]),
        (
            one_infinite_loss,
            {
                "init_scale": 1024.0,
                "growth_factor": 4.0,
                "backoff_factor": 0.25,
                "growth_interval": 1,
            },
            [2, 3, 9],
        ),
        (lambda *args: fp16_loss(*args), {"init_scale": 2.0**126, "growth_interval": 1}, None),
    ],
    ids=["fp16 overflow", "infinite", "nan", "factors", "largest scale"],
)
def test_the_same_scale_skips_and_weights_as_grad_scaler(
    make_loss, settings, skips, optimizer_class, clip
):
    steps = 120 if settings.get("init_scale") == 2.0**126 else 14
    ours, theirs = run_beside_grad_scaler(
        optimizer_class, make_loss, steps=steps, clip=clip, **settings
    )
    for step, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        assert one[:2] == other[:2], step
        assert equal(one[2:], other[2:]), step
    skipped = [step for step, entry in enumerate(ours) if not entry[0]]
    assert skipped and len(skipped) < len(ours)  # the overflow was provoked, and got over
    assert skips is None or skipped == skips
    scales = [entry[1] for entry in ours]
    assert max(scales) > min(scales) and any(
        b > a for a, b in zip(scales, scales[1:], strict=False)
    )


def test_the_scale_stops_where_fp32_ends():
    ours, theirs = run_beside_grad_scaler(
        torch.optim.SGD,
        lambda model, x, y, step: model[2].bias.sum() * 2.0**-60,
        steps=6,
        init_scale=2.0**125,
        growth_interval=1,
    )
    assert (
        [entry[1] for entry in ours]
        == [entry[1] for entry in theirs]
        == [2.0**126] + [2.0**127] * 5
    )


def test_scaling_saves_gradients_that_would_be_zero():
    """The reason for it all: 1e-8 is below FP16's smallest number, 6e-8."""
    weight = nn.Parameter(torch.ones(4))
    optimizer, scaler = torch.optim.SGD([weight], lr=1.0), LossScaler()
    for scale, expected in ((lambda loss: loss, 0.0), (scaler.scale, 1e-8)):
        optimizer.zero_grad()
        scale((weight.half() * 1).float().sum() * 1e-8).backward()
        if expected:
            scaler.unscale_(optimizer)
        assert torch.allclose(weight.grad, torch.full((4,), expected), rtol=2**-11, atol=0)


def test_a_step_waits_for_the_device_once():
    waits = 0

    class Counter(TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            nonlocal waits
            waits += operator is torch.ops.aten._local_scalar_dense.default
            return operator(*args, **(kwargs or {}))

    model, scaler = mlp(), LossScaler()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for expected in (1, 2):
        with Counter():
            scaler.scale(model(torch.randn(BATCH, INPUTS)).sum()).backward()
            scaler.unscale_(optimizer)
            assert scaler.step(optimizer)
        assert waits == expected


def test_looking_for_overflow_takes_no_memory_of_a_gradients_size():
    weight = nn.Parameter(torch.ones(1000, 1000))
    optimizer, scaler = torch.optim.SGD([weight], lr=0.1), LossScaler()
    largest = 0

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            nonlocal largest
            output = operator(*args, **(kwargs or {}))
            for tensor in output if isinstance(output, tuple) else (output,):
                if isinstance(tensor, torch.Tensor) and not any(
                    tensor is argument for argument in args
                ):
                    largest = max(largest, tensor.nbytes)
            return output

    scaler.scale(weight.sum()).backward()
    with Largest():
        scaler.unscale_(optimizer)
    assert 0 < largest <= 8


def test_an_fp16_loss_is_scaled_in_fp32():
    loss = torch.tensor(2.0, dtype=torch.float16, requires_grad=True)
    assert LossScaler().scale(loss).item() == 2.0 * 2**16  # beyond FP16's 65,504


def test_two_optimizers_step_together_or_not_at_all():
    model, scaler = mlp(), LossScaler(init_scale=8.0)
    optimizers = [torch.optim.SGD(layer.parameters(), lr=0.1) for layer in (model[0], model[2])]
    x = torch.randn(BATCH, INPUTS)
    before = [parameter.clone() for parameter in model.parameters()]
    scaler.scale(model(x).sum()).backward()
    model[2].bias.grad[0] = float("inf")
    assert scaler.step(*optimizers) is False
    assert scaler.scale_factor == 4.0 and equal(before, list(model.parameters()))
    model.zero_grad()
    scaler.scale(model(x).sum()).backward()
    assert scaler.step(*optimizers) is True
    assert all(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_sparse_and_empty_gradients():
    for value, stepped in ((1.0, True), (float("nan"), False)):
        embedding, empty = nn.Embedding(10, 4, sparse=True), nn.Parameter(torch.zeros(0))
        optimizer, scaler = (
            torch.optim.SGD([*embedding.parameters(), empty], lr=0.1),
            LossScaler(init_scale=8.0),
        )
        scaler.scale(embedding(torch.tensor([1, 1, 3])).sum() * value + empty.sum()).backward()
        scaler.unscale_(optimizer)
        assert embedding.weight.grad.is_sparse
        if stepped:
            assert embedding.weight.grad.to_dense()[:, 0].tolist() == [0, 2, 0, 1] + [0] * 6
        assert scaler.step(optimizer) is stepped


def test_state_is_plain_and_resumes_in_the_middle():
    def train(scaler, optimizer, model, steps):
        for _ in range(steps):
            optimizer.zero_grad()
            scaler.scale(model(torch.ones(1, INPUTS)).sum()).backward()
            scaler.step(optimizer)

    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    scaler = LossScaler(init_scale=4.0, growth_interval=3)
    train(scaler, optimizer, model, 2)
    state = json.loads(json.dumps(scaler.state_dict()))
    assert state == {
        "scale_factor": 4.0,
        "growth_factor": 2.0,
        "backoff_factor": 0.5,
        "growth_interval": 3,
        "good_steps": 2,
    }
    resumed = LossScaler()
    resumed.load_state_dict(state)
    train(resumed, optimizer, model, 1)
    assert resumed.scale_factor == 8.0 and resumed.good_steps == 0
    assert pickle.loads(pickle.dumps(resumed)).state_dict() == resumed.state_dict()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"init_scale": 0.0}, "scale_factor must be positive"),
        ({"init_scale": float("inf")}, "scale_factor must be positive and finite"),
        ({"growth_factor": 1.0}, "growth_factor must be above 1"),
        ({"backoff_factor": 1.0}, "backoff_factor must be between 0 and 1"),
        ({"growth_interval": 0}, "growth_interval must be a positive int"),
        ({"growth_interval": 2.5}, "growth_interval must be a positive int"),
    ],
)
def test_settings_out_of_range_are_refused(setting, message):
    with pytest.raises(ValueError, match=message):
        LossScaler(**setting)


def test_a_foreign_state_is_refused_and_changes_nothing():
    scaler = LossScaler()
    before = scaler.state_dict()
    for state in (
        torch.amp.GradScaler("cpu").state_dict(),
        {},
        before | {"good_steps": -1, "scale_factor": 1.0},
    ):
        with pytest.raises(ValueError, match="must"):
            scaler.load_state_dict(state)
        assert scaler.state_dict() == before


def test_calls_out_of_order_are_refused():
    model, scaler = mlp(), LossScaler()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(RuntimeError, match="scale\\(loss\\).backward\\(\\) before step"):
        scaler.step(optimizer)
    scaler.scale(model(torch.ones(1, INPUTS)).sum())  # and no backward
    with pytest.raises(RuntimeError, match="give all its optimizers"):
        scaler.step()
    with pytest.raises(RuntimeError, match="no gradients"):
        scaler.step(optimizer)
    scaler.scale(model(torch.ones(1, INPUTS)).sum()).backward()
    scaler.unscale_(optimizer)
    with pytest.raises(RuntimeError, match="divided already"):
        scaler.unscale_(optimizer)
    scaler.step(optimizer)
    with pytest.raises(RuntimeError, match="give all its optimizers to one step"):
        scaler.step(optimizer)


def test_fp16_weights_are_refused():
    model, scaler = nn.Linear(2, 2).half(), LossScaler(init_scale=1.0)
    scaler.scale(model(torch.ones(1, 2, dtype=torch.float16)).sum()).backward()
    with pytest.raises(ValueError, match="keep them FP32"):
        scaler.step(torch.optim.SGD(model.parameters(), lr=0.1))


def test_a_loss_that_is_nan_whatever_the_scale_is_said_to_be_so():
    weight = nn.Parameter(torch.ones(2))
    optimizer, scaler = torch.optim.SGD([weight], lr=0.1), LossScaler(backoff_factor=2.0**-50)
    with pytest.raises(FloatingPointError, match="at every scale"):
        for _ in range(4):
            scaler.scale(weight.sum() * float("nan")).backward()
            assert scaler.step(optimizer) is False


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
