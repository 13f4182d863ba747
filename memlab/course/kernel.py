"""A notebook's run in a kernel of this very Python. The one module that needs nbclient."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

from memlab.results import VARIABLE

DIED = "the kernel died (out of memory?)"

# What nbclient would log is in the error that `execute` returns.
_quiet = logging.getLogger(f"{__name__}.nbclient")
_quiet.addHandler(logging.NullHandler())
_quiet.propagate = False


class Kernel(AsyncKernelManager):
    """A kernel that stops at Ctrl-C and remembers it: nbclient would tell no more than that the
    kernel died.
    """

    interrupted = False

    async def start_kernel(self, **options: object) -> None:
        """Start it, and be the one who hears Ctrl-C."""
        with contextlib.suppress(RuntimeError):  # in a thread there are no signals
            asyncio.get_running_loop().add_signal_handler(signal.SIGINT, self.interrupt_run)
        await super().start_kernel(**options)

    def interrupt_run(self) -> None:
        """Stop."""
        self.interrupted = True
        self.stopping = asyncio.ensure_future(self.shutdown_kernel(now=True))


class Client(NotebookClient):
    """Tells `on_print` what a cell printed last: a long one says so how far it is."""

    on_print: Callable[[str], None]

    def process_message(self, message: dict, cell: dict, index: int) -> object:
        """Hand on what was printed, and treat the message as always."""
        if message["msg_type"] == "stream" and (text := message["content"]["text"].strip()):
            self.on_print(re.split(r"[\r\n]+", text)[-1])
        return super().process_message(message, cell, index)


def execute(
    notebook: dict,
    *,
    folder: Path,
    records: Path,
    timeout: int,
    on_cell: Callable[..., None],
    after_cell: Callable[..., None],
    on_print: Callable[[str], None],
) -> str:
    """Run a notebook's cells; their outputs go into it.

    Args:
        notebook: the notebook, as nbformat read it.
        folder: the folder in which it runs.
        records: the file to which it records.
        timeout: seconds that one cell may take.
        on_cell: called before a cell runs, with keywords.
        after_cell: called after it ran, with keywords.
        on_print: called with the last line of what a cell prints.

    Returns:
        What went wrong, in one line; empty when all went well.

    Raises:
        KeyboardInterrupt: Ctrl-C was pressed.
    """
    # With no folder to look for kernels in, what is left is this Python's own, whatever else is
    # registered here.
    own_python = KernelSpecManager(kernel_dirs=[])
    kernel = Kernel(kernel_name="python3", kernel_spec_manager=own_python)
    client = Client(
        notebook,
        km=kernel,
        timeout=timeout,
        record_timing=False,
        store_widget_state=False,
        log=_quiet,
        resources={"metadata": {"path": str(folder)}},
        on_cell_execute=on_cell,
        on_cell_executed=after_cell,
    )
    client.on_print = on_print
    error = _outcome(client, _environment(records), timeout)
    if kernel.interrupted:
        raise KeyboardInterrupt
    return error


def _outcome(client: Client, environment: dict[str, str], timeout: int) -> str:
    try:
        # What a kernel says of itself on standard error is no part of the notebook.
        client.execute(cleanup_kc=True, env=environment, stderr=subprocess.DEVNULL)
    except CellExecutionError as error:
        return f"{error.ename}: {first_line(error.evalue)}"
    except CellTimeoutError:
        return f"took longer than {timeout} s"
    except DeadKernelError:
        return DIED
    except AssertionError as error:
        # nbclient's own, while it tidies up after a kernel that died.
        if not isinstance(error.__context__, DeadKernelError):
            raise
        return DIED
    except RuntimeError as error:  # the kernel did not start
        return first_line(str(error))
    return ""


def _environment(records: Path) -> dict[str, str]:
    """The environment of a kernel: it records to `records`, and it finds memlab in a checkout that
    is not installed.
    """
    environment = {**os.environ, VARIABLE: str(records), "PYTHONDONTWRITEBYTECODE": "1"}
    source = Path(__file__).resolve().parents[2]
    if (source / "pyproject.toml").is_file():
        path = [str(source), os.environ.get("PYTHONPATH")]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, path))
    return environment


def first_line(text: str) -> str:
    """The first line of an error's text, without colours."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text).strip()
    return plain.splitlines()[0] if plain else ""
