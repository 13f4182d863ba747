import dataclasses
import json
import pickle
from types import SimpleNamespace

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from memlab.workloads import Scale, gpt, images, scale, text, vit
from memlab.workloads.scale import (
    GIB,
    USABLE,
    gpt_baseline_bytes,
    gpt_for,
    name_for,
    vit_baseline_bytes,
    vit_for,
)

# What the drivers report, in GiB, rounded down.
DEVICES = {"T4": 14.56, "L4": 22.0, "A100 40 GB": 39.3, "A100 80 GB": 79.1, "H200": 139.7}


@pytest.fixture(autouse=True)
def no_override(monkeypatch):
    monkeypatch.delenv("MEMLAB_SCALE", raising=False)


@pytest.fixture
def cpu_only(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def pretend(monkeypatch):
    """Make torch report a CUDA device."""

    def pretend(memory_gib, native_bfloat16, name="Some GPU"):
        memory = int(memory_gib * GIB)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        properties = SimpleNamespace(total_memory=memory, name=name)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        # As on a T4: emulation says yes.
        monkeypatch.setattr(
            torch.cuda,
            "is_bf16_supported",
            lambda including_emulation=True: including_emulation or native_bfloat16,
        )
        return memory

    return pretend


def test_without_cuda_it_is_cpu(cpu_only):
    chosen = scale()
    assert isinstance(chosen, Scale)
    assert chosen.name == "cpu"
    assert chosen.device == torch.device("cpu")
    assert chosen.memory_bytes is None
    assert chosen == scale("cpu")


def test_apples_mps_runs_as_cpu(cpu_only, monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert scale().device == torch.device("cpu")


@pytest.mark.parametrize(
    "memory_gib, native_bfloat16, name",
    [
        (14.56, False, "t4"),
        (14.56, True, "t4"),
        (31.7, False, "t4"),  # V100
        (19.9, True, "t4"),
        (20, True, "gpu"),
        (22, True, "gpu"),  # sold as 24 GB
        (139.7, True, "gpu"),
    ],
)
def test_the_device_decides(memory_gib, native_bfloat16, name, pretend):
    memory = pretend(memory_gib, native_bfloat16)
    assert name_for(memory, native_bfloat16) == name
    chosen = scale()
    assert chosen.name == name
    assert chosen.device == torch.device("cuda", 1)
    assert chosen.memory_bytes == memory


# ("gpu" alone would be a marker.)
@pytest.mark.parametrize("name", ["cpu", "t4", "gpu", "large"], ids="scale-{}".format)
def test_memlab_scale_overrides_the_device(name, pretend, monkeypatch):
    pretend(79.1, True)
    assert scale().name == "gpu"
    monkeypatch.setenv("MEMLAB_SCALE", name)
    assert scale().name == name
    assert scale().device.type == ("cpu" if name == "cpu" else "cuda")
    # The argument comes before the variable.
    assert scale("t4").name == "t4"


def test_an_empty_memlab_scale_is_none(cpu_only, monkeypatch):
    monkeypatch.setenv("MEMLAB_SCALE", "")
    assert scale().name == "cpu"


def test_unknown_names_are_refused(monkeypatch):
    with pytest.raises(
        ValueError, match=r"scale\(name\) must be one of cpu, t4, gpu, large, but it is 'tpu'"
    ):
        scale("tpu")
    with pytest.raises(ValueError, match="but it is ''"):
        scale("")
    monkeypatch.setenv("MEMLAB_SCALE", "GPU!")
    with pytest.raises(
        ValueError, match="MEMLAB_SCALE must be one of cpu, t4, gpu, large, but it is 'GPU!'"
    ):
        scale()


@pytest.mark.parametrize("name", ["t4", "gpu"], ids="scale-{}".format)
def test_a_gpu_scale_without_a_gpu_is_refused(name, cpu_only, monkeypatch):
    with pytest.raises(RuntimeError, match=f"asks for {name}, but PyTorch finds no CUDA device"):
        scale(name)
    monkeypatch.setenv("MEMLAB_SCALE", name)
    with pytest.raises(RuntimeError, match="MEMLAB_SCALE asks for"):
        scale()


LARGE = {
    "name": "large",
    "gpt": gpt.gpt2_124m(),
    "batch_size": 8,
    "sequence_length": 1024,
    "ladder_gpt": gpt.gpt2_124m(),
    "ladder_batch_size": 8,
}


def test_the_large_scale_is_the_cpus_with_one_geometry_and_one_repeat(cpu_only, monkeypatch):
    assert scale("large") == dataclasses.replace(scale("cpu"), **LARGE, repeats=1)
    assert scale().name == "cpu"  # it is chosen by name only
    monkeypatch.setenv("MEMLAB_SCALE", "large")
    assert scale() == scale("large")
    assert str(scale()).startswith("Scale large on cpu: ")
    assert "124,439,808 parameters" in str(scale()) and "batch 8 x sequence 1024" in str(scale())


@pytest.mark.parametrize("memory_gib, native_bfloat16", [(14.56, False), (22, True), (139.7, True)])
def test_the_large_scale_is_a_gpus_with_the_same_geometry_on_every_gpu(
    memory_gib, native_bfloat16, pretend
):
    memory = pretend(memory_gib, native_bfloat16)
    chosen = scale("large")
    assert chosen == dataclasses.replace(scale("gpu"), **LARGE)
    assert (chosen.device, chosen.memory_bytes) == (torch.device("cuda", 1), memory)
    assert chosen.sequence_length == chosen.gpt.context_length
    assert scale().name == ("t4" if memory_gib < 20 else "gpu")


def test_the_ladder_is_smaller_on_a_cpu_and_its_head_large_beside_the_rest(cpu_only):
    """The capstone climbs many rungs, each measured: on a CPU half the layers and a quarter of the
    batch have to do.
    """
    chosen = scale("cpu")
    assert chosen.ladder_gpt.layers == chosen.gpt.layers // 2
    assert chosen.ladder_batch_size == chosen.batch_size // 4
    head = chosen.ladder_gpt.vocabulary_size * chosen.ladder_gpt.hidden
    # Else the lines about the head would be idle.
    assert head > 0.4 * chosen.ladder_gpt.parameter_count


@pytest.mark.parametrize("memory_gib", [14.56, 22, 139.7])
def test_the_ladder_has_the_batch_of_the_other_notebooks_on_a_gpu(memory_gib, pretend):
    pretend(memory_gib, memory_gib > 20)
    for name in (None, "large"):
        chosen = scale(name)
        assert chosen.ladder_gpt == chosen.gpt
        assert chosen.ladder_batch_size == chosen.batch_size


def test_the_t4_scale_is_a_t4s_on_a_larger_device(pretend):
    pretend(14.56, False)
    on_a_t4 = scale()
    pretend(139.7, True)
    as_a_t4 = scale("t4")
    for size in ("gpt", "batch_size", "vit", "image_batch_size"):
        assert getattr(on_a_t4, size) == getattr(as_a_t4, size), size


@pytest.mark.parametrize(
    "device, config, batch_size",
    [
        ("T4", gpt.gpt2_124m(), 4),
        ("L4", gpt.gpt2_124m(), 8),
        ("A100 40 GB", gpt.gpt2_350m(), 4),
        ("A100 80 GB", gpt.gpt2_774m(), 8),
        ("H200", gpt.gpt2_1558m(), 8),
    ],
)
def test_more_memory_makes_the_gpt_larger(device, config, batch_size):
    assert gpt_for(int(DEVICES[device] * GIB)) == (config, batch_size)


@pytest.mark.parametrize(
    "device, layers, batch_size", [("T4", 12, 64), ("L4", 24, 32), ("H200", 24, 256)]
)
def test_more_memory_makes_the_vit_larger(device, layers, batch_size):
    config, chosen = vit_for(int(DEVICES[device] * GIB))
    assert (config.layers, chosen) == (layers, batch_size)
    assert (config.image_size, config.channels, config.classes) == (224, 1, 10)


@pytest.mark.parametrize("memory_gib", [1, 2, 4, 6, 8, 12, *DEVICES.values(), 180])
def test_the_baseline_fits_with_a_margin_and_the_next_batch_would_not(memory_gib):
    memory = int(memory_gib * GIB)
    config, batch_size = gpt_for(memory)
    assert gpt_baseline_bytes(config, batch_size, config.context_length) <= USABLE * memory
    if batch_size < 8:
        assert gpt_baseline_bytes(config, 2 * batch_size, config.context_length) > USABLE * memory
    config, batch_size = vit_for(memory)
    assert vit_baseline_bytes(config, batch_size) <= USABLE * memory
    if batch_size < 256:
        assert vit_baseline_bytes(config, 2 * batch_size) > USABLE * memory


def test_a_device_that_is_too_small_is_refused():
    with pytest.raises(ValueError, match="MEMLAB_SCALE=cpu"):
        gpt_for(GIB // 100)
    with pytest.raises(ValueError, match="MEMLAB_SCALE=cpu"):
        vit_for(GIB // 100)


def test_the_arithmetic_by_hand():
    # 124,439,808 parameters of 16 bytes; 12 layers, in each 16 x 768 numbers a token and 12 heads
    # of scores; three scores and three logits more; 8 sequences of 1024 tokens.
    tokens, scores = 8 * 1024, 8 * 12 * 1024 * 1024
    expected = (
        16 * 124_439_808
        + 12 * 4 * (16 * 768 * tokens + scores)
        + 3 * 4 * scores
        + 3 * 4 * 50257 * tokens
    )
    assert gpt_baseline_bytes(gpt.gpt2_124m(), 8, 1024) == expected
    # The measured peak was 15,413 MiB.
    assert 15_413 * 2**20 < expected < 1.15 * 15_413 * 2**20
    # One short sequence: the optimizer step is the peak.
    assert gpt_baseline_bytes(gpt.gpt2_124m(), 1, 16) == 20 * 124_439_808
    # The attention is not the configuration's: the baseline is naive.
    assert gpt_baseline_bytes(gpt.gpt2_124m(attention="naive"), 8, 1024) == expected


def measured_peak(build, folder):
    """The peak of two training steps, from the CPU allocator's events, construction included."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        model, batch = build()
        optimizer = torch.optim.AdamW(model.parameters(), foreach=True)
        for _ in range(2):
            optimizer.zero_grad()
            model(*batch).backward()
            optimizer.step()
    profiler.export_chrome_trace(str(folder / "trace.json"))
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    changes = [event for event in events if event["name"] == "[memory]"]
    current = peak = 0
    for event in sorted(changes, key=lambda event: event["ts"]):
        current += event["args"]["Bytes"]
        peak = max(peak, current)
    return peak


@pytest.mark.parametrize(
    "config",
    [
        gpt.small(attention="naive", layers=3),  # the activations are the peak
        gpt.small(attention="naive", layers=2, vocabulary_size=5000),  # the logits are
    ],
)
def test_the_gpt_estimate_is_a_little_above_the_measured_peak(config, tmp_path):
    def build():
        torch.manual_seed(0)
        return gpt.GPT(config), text.batch(text.load().train, 4, 256, seed=0)

    peak = measured_peak(build, tmp_path)
    assert peak <= gpt_baseline_bytes(config, 4, 256) <= 1.35 * peak


def test_the_vit_estimate_is_a_little_above_the_measured_peak(tmp_path):
    config = vit.small(attention="naive", layers=4)
    images_and_labels = torch.rand(32, 1, 32, 32), torch.arange(32) % 10

    def build():
        torch.manual_seed(0)
        return vit.ViT(config), images_and_labels

    peak = measured_peak(build, tmp_path)
    assert peak <= vit_baseline_bytes(config, 32) <= 1.35 * peak


def test_on_the_cpu_the_activations_dominate(cpu_only):
    chosen = scale()
    everything = gpt_baseline_bytes(chosen.gpt, chosen.batch_size, chosen.sequence_length)
    assert 16 * chosen.gpt.parameter_count < 0.2 * everything
    everything = vit_baseline_bytes(chosen.vit, chosen.image_batch_size)
    assert 16 * chosen.vit.parameter_count < 0.35 * everything


@pytest.mark.parametrize("memory_gib", [None, *DEVICES.values()])
def test_the_sizes_belong_together(memory_gib, cpu_only, pretend):
    if memory_gib is not None:
        pretend(memory_gib, True)
    chosen = scale()
    assert chosen.sequence_length <= chosen.gpt.context_length
    assert chosen.gpt.vocabulary_size >= text.VOCABULARY_SIZE
    assert chosen.training_gpt.vocabulary_size >= text.VOCABULARY_SIZE
    assert chosen.training_gpt.parameter_count < chosen.gpt.parameter_count
    assert chosen.seeds == (0, 1, 2)
    assert (chosen.vit.channels, chosen.vit.classes) == (1, 10)
    assert chosen.gpt.dropout == chosen.vit.dropout == 0  # as the arithmetic has it
    assert (
        min(chosen.batch_size, chosen.image_batch_size, chosen.training_steps, chosen.repeats) >= 1
    )
    assert chosen.image_batch_size <= 1437  # the images there are


def test_the_cpu_sizes_run(cpu_only):
    chosen = scale()
    pytest.importorskip("sklearn")
    model = gpt.GPT(chosen.gpt)
    with torch.no_grad():
        length, device = chosen.sequence_length, chosen.device
        assert model(*text.batch(text.load().train, 1, length, seed=0, device=device)).isfinite()
        data = images.load(chosen.vit.image_size).train
        assert vit.ViT(chosen.vit)(*images.batch(data, 2, seed=0)).isfinite()


def test_it_prints_in_three_lines(pretend, monkeypatch):
    pretend(139.7, True, name="NVIDIA H200")
    assert (
        str(scale()) == "Scale gpu on cuda:1: NVIDIA H200, 139.7 GiB\n"
        "GPT: 1,557,611,200 parameters (48 layers, 1600 wide, 25 heads, vocabulary 50,257); "
        "batch 8 x sequence 1024\n"
        "ViT: 302,787,594 parameters (24 layers, 1024 wide, 16 heads, patches of 16 x 16); "
        "batch 256 x 1 x 224 x 224"
    )
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert str(scale("cpu")).splitlines()[0] == "Scale cpu on cpu: 1 thread"


def test_it_is_frozen_and_pickles(cpu_only):
    chosen = scale()
    with pytest.raises(dataclasses.FrozenInstanceError):
        chosen.batch_size = 3
    assert pickle.loads(pickle.dumps(chosen)) == chosen


@pytest.mark.gpu
def test_on_this_gpu_the_baseline_fits():
    chosen = scale()
    config = dataclasses.replace(chosen.gpt, attention="naive")
    model = gpt.GPT(config).to(chosen.device)
    optimizer = torch.optim.AdamW(model.parameters())
    batch = text.batch(
        text.load().train, chosen.batch_size, chosen.sequence_length, seed=0, device=chosen.device
    )
    torch.cuda.reset_peak_memory_stats(chosen.device)
    for _ in range(2):
        optimizer.zero_grad()
        model(*batch).backward()
        optimizer.step()
    estimate = gpt_baseline_bytes(config, chosen.batch_size, chosen.sequence_length)
    assert torch.cuda.max_memory_allocated(chosen.device) <= estimate
    assert torch.cuda.max_memory_reserved(chosen.device) <= 0.95 * chosen.memory_bytes
