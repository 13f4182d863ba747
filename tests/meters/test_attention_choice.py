"""Which attention kernel CUDA takes, by PyTorch's tests for each."""

import pytest
import torch

from memlab.meters.attention_choice import CUDNN_VERSION, Call, choose_kernel

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
T4, A100, ADA, HOPPER, BLACKWELL = (7, 5), (8, 0), (8, 9), (9, 0), (12, 0)


def choose(architecture, dtype=BF16, *, width=64, key_heads=4, rows=16, keys=16, **options):
    query = torch.empty(2, 4, rows, width, dtype=dtype, device="meta")
    key = torch.empty(2, key_heads, keys, width, dtype=dtype, device="meta")
    version = options.pop("cudnn_version", CUDNN_VERSION)
    call = Call(
        query,
        options.pop("key", key),
        key,
        options.pop("mask", None),
        options.pop("dropout", 0.0),
        options.pop("causal", False),
        options.pop("grouped", False),
        options.pop("gradients", True),
    )
    assert not options
    return choose_kernel(call, architecture, version)


@pytest.mark.parametrize(
    ("architecture", "options", "kernel"),
    [
        # 16 bits: cuDNN on Hopper since 9.15.1, else flash; Turing has no flash.
        (HOPPER, {}, "cudnn"),
        (HOPPER, {"cudnn_version": 91002}, "flash"),
        (HOPPER, {"cudnn_version": 0}, "flash"),
        (A100, {}, "flash"),
        (BLACKWELL, {}, "flash"),
        (T4, {"dtype": FP16}, "efficient"),
        (T4, {"dtype": BF16}, "math"),
        # FP32 and FP64
        (HOPPER, {"dtype": FP32}, "efficient"),
        (T4, {"dtype": FP32, "width": 30}, "efficient"),
        (A100, {"dtype": FP32, "width": 30}, "math"),
        (A100, {"dtype": torch.float64}, "math"),
        # head sizes
        (A100, {"width": 30}, "flash"),
        (HOPPER, {"width": 30}, "flash"),
        (HOPPER, {"width": 256}, "cudnn"),
        ((10, 0), {"width": 256}, "flash"),
        (A100, {"width": 512}, "efficient"),
        (ADA, {"width": 224}, "efficient"),
        (ADA, {"width": 224, "gradients": False}, "flash"),
        (ADA, {"width": 256}, "flash"),
        (ADA, {"width": 256, "dropout": 0.1}, "efficient"),
        # fewer heads of keys
        (A100, {"key_heads": 2, "grouped": True}, "flash"),
        (A100, {"key_heads": 2, "grouped": True, "dtype": FP32}, "math"),
        # lengths
        (A100, {"keys": 32, "causal": True}, "efficient"),
        (A100, {"keys": 32}, "flash"),
        (HOPPER, {"keys": 1}, "flash"),
        (HOPPER, {"rows": 1, "dropout": 0.1}, "flash"),
        (A100, {"keys": 0}, "math"),
        # dropout with the versions of cuDNN that have none
        (HOPPER, {"dropout": 0.1}, "cudnn"),
    ],
)
def test_the_first_kernel_that_can_is_taken(architecture, options, kernel):
    assert choose(architecture, **options) == kernel


def test_a_mask_rules_flash_out():
    mask = torch.ones(16, 16, dtype=torch.bool, device="meta")
    assert choose(A100, mask=mask) == "efficient"
    assert choose(HOPPER, mask=mask) == "cudnn"
    with_gradient = torch.ones(16, 16, dtype=BF16, device="meta", requires_grad=True)
    assert choose(HOPPER, mask=with_gradient) == "efficient"
    across = torch.ones(2, 16, 16, dtype=BF16, device="meta")  # cuDNN: two axes, or four
    assert choose(HOPPER, mask=across) == "efficient"
    assert choose(A100, mask=mask, key_heads=2, grouped=True) == "math"


def test_keys_whose_last_axis_is_spread_need_the_formula():
    key = torch.empty(2, 4, 64, 16, dtype=BF16, device="meta").transpose(2, 3)
    assert choose(A100, key=key) == "math"


def test_what_the_user_switched_off_is_not_taken():
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
        assert choose(HOPPER) == "efficient"
    with sdpa_kernel(SDPBackend.MATH):
        assert choose(HOPPER) == "math"
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        assert choose(A100) == "cudnn"
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        assert choose(HOPPER) == "flash"
        with pytest.raises(RuntimeError, match="switched off"):
            choose(HOPPER, FP32)


def test_cudnn_is_not_deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        assert choose(HOPPER) == "flash"
    finally:
        torch.use_deterministic_algorithms(False)
