"""Real images that scikit-learn carries, so that nothing is downloaded: handwritten digits.

1,797 digits of 8 x 8 pixels (E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten
Digits", UCI Machine Learning Repository, 1998, https://doi.org/10.24432/C50P49).
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Split(NamedTuple):
    """Images, float32 (image, channel, height, width) from 0 to 1, and labels, int64 (image,) from
    0 to 9.
    """

    images: Tensor
    labels: Tensor


class Images(NamedTuple):
    """The data set in its two parts."""

    train: Split
    validation: Split


def load(size: int = 32) -> Images:
    """The digits in one channel, scaled up to `size` x `size` by bilinear interpolation.

    The last fifth of the data set is the validation part. All of it takes 1,797 x size x size x 4
    bytes (7 MiB at 32, 344 MiB at 224), so load it before a measurement begins and not inside.

    Raises ValueError for a size below 8, and ImportError with advice when scikit-learn is missing.
    """
    if size < 8:
        raise ValueError(
            f"size must be at least 8, the size of the digits themselves, but it is {size}."
        )
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            "The images come with scikit-learn, which is missing: pip install scikit-learn."
        ) from error
    digits = load_digits()
    images = (
        torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    )  # 17 levels of grey, 0 to 16
    images = F.interpolate(images, size=(size, size), mode="bilinear").clamp_(0, 1)
    labels = torch.tensor(digits.target, dtype=torch.int64)
    split = len(labels) * 4 // 5
    return Images(Split(images[:split], labels[:split]), Split(images[split:], labels[split:]))


def batch(
    data: Split, batch_size: int, *, seed: int, device: torch.device | str | None = None
) -> tuple[Tensor, Tensor]:
    """Different random images of `data` as (images, labels).

    Images are float32 (batch, channel, height, width), labels int64 (batch,). The same seed gives
    the same batch on every device. Both tensors own their memory.

    Raises ValueError for a size below 1 or above the number of images.
    """
    count = len(data.labels)
    if not 1 <= batch_size <= count:
        raise ValueError(
            f"batch_size must be from 1 to {count}, the images there are, but it is {batch_size}."
        )
    # Drawn on the CPU whatever the device, since each kind of device has random numbers of its own.
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(count, generator=generator)[:batch_size]
    return data.images[chosen].to(device), data.labels[chosen].to(device)
