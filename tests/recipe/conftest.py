import pytest


@pytest.fixture(scope="package", autouse=True)
def _cpu_scale():
    """The ladder's sizes on a CPU, whatever this machine has."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEMLAB_SCALE", "cpu")
        yield
