"""A notebook's run in a kernel: what tests/course/test_run.py cannot reach."""

import nbclient
import nbformat
import pytest

from memlab.course import kernel


def execute(tmp_path):
    cells = [nbformat.v4.new_code_cell("1")]
    return kernel.execute(
        nbformat.v4.new_notebook(cells=cells),
        folder=tmp_path,
        records=tmp_path / "records.jsonl",
        timeout=10,
        on_cell=lambda **_: None,
        after_cell=lambda **_: None,
        on_print=lambda line: None,
    )


def test_a_kernel_that_dies_is_told_also_when_nbclient_stumbles_over_it(tmp_path, monkeypatch):
    """Tidying up after it, nbclient can fail with an assertion of its own."""

    def dies(self, **_):
        try:
            raise nbclient.exceptions.DeadKernelError("Kernel died")
        finally:
            assert not self.nb, "nbclient's"  # raised while the other error is handled

    monkeypatch.setattr(nbclient.NotebookClient, "execute", dies)
    assert execute(tmp_path) == "the kernel died (out of memory?)"


def test_an_assertion_that_has_another_cause_is_not_hidden(tmp_path, monkeypatch):
    def fails(self, **_):
        raise AssertionError("a bug")

    monkeypatch.setattr(nbclient.NotebookClient, "execute", fails)
    with pytest.raises(AssertionError, match="a bug"):
        execute(tmp_path)


def test_a_kernel_that_does_not_start_is_told(tmp_path, monkeypatch):
    def fails(self, **_):
        raise RuntimeError("\x1b[31mKernel didn't respond\x1b[0m\nin 60 seconds")

    monkeypatch.setattr(nbclient.NotebookClient, "execute", fails)
    assert execute(tmp_path) == "Kernel didn't respond"
