"""What is copied around CUDA's attention kernels."""

import torch
from torch.nn import functional

from tests.meters.test_cuda_rules import on_gpu, tensor


def test_flash_fills_the_width_up_to_eight():
    def run():
        query = tensor(2, 4, 16, 30, dtype=torch.bfloat16)
        return functional.scaled_dot_product_attention(query, query, query)

    made, _, notes = on_gpu(run)
    assert made[1:5] == [2 * 2 * 4 * 16 * 32] * 4  # three copies, and the output
    assert notes == ["attention: the flash kernel"]


def test_efficient_attention_fills_a_mask_up_to_sixteen():
    def run(mask):
        query = tensor(2, 4, 20, 64)
        return functional.scaled_dot_product_attention(query, query, query, attn_mask=mask)

    made, _, _ = on_gpu(lambda: run(torch.ones(20, 20, dtype=torch.bool, device="cuda")))
    numbers, filled = 4 * 20 * 20, 4 * 20 * 32
    assert numbers in made and made[made.index(numbers) + 1] == filled
    # the output; a number for each query, their count rounded to 32; no random state
    assert made[-2:] == [4 * 2 * 4 * 20 * 64, 4 * 2 * 4 * 32]
