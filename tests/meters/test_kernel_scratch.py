"""What CUDA's kernels take for themselves: PyTorch's formulas, by hand and as measured."""

from math import ceil

import torch

from memlab.meters.gpus import find_gpu
from memlab.meters.kernel_scratch import scratch_of
from memlab.meters.scratch import Scratch
from memlab.units import MiB

aten = torch.ops.aten


def of(operator, *arguments, result=None, gpu="H100", **keywords):
    return list(scratch_of(operator, arguments, keywords, result, find_gpu(gpu)))


def on_meta(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


def test_an_input_of_other_numbers_is_converted_first():
    mask = on_meta(16, 16, dtype=torch.bool)
    assert of(aten.sum.default, mask, result=mask.sum()) == [Scratch(8 * 256)]
    half = on_meta(16, 16, dtype=torch.bfloat16)
    wide = half.sum(dtype=torch.float32)
    assert of(aten.sum.default, half, result=wide, dtype=torch.float32) == []


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
