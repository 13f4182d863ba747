"""Whose code a file is: the user's, or that of an installed library, of Python or of memlab."""

from __future__ import annotations

import functools
import os
import sys
import sysconfig

_MEMLAB = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
_PYTHON = tuple(
    {
        os.path.join(sysconfig.get_path(name), "") for name in ("stdlib", "platstdlib")
    }  # `python` and the commands beside it: `torchrun`, `pytest`
    | {os.path.join(os.path.dirname(os.path.abspath(sys.executable)), "")}
)
#: Code without a file that somebody typed: in IPython before version 8, or at a prompt.
_TYPED = ("<ipython-input", "<stdin>", "<console>")


@functools.cache
def is_user_code(file: str) -> bool:
    """Whether a file is the user's own: a script, a cell of a notebook, a module that is not
    installed.

    Args:
        file: the file of a code object (`co_filename`) or of a module (`__file__`).
    """
    if file.startswith("<"):
        return file.startswith(_TYPED)
    file = os.path.abspath(file)
    installed = f"{os.sep}site-packages{os.sep}" in file or f"{os.sep}dist-packages{os.sep}" in file
    return not (installed or file.startswith((_MEMLAB, *_PYTHON)))


def is_memlab(file: str) -> bool:
    """Whether a file is one of memlab."""
    return os.path.abspath(file).startswith(_MEMLAB)


def place_of(file: str, line: int) -> str:
    """A line for people: `train.py:12`; in a notebook `In[3]:2`, the cell and its line."""
    # Not imported: whoever has a notebook has it already.
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    if shell is not None:
        name_of_cell = getattr(shell.compile, "format_code_name", lambda file: None)(file)
        if name_of_cell is not None:
            return f"{name_of_cell[1]}:{line}"
    return f"{os.path.basename(file)}:{line}"
