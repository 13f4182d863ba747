"""What the backward of CUDA's attention takes for itself, by hand."""

import torch

from memlab.meters.gpus import find_gpu
from memlab.meters.kernel_scratch import scratch_of
from memlab.meters.scratch import Scratch

aten = torch.ops.aten


def of(operator, *arguments, result=None, gpu="H100", **keywords):
    return list(scratch_of(operator, arguments, keywords, result, find_gpu(gpu)))


def on_meta(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


def attention(dtype, width=64, key_heads=12, rows=1024):
    query = on_meta(8, rows, 12, width, dtype=dtype).transpose(1, 2)
    key = on_meta(8, rows, key_heads, width, dtype=dtype).transpose(1, 2)
    return query, query, key, key


def test_efficient_attention_multiplies_first_and_then_takes_its_workspace():
    found = of(
        aten._scaled_dot_product_efficient_attention_backward.default, *attention(torch.float32)
    )
    delta = 4 * 8 * 12 * 1024
    # 16 tiles of 64 x 64 numbers and a head of 16 bytes, for each head of each sequence
    workspace = 8 * 12 * 16 * (16 + 4 * 64 * 64)
    assert found == [
        Scratch(8 * 1024 * 768 * 4, 3),
        Scratch(delta, 3),
        Scratch(delta),
        Scratch(workspace),
    ]
    half = of(
        aten._scaled_dot_product_efficient_attention_backward.default, *attention(torch.bfloat16)
    )
    assert half == [Scratch(delta), Scratch(workspace)]


def test_efficient_attention_keeps_wide_gradients_outside_of_registers():
    # A T4: 64 x 64 tiles; 96 wide, so 2 tiles of keys' width, and dK and dV for each of 16 tiles.
    operator = aten._scaled_dot_product_efficient_attention_backward.default
    workspace = of(operator, *attention(torch.float16, 96), gpu="T4")[-1].size
    assert workspace == 8 * 12 * 4 * (16 * 2 * (4 + 64 * 64) + 2 * 16 * 64 * 128)


def test_flash_attention_adds_up_in_fp32():
    operator = aten._scaled_dot_product_flash_attention_backward.default
    rows = 8 * 12 * 1024
    found = of(operator, *attention(torch.bfloat16, width=40, rows=1000))
    assert found == [Scratch(4 * rows), Scratch(4 * rows * 64)]
    grouped = of(operator, *attention(torch.bfloat16, key_heads=3))
    assert grouped[2:] == [Scratch(2 * rows * 64)] * 2
