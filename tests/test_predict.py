"""A GPU's bytes without the GPU; and on the CPU, predictions held against what is measured."""

import pytest
import torch
from torch import nn

from memlab import measure, predict
from memlab.workloads import gpt, vit

#: What no tensor of Python holds: scalars that an operator of PyTorch makes inside.
SLACK = 256


def training(make, optimizer=torch.optim.AdamW, device="cpu", dtype=None, batch=2):
    def train():
        torch.manual_seed(0)
        model = make().to(device=device, dtype=dtype)
        steps = optimizer(model.parameters(), lr=1e-3)
        while True:
            tokens = torch.randint(100, (batch, 16)).to(device)
            loss = model(tokens, tokens)
            loss.backward()
            steps.step()
            steps.zero_grad()
            yield loss

    return train


def foreach(parameters, lr):
    return torch.optim.AdamW(parameters, lr=lr, foreach=True)


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD, foreach])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_the_cpu_it_is_what_is_measured(optimizer, dtype):
    train = training(lambda: gpt.GPT(gpt.tiny()), optimizer, dtype=dtype)
    measured = measure(train, device="cpu")
    predicted = predict(train, device="cpu", progress=False)
    assert abs(predicted.peak_bytes - measured.known_bytes) <= SLACK
    for column, size in measured.known_columns.items():
        assert abs(predicted.columns[column] - size) <= SLACK, column
    assert predicted.phase == measured.phase


def test_on_a_gpu_a_run_needs_its_tensors_rounded_up():
    width, batch = 256, 8

    def train():
        layer = nn.Linear(width, width, bias=False).cuda()
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        inputs = torch.randn(batch, width, device="cuda")
        while True:
            loss = layer(inputs).sum()
            loss.backward()
            optimizer.step()
            yield loss

    prediction = predict(train, gpu="A100 80GB", progress=False)
    weight = 4 * width * width
    assert prediction.columns["parameters"] == weight == prediction.columns["gradients"]
    assert prediction.columns["batch"] == 4 * batch * width
    assert prediction.environment["gpu"].startswith("NVIDIA A100")
    assert prediction.columns == {**prediction.columns, "optimizer_state": 0}
    assert prediction.host_bytes == weight  # it was built there
    assert prediction.verdict.kind == "steady"


def test_autocast_is_that_of_cuda():
    """On CUDA softmax writes FP32 from BF16 in one go; on the CPU it stays BF16."""
    kept = []

    def train():
        weight = nn.Parameter(torch.ones(64, 64, device="cuda"))
        with torch.autocast("cuda", torch.bfloat16):
            scores = torch.ones(64, 64, device="cuda") @ weight
            kept.append((scores.dtype, torch.softmax(scores, -1).dtype))
        scores.sum().backward()
        yield scores.sum()

    predict(train, steps=1, progress=False)
    assert kept == [(torch.bfloat16, torch.float32)]


def test_unchanged_code_runs():
    def train(scaled=True):
        model = vit.ViT(vit.small(layers=1, hidden=32, heads=2)).cuda()
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        scaler = torch.amp.GradScaler("cuda")
        size = model.config.image_size
        while True:
            images = torch.randn(4, 1, size, size).pin_memory().to("cuda", non_blocking=True)
            targets = torch.randint(10, (4,), device="cuda")
            with torch.autocast("cuda", torch.float16):
                loss = model(images, targets)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            torch.cuda.synchronize()
            assert torch.cuda.max_memory_allocated() > 0
            yield loss.item()

    prediction = predict(train, progress=False)
    assert prediction.columns["optimizer_state"] > 2 * prediction.columns["parameters"] * 0.99


def test_a_measurement_after_a_prediction_is_the_same_as_before():
    train = training(lambda: gpt.GPT(gpt.tiny()))
    before = measure(train, device="cpu")
    predictions = [
        predict(training(lambda: gpt.GPT(gpt.tiny()), device="cuda"), progress=False)
        for _ in range(2)
    ]
    after = measure(train, device="cpu")
    assert before.known_columns == after.known_columns and before.losses == after.losses
    assert predictions[0].columns == predictions[1].columns
    assert predictions[0].reserved_bytes == predictions[1].reserved_bytes


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"steps": 0}, "whole number of at least 1, not 0"),
        ({"steps": True}, "whole number of at least 1, not True"),
        ({"gpu": "RTX 5099"}, "RTX 5090"),
        ({"gpu": "A100"}, "A100 80GB"),
        ({"ranks": 1}, "ranks has to be a whole number of at least 2, not 1"),
        ({"device": "mps"}, '"cuda" or "cpu", not \'mps\''),
    ],
)
def test_what_cannot_be_predicted_is_refused(arguments, said):
    with pytest.raises(ValueError, match=said):
        predict(training(lambda: gpt.GPT(gpt.tiny()), device="cuda"), progress=False, **arguments)


def test_an_error_of_the_run_comes_through_and_leaves_nothing_behind():
    def train():
        torch.ones(3, device="cuda")
        raise KeyError("mine")
        yield

    with pytest.raises(KeyError, match="mine"):
        predict(train, progress=False)
    assert type(torch.ones(1)) is torch.Tensor
    assert measure(training(lambda: gpt.GPT(gpt.tiny())), steps=1, device="cpu").peak_bytes > 0


def one_tensor(make):
    def train():
        weight = nn.Parameter(torch.ones(8, 8, device="cuda"))
        loss = make(weight).sum()
        loss.backward()
        yield loss

    return train


def test_compiled_code_is_predicted_as_it_was_written():
    def twice(weight):
        return torch.compile(lambda numbers: numbers * 2)(weight)

    compiled = predict(one_tensor(twice), steps=1, progress=False)
    written = predict(one_tensor(lambda weight: weight * 2), steps=1, progress=False)
    assert compiled.peak_bytes == written.peak_bytes
    assert any("torch.compile" in note for note in compiled.notes) and not written.notes


@torch.library.custom_op("memlab_test::unknown", mutates_args=())
def unknown(numbers: torch.Tensor) -> torch.Tensor:
    return numbers.clone()


def test_an_operator_without_shapes_is_named():
    with pytest.raises(ValueError, match=r"memlab_test.*register_fake"):
        predict(one_tensor(lambda weight: unknown(weight.detach())), steps=1, progress=False)


def test_the_allocators_settings_decide_what_is_reserved(monkeypatch):
    def train():
        weight = nn.Parameter(torch.ones(25 * 2**20 // 4, device="cuda"))
        yield (weight * 2).sum()

    def reserved(**options):
        return predict(train, steps=1, progress=False, **options).reserved_bytes

    whole, divided = reserved(), reserved(allocator="roundup_power2_divisions:2")
    # 25 MiB are rounded up to 32, between 16 and 32 there is 24: and that for each of the two.
    assert divided - whole == 2 * (32 - 26) * 2**20
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "roundup_power2_divisions:2")
    assert reserved() == divided
    with pytest.raises(ValueError, match="max_split_size"):
        reserved(allocator="max_split_size_gb:1")


def test_a_generator_of_the_gpu_is_one_of_the_host():
    def train():
        generator = torch.Generator("cuda").manual_seed(1)
        assert isinstance(generator, torch.Generator)
        assert isinstance(torch.default_generator, torch.Generator)
        noise = torch.randn(64, 64, device="cuda", generator=generator)
        weight = nn.Parameter(torch.empty(64, 64, device="cuda").normal_(generator=generator))
        yield (weight * noise).sum()

    before = torch.Generator
    assert predict(train, steps=1, progress=False).allocated_bytes >= 2 * 64 * 64 * 4
    assert torch.Generator is before


def test_a_frozen_model_is_refused_as_it_is_in_a_measurement():
    def train():
        layer = nn.Linear(4, 4).cuda().requires_grad_(False)
        loss = layer(torch.ones(2, 4, device="cuda")).sum()
        loss.backward()
        yield loss

    with pytest.raises(ValueError, match="a loss that needs no gradient"):
        predict(train, steps=1, progress=False)
