"""`python -m memlab run train.py`: an unchanged script, watched from its first line to its last.

The receipt goes to standard error, so what the script prints stays as it is. It is printed also
after an exception or Control-C, which end the command as they would have ended the script.
"""

from __future__ import annotations

import builtins
import contextlib
import importlib.util
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import CodeType, ModuleType

import torch

from memlab.budget import budget
from memlab.delivery import deliver
from memlab.remedies import out_of_memory
from memlab.units import format_bytes, parse_bytes
from memlab.watch import EVERY, watch


def run_script(
    script: str,
    arguments: Sequence[str] = (),
    *,
    as_module: bool = False,
    size: str | None = None,
    report: Path | None = None,
    save: Path | None = None,
    lines: bool = False,
    every: int = EVERY,
) -> int:
    """Run a script as Python would, watch all of it, and print its receipt.

    Args:
        script: the path of a file or, with `as_module`, the name of a module or package.
        arguments: what the script finds in `sys.argv[1:]`.
        as_module: whether it is run as by `python -m`.
        size: a budget, such as "8 GiB" (`memlab.budget`).
        report: where to write the receipt as one HTML page.
        save: where to keep the receipt (`memlab.receipt`).
        lines: whether to say which lines of the script made most of the peak. Costs some time.
        every: of so many steps two are recorded in full (`memlab.watch`).

    Returns:
        The exit status that the script would have had: 1 after an exception, 130 after Control-C.
        Over the budget it is 1, too.

    Raises:
        FileNotFoundError: there is no such script.
        ValueError: there is no such module, the budget is not a size, or `every` no number.
    """
    main, code = _load(script, as_module)
    limit = None if size is None else parse_bytes(size)
    # What the script made has to be alive until the end: that is how memlab sees who holds what.
    # So its module and, after an error, its frames are held here.
    with _as_main(main, script, arguments):
        with watch(lines=lines, every=every) as watched:
            error = _run(code, main, limit)
        status = _say_error(error)
        try:
            measurement = watched.measurement
        except (RuntimeError, ValueError) as refusal:
            _say(f"memlab has no receipt of {script}: {refusal}")
            return status
        why = out_of_memory(measurement, error) if _ran_out(error) else []
        over = limit is not None and measurement.peak_bytes > limit
        if over and not why:  # seen by the ledger alone: what an operator took for itself
            why = out_of_memory(measurement)
            why.insert(0, f"The peak is over the budget of {format_bytes(limit)}.")
        deliver(measurement, script, _say, report=report, save=save, why=why)
    return status or int(over)


def _run(code: CodeType, main: ModuleType, limit: int | None) -> BaseException | None:
    """Run a script's code in its module. What ended it, if something did."""
    try:
        with contextlib.nullcontext() if limit is None else budget(limit):
            exec(code, main.__dict__)
    except BaseException as error:
        # Without the frame of memlab, which comes first. And as Python does it, for whoever wants
        # to look at the error: memlab does, since its frames hold what the script worked with.
        error.__traceback__ = error.__traceback__.tb_next
        sys.last_type = type(error)
        sys.last_value = error
        sys.last_traceback = error.__traceback__
        return error
    return None


def _load(script: str, as_module: bool) -> tuple[ModuleType, CodeType]:
    """The module `__main__` of a script, still empty, and the script's code."""
    main = ModuleType("__main__")
    main.__builtins__ = builtins
    if not as_module:
        path = Path(script)
        if not path.is_file():
            raise FileNotFoundError(f"there is no script {script}")
        main.__file__ = script
        main.__spec__ = None
        return main, compile(path.read_bytes(), script, "exec", dont_inherit=True)
    spec = importlib.util.find_spec(script)
    if spec is not None and spec.submodule_search_locations is not None:  # a package
        spec = importlib.util.find_spec(f"{script}.__main__")
    code = None if spec is None or spec.loader is None else spec.loader.get_code(spec.name)
    if code is None:
        raise ValueError(f"there is no module {script!r} that could be run")
    main.__file__ = spec.origin
    main.__spec__ = spec
    main.__package__ = spec.parent
    main.__loader__ = spec.loader
    return main, code


@contextlib.contextmanager
def _as_main(main: ModuleType, script: str, arguments: Sequence[str]) -> Iterator[None]:
    """Make a module the one that runs: `__main__`, its arguments, and where it imports from."""
    before = sys.argv, sys.path[:], sys.modules["__main__"]
    sys.argv = [main.__file__, *arguments]
    if main.__spec__ is None:
        # A script imports from its own folder; `python -m` from the folder in which one is.
        sys.path[0] = str(Path(script).resolve().parent)
    sys.modules["__main__"] = main
    try:
        yield
    finally:
        sys.argv, sys.path[:], sys.modules["__main__"] = before


def _say_error(error: BaseException | None) -> int:
    """Say an error as Python would. The exit status."""
    if error is None:
        return 0
    if isinstance(error, SystemExit):
        if error.code is None or isinstance(error.code, int):
            return error.code or 0
        _say(str(error.code))
        return 1
    sys.excepthook(type(error), error, error.__traceback__)
    return 130 if isinstance(error, KeyboardInterrupt) else 1


def _ran_out(error: BaseException | None) -> bool:
    """Whether an error says that memory did not suffice; on the CPU PyTorch has no class for it."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
