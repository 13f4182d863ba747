"""What CUDA's kernels take for themselves: PyTorch's formulas, by hand and as measured."""

from math import ceil

import pytest
import torch

from memlab.meters.cuda_reduction import staging_bytes
from memlab.meters.gpus import find_gpu
from memlab.meters.kernel_scratch import scratch_of
from memlab.meters.scratch import Processors, Scratch, lives_of
from memlab.units import MiB

aten = torch.ops.aten
H100 = Processors(132, 2048)
T4 = Processors(40, 1024)


def of(operator, *arguments, result=None, gpu="H100", **keywords):
    return list(scratch_of(operator, arguments, keywords, result, find_gpu(gpu)))


def on_meta(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


def over_rows(rows, columns, processors=H100, offset=0):
    return staging_bytes((rows, columns), (columns, 1), offset, frozenset([0]), 4, 4, processors)


# The bias gradient's sum over rows of 3,072 numbers, as the allocator's history of an H100 had it.
@pytest.mark.parametrize(
    ("rows", "size"),
    [(1_024, 24 * MiB), (2_048, 48 * MiB), (4_096, 96 * MiB), (8_192, 132 * MiB)],
)
def test_a_sum_over_rows_takes_what_was_measured(rows, size):
    assert over_rows(rows, 3_072)[0][0] == size


def test_a_sum_over_few_rows_or_many_columns_takes_nothing():
    assert over_rows(512, 3_072) == over_rows(8_192, 50_257) == over_rows(0, 3_072) == ()


def test_a_sum_over_rows_by_hand():
    # 32 x 4 threads for 4 columns each: 6 blocks side by side. A thread would add up 2,048 rows,
    # so 128 blocks share them, 16 rows each: 4 bytes x 768 columns x 128 blocks, and once more
    # times 32 x 4.
    size, semaphores = over_rows(8_192, 768)[0]
    assert size == 4 * 768 * 128 * 32 * 4 == 48 * MiB and semaphores == 4 * 6
    # A beginning that 16 bytes do not divide: one column at a time, 24 blocks of 32 columns.
    assert over_rows(8_192, 768, offset=1)[0][1] == 4 * 24
    assert over_rows(8_192, 3_072, T4)[0][0] == 21 * MiB


def test_a_sum_of_everything_is_split_over_blocks():
    # 512 threads: 8,192 x 50,257 / 512 values each, so 528 blocks (the most at once) are too few
    # for 256 values each.
    numbers = 8_192 * 50_257
    found = staging_bytes((8_192, 50_257), (50_257, 1), 0, frozenset([0, 1]), 4, 4, H100)
    assert found == ((4 * ceil(ceil(numbers / 512) / 256), 4),)


def test_beyond_32_bits_a_sum_runs_in_parts():
    found = staging_bytes((2**17, 2**15), (2**15, 1), 0, frozenset([0]), 4, 4, H100)
    assert len(found) == 8  # 16 GiB; each part's last number begins within 2^31 - 1 bytes
    assert len({size for size, _ in found}) == 1


def test_an_input_of_other_numbers_is_converted_first():
    mask = on_meta(16, 16, dtype=torch.bool)
    assert of(aten.sum.default, mask, result=mask.sum()) == [Scratch(8 * 256)]
    half = on_meta(16, 16, dtype=torch.bfloat16)
    wide = half.sum(dtype=torch.float32)
    assert of(aten.sum.default, half, result=wide, dtype=torch.float32) == []


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


def test_an_embedding_of_many_tokens_adds_up_in_parts():
    def backward(tokens, vocabulary=50_257):
        gradient = on_meta(tokens, 768)
        indices = on_meta(tokens, dtype=torch.int64)
        arguments = (gradient, indices, vocabulary, -1, False)
        return of(aten.embedding_dense_backward.default, *arguments)

    assert backward(3_072) == []
    assert backward(8_192)[-1].size == 4 * (819 + 8_192) * 768
    assert backward(8_192, vocabulary=100)[-1].size == 4 * (819 + 100) * 768


def test_norms():
    x = on_meta(70_000, 64)
    stats = on_meta(70_000, 1)
    arguments = (x, x, [64], stats, stats, None, None, [True, True, True])
    result = (x, on_meta(64), on_meta(64))
    blocks = ceil(70_000 / 32)
    found = of(aten.native_layer_norm_backward.default, *arguments, result=result)
    assert found == [Scratch(4 * blocks * 64)] * 2

    image = on_meta(2, 8, 16, 16, dtype=torch.bfloat16)
    weight = on_meta(8)
    arguments = (image, image, weight, weight, weight, 2, 8, 256, 4, [True, True, True])
    found = of(aten.native_group_norm_backward.default, *arguments)
    assert found == [Scratch(64), Scratch(64), Scratch(32), Scratch(32), Scratch(64)]


def test_norms_of_many_tensors_and_sorted_indices():
    tensors = [on_meta(50_257, 768), on_meta(768)]
    assert of(aten._foreach_norm.Scalar, tensors) == [Scratch(2 * 589 * 4)]
    x, rows, values = on_meta(8, 4), on_meta(5, dtype=torch.int64), on_meta(5, 4)
    assert of(aten.index_put_.default, x, [rows], values, True) == [Scratch(40)] * 3
    assert of(aten.index_put_.default, x, [rows], values) == []
    assert of(aten.mm.default, x, x) == []


def test_a_size_alone_is_taken_for_an_h100():
    operator = aten.sum.dim_IntList
    x = on_meta(8_192, 3_072)
    found = of(operator, x, [0], result=x.sum(0), gpu="24 GiB")
    assert found == of(operator, x, [0], result=x.sum(0)) == [Scratch(132 * MiB), Scratch(4 * 24)]


def test_buffers_are_given_back_in_time():
    buffers = [Scratch(1, 2), Scratch(2), Scratch(3)]
    events = [(0, True), (1, True), (0, False), (2, True), (1, False), (2, False)]
    assert list(lives_of(buffers)) == events
