import pytest
import torch


@pytest.fixture(scope="package", autouse=True)
def cpu_scale():
    """The ladder's sizes on a CPU, whatever this machine has, and one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEMLAB_SCALE", "cpu")
        yield
    torch.set_num_threads(threads)
