"""The GPUs that people type: how much memory each has, as its driver reports it.

A box says "24 GB"; the driver keeps a part of it for itself, and PyTorch sees the rest. The bytes
here are those that programs reported of themselves and that their users published. Drivers differ:
the ones of 2025 and 2026 (CUDA 13) keep up to 0.5 GiB, those before kept about half of that. Of
several reports the one under the newest driver for Linux was taken; Windows reports more.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from functools import cache

from memlab.units import MiB, format_bytes, parse_bytes

# One cuBLAS workspace by PyTorch's default: parseChosenWorkspaceSize() in
# aten/src/ATen/cuda/CublasHandlePool.cpp. Hopper and Blackwell (9.x, 10.x, 12.x) get 32 MiB, all
# others ":4096:2:16:8", which is two of 4 MiB and eight of 16 KiB. On AMD's gfx94x it is 128 MiB.
_WORKSPACE_LARGE = 32 * MiB
_WORKSPACE_SMALL = 2 * 4096 * 1024 + 8 * 16 * 1024
_LARGE_SINCE = 9
_WORKSPACE_GFX94 = 128 * MiB

# What CUDA's context takes beside the allocator is an ESTIMATE: it grows with every kernel that is
# loaded. On the H100 it is what results/nvidia-h100-80gb-hbm3-large.json has for the first run of
# its process ("device" less "reserved", driver 580, PyTorch 2.11); the later runs of that process
# had up to 96 MiB more.
_CONTEXT_H100 = 801_964_032
# Elsewhere: 426 MiB before the first kernel (RTX 6000 Ada, PyTorch 2.10 with CUDA 13.0, unsloth-zoo
# pull request 1053), and about 300 to 400 MiB (pytorch issues 107667 and 109888), to which the
# kernels come. No training run's figure was found, so this is the bare context and 90 MiB.
_CONTEXT_ELSEWHERE = 516 * MiB

# A number without a unit below this is a name that we do not know ("3050"), and no size.
_SMALLEST_BARE_SIZE = MiB

_SMI = "nvidia-smi's total, or Windows'; PyTorch on Linux sees up to 0.5 GiB less"
_LLAMA = "totalGlobalMem in a log of llama.cpp, 2026, whole MiB"
_TORCH = "torch.cuda.get_device_properties, whole MiB"
_QUERY_11 = "deviceQuery, driver for CUDA 11.4"
_QUERY_12 = "deviceQuery, driver for CUDA 12.0 to 12.7"
_QUERY_13 = "deviceQuery, driver for CUDA 13"

# A board's form does not change the bytes by much, and most people leave it out.
_V100_16 = "V100 16GB, V100-PCIE-16GB"
_V100_32 = "V100 32GB, V100-PCIE-32GB"
_A100_40 = "A100 40GB, A100-PCIE-40GB"
_A100_80 = "A100 80GB, A100 80GB PCIe"

# The driver's name; further names; the size on the box; bytes; compute capability;
# multiprocessors (deviceQuery, or NVIDIA's data sheet); where the bytes are from.
# A size within the name tells variants apart of which none is meant by the name alone.
_CARDS = (
    ("Tesla P100-PCIE-16GB", "P100", "16GB", 17_071_734_784, (6, 0), 56, _QUERY_11),
    ("Tesla V100-SXM2-16GB", _V100_16, "16GB", 16_928_342_016, (7, 0), 80, _QUERY_12),
    ("Tesla V100-SXM2-32GB", _V100_32, "32GB", 34_089_730_048, (7, 0), 80, _QUERY_11),
    ("Tesla T4", "", "16GB", 15_642_329_088, (7, 5), 40, _QUERY_12),
    ("NVIDIA GeForce RTX 2080 Ti", "", "11GB", 11_019 * MiB, (7, 5), 68, _TORCH),
    ("NVIDIA GeForce RTX 3060", "", "12GB", 11_906 * MiB, (8, 6), 28, _LLAMA),
    ("NVIDIA GeForce RTX 3060 8GB", "", "8GB", 8_192 * MiB, (8, 6), 28, _SMI),
    ("NVIDIA GeForce RTX 3060 Ti", "", "8GB", 8_359_641_088, (8, 6), 38, _QUERY_12),
    ("NVIDIA GeForce RTX 3070", "", "8GB", 7_819 * MiB, (8, 6), 46, _LLAMA),
    ("NVIDIA GeForce RTX 3070 Ti", "", "8GB", 8_192 * MiB, (8, 6), 48, _SMI),
    (
        "NVIDIA GeForce RTX 3080",
        "",
        "10GB",
        10_004 * MiB,
        (8, 6),
        68,
        "9.77 GiB in TensorFlow's log",
    ),
    ("NVIDIA GeForce RTX 3080 12GB", "", "12GB", 12_288 * MiB, (8, 6), 70, _SMI),
    ("NVIDIA GeForce RTX 3080 Ti", "", "12GB", 12_630_491_136, (8, 6), 80, _QUERY_11),
    ("NVIDIA GeForce RTX 3090", "", "24GB", 24_123 * MiB, (8, 6), 82, _LLAMA),
    ("NVIDIA GeForce RTX 3090 Ti", "", "24GB", 24_114 * MiB, (8, 6), 84, _TORCH),
    ("NVIDIA GeForce RTX 4060", "", "8GB", 8_188 * MiB, (8, 9), 24, _SMI),
    ("NVIDIA GeForce RTX 4060 Ti 8GB", "", "8GB", 8_188 * MiB, (8, 9), 34, _SMI),
    ("NVIDIA GeForce RTX 4060 Ti 16GB", "", "16GB", 16_722_821_120, (8, 9), 34, _QUERY_13),
    ("NVIDIA GeForce RTX 4070", "", "12GB", 11_866 * MiB, (8, 9), 46, _LLAMA),
    ("NVIDIA GeForce RTX 4070 SUPER", "", "12GB", 12_282 * MiB, (8, 9), 56, _SMI),
    (
        "NVIDIA GeForce RTX 4070 Ti",
        "",
        "12GB",
        11_980 * MiB,
        (8, 9),
        60,
        "Kolors issue 11: 11.70 GiB",
    ),
    ("NVIDIA GeForce RTX 4070 Ti SUPER", "", "16GB", 15_934 * MiB, (8, 9), 66, _TORCH),
    ("NVIDIA GeForce RTX 4080", "", "16GB", 16_049 * MiB, (8, 9), 76, _TORCH),
    ("NVIDIA GeForce RTX 4080 SUPER", "", "16GB", 16_852_844_544, (8, 9), 80, _QUERY_12),
    ("NVIDIA GeForce RTX 4090", "", "24GB", 25_250_627_584, (8, 9), 128, _QUERY_13),
    ("NVIDIA GeForce RTX 5060", "", "8GB", 8_151 * MiB, (12, 0), 30, _SMI),
    ("NVIDIA GeForce RTX 5060 Ti 8GB", "", "8GB", 8_151 * MiB, (12, 0), 36, _SMI),
    ("NVIDIA GeForce RTX 5060 Ti 16GB", "", "16GB", 15_850 * MiB, (12, 0), 36, _LLAMA),
    ("NVIDIA GeForce RTX 5070", "", "12GB", 12_226 * MiB, (12, 0), 48, _SMI),
    ("NVIDIA GeForce RTX 5070 Ti", "", "16GB", 15_842 * MiB, (12, 0), 70, _LLAMA),
    ("NVIDIA GeForce RTX 5080", "", "16GB", 15_880 * MiB, (12, 0), 84, _LLAMA),
    ("NVIDIA GeForce RTX 5090", "", "32GB", 33_668_857_856, (12, 0), 170, _QUERY_13),
    ("NVIDIA RTX A4000", "", "16GB", 15_984 * MiB, (8, 6), 48, "VGGT-Long issue 6: 15.61 GiB"),
    ("NVIDIA RTX A5000", "", "24GB", 25_402_343_424, (8, 6), 64, "deviceQuery, driver not said"),
    ("NVIDIA RTX A6000", "", "48GB", 51_160_023_040, (8, 6), 84, _QUERY_12),
    ("NVIDIA RTX 6000 Ada Generation", "", "48GB", 50_865_307_648, (8, 9), 142, _TORCH),
    ("NVIDIA RTX PRO 6000 Blackwell", "RTX PRO 6000", "96GB", 97_247 * MiB, (12, 0), 188, _LLAMA),
    ("NVIDIA A10", "", "24GB", 22_731 * MiB, (8, 6), 72, _LLAMA),
    ("NVIDIA A10G", "", "24GB", 22_587 * MiB, (8, 6), 80, _TORCH),
    ("NVIDIA A40", "", "48GB", 45_416 * MiB, (8, 6), 84, _TORCH),
    ("NVIDIA L4", "", "24GB", 23_612_293_120, (8, 9), 58, _QUERY_12),
    ("NVIDIA L40S", "", "48GB", 47_576_711_168, (8, 9), 142, _QUERY_12),
    ("NVIDIA A100-SXM4-40GB", _A100_40, "40GB", 42_298_834_944, (8, 0), 108, _QUERY_12),
    ("NVIDIA A100-SXM4-80GB", _A100_80, "80GB", 85_100_068_864, (8, 0), 108, _QUERY_12),
    ("NVIDIA H100 PCIe", "", "80GB", 81_008 * MiB, (9, 0), 114, _TORCH),
    ("NVIDIA H100 80GB HBM3", "H100", "80GB", 85_017_493_504, (9, 0), 132, "memlab's own records"),
    ("NVIDIA H200", "", "141GB", 143_156 * MiB, (9, 0), 132, _TORCH),
    ("NVIDIA B200", "", "180GB", 182_631 * MiB, (10, 0), 148, _TORCH),
)


@dataclass(frozen=True)
class GPU:
    """A GPU, or a size of memory alone.

    Attributes:
        name: the driver's name ("NVIDIA H100 80GB HBM3"), or the size ("24.00 GiB").
        memory_bytes: what `torch.cuda.get_device_properties(0).total_memory` says, or the nearest
            to it that was found. It is not the size on the box.
        architecture: CUDA's compute capability, (9, 0); None where it is not known, or no CUDA's.
        multiprocessors: how many it has; None where it is not known.
        workspace_bytes: one cuBLAS workspace by PyTorch's default, the larger one if the
            architecture is not known. A run mostly has two: forward's thread and backward's.
        context_bytes: an ESTIMATE of what CUDA's context takes beside PyTorch's allocator.
        source: where `memory_bytes` is from.
    """

    name: str
    memory_bytes: int
    architecture: tuple[int, int] | None
    multiprocessors: int | None
    workspace_bytes: int
    context_bytes: int
    source: str


def find_gpu(name: str | int) -> GPU:
    """Return the GPU that a name or a size means.

    Args:
        name: a name as people type it ("T4", "rtx 4090", "A100 80GB", "NVIDIA L4"), or a size
            ("24 GiB", or a number of bytes), which gives a GPU of which nothing else is known.
            A size in GB is decimal: "24GB" is 22.35 GiB, less than a card of 24 GB has.

    Raises:
        ValueError: no GPU has this name (the nearest ones are said), or several have it.
    """
    if isinstance(name, bool) or not isinstance(name, (str, int)):
        raise ValueError(f'a GPU is a name ("RTX 4090") or a size ("24 GiB"), not {name!r}')
    by_key = _by_key()
    key = _key(str(name))
    for spelling in (key, key + "b", key + "gb"):  # "A100 80", "A100 80G", "A100 80GB"
        if spelling in by_key:
            return by_key[spelling]
    variants = [found for found in by_key if re.fullmatch(rf"{key}\d+gb", found)] if key else []
    if len(variants) > 1:
        names = " or ".join(f'"{name} {found.removeprefix(key).upper()}"' for found in variants)
        raise ValueError(f"there are several {name}. Write {names}")
    return _of_size(name)


def known_gpus() -> tuple[GPU, ...]:
    """Return every GPU that has a name here, the older ones first within their kind."""
    return tuple(dict.fromkeys(_by_key().values()))


def _of_size(name: str | int) -> GPU:
    bare = isinstance(name, int) or name.strip().isdecimal()
    try:
        size = parse_bytes(name)
    except ValueError:
        raise _unknown(name) from None
    if bare and size < _SMALLEST_BARE_SIZE:
        raise _unknown(name)
    # Nothing is known but the size. The larger workspace is the one that does not promise too much.
    return GPU(
        name=format_bytes(size),
        memory_bytes=size,
        architecture=None,
        multiprocessors=None,
        workspace_bytes=_WORKSPACE_LARGE,
        context_bytes=_CONTEXT_ELSEWHERE,
        source="the size that was given",
    )


def _unknown(name: str | int) -> ValueError:
    near = difflib.get_close_matches(_key(str(name)), _by_key(), n=6, cutoff=0.5)
    names = list(dict.fromkeys(_by_key()[key].name for key in near))[:3]
    nearest = f" The nearest names are: {', '.join(names)}." if names else ""
    return ValueError(f'no GPU is known as {name!r}.{nearest} A size does, too: "24 GiB"')


def _key(name: str) -> str:
    """What is left of a name when blanks, case and the makers' words do not count."""
    name = name.lower().replace("gib", "gb")
    return re.sub(r"nvidia|geforce|tesla|amd|instinct|generation|[^a-z0-9]", "", name)


@cache
def _by_key() -> dict[str, GPU]:
    """Every spelling that means one GPU, and that GPU."""
    spellings: dict[str, GPU] = {}
    for name, others, size, memory, architecture, multiprocessors, source in _CARDS:
        large = architecture[0] >= _LARGE_SINCE
        gpu = GPU(
            name=name,
            memory_bytes=memory,
            architecture=architecture,
            multiprocessors=multiprocessors,
            workspace_bytes=_WORKSPACE_LARGE if large else _WORKSPACE_SMALL,
            # The larger cards that are newer than Ada have the H100's, for want of their own.
            context_bytes=_CONTEXT_H100 if architecture[0] in (9, 10) else _CONTEXT_ELSEWHERE,
            source=source,
        )
        for spelling in _spellings(name, others, size):
            spellings.setdefault(spelling, gpu)
    spellings[_key("MI300X")] = spellings[_key("MI300X 192GB")] = _mi300x()
    return spellings


def _spellings(name: str, others: str, size: str) -> list[str]:
    """The keys of all names of a card: with its size, and without where the name does without."""
    keys = [_key(called) for called in (name, *others.split(", ")) if called]
    keys += [key + size.lower() for key in keys if size.lower() not in key]
    return keys + [key.removeprefix("rtx") for key in keys if key.startswith("rtx")]


def _mi300x() -> GPU:
    """AMD's: its bytes are known, and nothing here that is CUDA's holds for it."""
    return GPU(
        name="AMD Instinct MI300X",
        memory_bytes=196_592 * MiB,
        architecture=None,
        multiprocessors=None,
        workspace_bytes=_WORKSPACE_GFX94,
        context_bytes=_CONTEXT_H100,
        source="ROCm issue 4203: torch.cuda.get_device_properties, whole MiB",
    )
