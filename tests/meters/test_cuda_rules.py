"""CUDA's choices are in force inside, and no longer."""

import pytest
import torch

from memlab import predict


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
