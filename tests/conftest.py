"""What all tests have in common: fixed seeds, no network, no window, GPU tests only where there is
a GPU.

All others are tests of the CPU, also on a machine with a GPU: they count on the CPU's default
device, scale and bytes. So a GPU is hidden from them, and seen only where the GPU's tests are asked
for (`make test-gpu`).
"""

import gc
import os

# Before matplotlib or a Hugging Face library is imported.
os.environ.setdefault("MPLBACKEND", "agg")
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from hypothesis import settings

# The same examples each time, no test of how long one takes, and nothing left behind on disk.
settings.register_profile("memlab", derandomize=True, deadline=None, database=None)
settings.load_profile("memlab")


def pytest_configure(config):
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before CUDA is looked for


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device and `make test-gpu`")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _fixed_seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="module")
def _few_threads():
    """The tensors of tests are so small that more threads only wait for each other.

    What has to hold with any number of them is tested with MEMLAB_TEST_THREADS=4, too.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(int(os.environ.get("MEMLAB_TEST_THREADS", "1")))
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def objects_frozen():
    """The meter walks the objects that the garbage collector knows: those of the imported libraries
    are set aside.
    """
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="session")
def transformers():
    """Hugging Face's library, for the tests that hold a technique against its models."""
    return pytest.importorskip("transformers")
