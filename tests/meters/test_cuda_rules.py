"""CUDA's choices are in force inside, and no longer."""

import contextlib
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional

from memlab import predict
from memlab.meters.attention_choice import CUDNN_VERSION
from memlab.meters.cuda_rules import cuda_rules
from memlab.meters.cuda_stand_in import accelerator_stand_in
from memlab.meters.fake import FakeMode, Shapes
from memlab.meters.gpus import find_gpu
from memlab.meters.kernel_scratch import scratch_of
from memlab.meters.torch_cuda import torch_cuda_stand_in


def kinds_of_attention(dtype, mask=None):
    names = []

    def train():
        query = torch.ones(2, 4, 16, 64, device="cuda", dtype=dtype, requires_grad=True)
        with_mask = None if mask is None else torch.ones(16, 16, device="cuda").to(mask)
        output = torch.nn.functional.scaled_dot_product_attention(
            query, query, query, attn_mask=with_mask
        )
        node = output.grad_fn
        while node is not None and "Attention" not in node.name():
            node = node.next_functions[0][0]
        names.append(node.name())
        output.sum().backward()
        yield output.sum()

    predict(train, steps=1, gpu="A100 80GB", progress=False)
    return names


@pytest.mark.parametrize(
    ("dtype", "mask", "kernel"),
    [
        (torch.bfloat16, None, "Flash"),
        (torch.float32, None, "Efficient"),
        (torch.bfloat16, torch.bool, "Efficient"),
        (torch.float32, torch.float32, "Efficient"),
    ],
)
def test_attention_is_computed_by_the_kernel_of_a_gpu(dtype, mask, kernel):
    assert kernel in kinds_of_attention(dtype, mask)[0]


def test_afterwards_the_cpu_chooses_again():
    kinds_of_attention(torch.float32)
    query = torch.ones(2, 4, 16, 64, requires_grad=True)
    output = torch.nn.functional.scaled_dot_product_attention(query, query, query)
    assert "ForCpu" in output.grad_fn.name()


def on_gpu(run, gpu="A100 80GB", cudnn_version=CUDNN_VERSION):
    """What a run makes on the GPU (bytes, in order), what it leaves there, and the notes."""
    made, alive, notes = [], {}, []

    def on_event(device, event):
        if device != "cuda":
            return
        if event.size > 0:
            made.append(event.size)
            alive[event.address] = event.size
        else:
            assert alive.pop(event.address) == -event.size

    found = find_gpu(gpu)
    kernels = {}
    shapes = Shapes(notes.append, on_event, kernels, {}, partial(scratch_of, gpu=found))
    with contextlib.ExitStack() as stack:
        stack.enter_context(accelerator_stand_in())
        stack.enter_context(torch_cuda_stand_in(found, SimpleNamespace))
        rules = cuda_rules(found, notes.append, cudnn_version=cudnn_version)
        kernels.update(stack.enter_context(rules))
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        stack.enter_context(FakeMode())
        stack.enter_context(shapes)
        kept = run()
        left = sorted(alive.values())
        del kept
    return made, left, notes


def tensor(*shape, dtype=torch.float32, grad=True):
    return torch.empty(*shape, dtype=dtype, device="cuda", requires_grad=grad)


def kept_by(make, *shape, dtype=torch.float32):
    """What stays on the GPU after a layer's forward pass, beside its input and parameters."""

    def build():
        return make(device="cuda", dtype=dtype), tensor(*shape, dtype=dtype)

    def run():
        layer, x = build()
        return layer, x, layer(x)

    left = on_gpu(run)[1]
    for size in on_gpu(build)[1]:
        left.remove(size)
    return left


def test_layers_keep_what_cuda_keeps():
    # dropout: a mask of one byte, and the output
    assert kept_by(lambda **_: nn.Dropout(0.1), 4, 8) == [32, 128]
    # layer norm: mean and deviation in FP32 for each row, and the output; RMS norm: the deviation
    assert kept_by(partial(nn.LayerNorm, 8), 4, 8, dtype=torch.bfloat16) == [16, 16, 64]
    assert kept_by(partial(nn.RMSNorm, 8), 4, 8, dtype=torch.bfloat16) == [16, 64]
    # group norm's stand in the input's type, batch norm's in FP32
    assert kept_by(partial(nn.GroupNorm, 2, 8), 2, 8, 4, 4, dtype=torch.bfloat16) == [8, 8, 512]
    assert kept_by(partial(nn.BatchNorm2d, 8), 2, 8, 4, 4) == [32, 32, 1024]


@pytest.mark.parametrize(
    "run",
    [
        lambda: nn.Conv2d(3, 8, 3, device="cuda")(tensor(2, 3, 8, 8)),
        lambda: nn.ConvTranspose1d(3, 8, 3, device="cuda")(tensor(2, 3, 8)),
        lambda: nn.LSTM(8, 16, 2, device="cuda")(tensor(5, 4, 8))[0],
        lambda: nn.GRU(8, 16, 2, device="cuda")(tensor(5, 4, 8))[0],
        lambda: nn.Embedding(9, 8, device="cuda")(torch.zeros(3, dtype=int, device="cuda")),
        lambda: nn.Embedding(9, 8, device="cuda", sparse=True)(torch.zeros(3, dtype=int).cuda()),
        lambda: nn.EmbeddingBag(9, 8, device="cuda")(torch.zeros(3, 2, dtype=int).cuda()),
        lambda: nn.MaxPool2d(2)(tensor(2, 3, 8, 8)),
        lambda: functional.interpolate(tensor(2, 3, 8, 8), scale_factor=2, mode="bilinear"),
        lambda: tensor(4, 8).cumsum(1) + tensor(4, 8).sort(1)[0] + tensor(4, 8).topk(8)[0],
        lambda: torch.multinomial(tensor(4, 8, grad=False), 1) * tensor(1),
        lambda: tensor(4, 8, dtype=torch.float16).softmax(-1, dtype=torch.float32),
        lambda: nn.TransformerEncoderLayer(16, 2, 32, device="cuda")(tensor(4, 2, 16)),
        lambda: tensor(8, 4)[tensor(8, 4) > 0],
    ],
)
def test_forward_and_backward_run_on_shapes(run):
    made, left, _ = on_gpu(lambda: run().sum().backward())
    assert made and not left


def test_a_norm_of_cuda_is_one_operator_inside_and_a_row_of_them_after():
    x = torch.ones(2, 8, requires_grad=True)
    on_gpu(lambda: nn.RMSNorm(8, device="cuda")(tensor(2, 8)))
    assert "FusedRmsNorm" not in nn.RMSNorm(8)(x).grad_fn.name()
    assert not torch._C._dispatch_has_kernel_for_dispatch_key("aten::_fused_rms_norm", "CUDA")


def test_the_rules_go_when_the_run_fails():
    def run():
        raise ValueError("the run's own")

    with pytest.raises(ValueError, match="the run's own"):
        on_gpu(run)
    name = "aten::scaled_dot_product_attention"
    for key in ("CUDA", "AutogradCUDA"):
        assert not torch._C._dispatch_has_kernel_for_dispatch_key(name, key)


def test_in_inference_mode_the_parts_are_seen_as_well():
    @torch.inference_mode()
    def run():
        query = tensor(2, 4, 16, 64, dtype=torch.float64, grad=False)
        return functional.scaled_dot_product_attention(query, query, query)

    scores = 8 * 2 * 4 * 16 * 16
    made, left, notes = on_gpu(run)
    assert scores in made and scores not in left
    assert "math" in notes[0]


def test_what_is_not_known_is_said_once():
    def run():
        convolution = nn.Conv1d(3, 3, 1, device="cuda")
        return convolution(convolution(tensor(2, 3, 8)))

    notes = on_gpu(run, gpu="24 GiB")[2]
    assert ["H100" in notes[0], "convolution" in notes[1], len(notes)] == [True, True, 2]
