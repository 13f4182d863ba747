"""What stands in for a fake kernel gives the bytes of the real operator."""

import pytest
import torch

from memlab.meters.fake_kernels import KERNELS

aten = torch.ops.aten
GROUPED = aten._grouped_mm.default


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("first", "second", "ends"),
    [
        ((10, 32), (2, 50, 32), [4, 10]),  # each row has an expert
        ((32, 8), (50, 8), [4, 8]),  # the gradient of the experts' weights
        ((2, 10, 32), (48, 32), [16, 48]),
        ((2, 10, 32), (2, 50, 32), None),
    ],
)
def test_a_grouped_product(first, second, ends, dtype):
    ends = None if ends is None else torch.tensor(ends, dtype=torch.int32)
    operands = torch.zeros(first, dtype=dtype), torch.zeros(second, dtype=dtype).mT
    real, ours = (kernel(*operands, ends) for kernel in (GROUPED, KERNELS[GROUPED]))
    assert ours.shape == real.shape and ours.dtype == real.dtype
    # A real one has no last row's padding, or has: it depends on how it was made.
    assert abs(ours.untyped_storage().nbytes() - real.untyped_storage().nbytes()) < 16


@pytest.mark.parametrize("reduction", [0, 1, 2])
@pytest.mark.parametrize(
    ("loss", "weight"),
    [(aten.mse_loss, ()), (aten.smooth_l1_loss, ()), (aten.binary_cross_entropy, (None,))],
)
def test_the_mean_of_a_loss_keeps_the_bytes_of_its_terms(loss, weight, reduction):
    call = (torch.rand(3, 4), torch.rand(3, 4), *weight, reduction)
    real, ours = loss.default(*call), KERNELS[loss.default](*call)
    assert ours.shape == real.shape
    assert ours.untyped_storage().nbytes() == real.untyped_storage().nbytes() == 48
