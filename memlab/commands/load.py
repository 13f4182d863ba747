"""A function out of a file, as `train.py:train` says it."""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path


class ScriptFailed(Exception):
    """The script itself failed. Its text is the traceback that Python would have shown."""


@contextlib.contextmanager
def loaded(text: str) -> Iterator[Callable]:
    """Run a file and give a function of it. Afterwards its module is forgotten.

    Inside, an exception that comes out of the file is turned into `ScriptFailed`.

    Args:
        text: the file and the function, "train.py:train".

    Raises:
        ValueError: there is no such file or no such function.
        ScriptFailed: the file, or what is called of it, failed.
    """
    file, _, name = text.rpartition(":")
    if not file or not name:
        raise ValueError(
            f"{text!r} has to be a file and a function, with a colon: train.py:train. The loop"
            " goes into the function, and says `yield loss` where a step ends"
        )
    path = Path(file)
    if not path.is_file():
        raise ValueError(f"there is no file {file}")
    if path.suffix != ".py":
        raise ValueError(f"{file} is no Python file: its name does not end in .py")

    before = sys.argv, sys.path[:], dict(sys.modules)
    sys.argv = [file]
    # A script imports from its own folder.
    sys.path.insert(0, str(path.resolve().parent))
    try:
        with _its_own_errors(path):
            module = _execute(path)
            function = _function(module, file, name)
            yield function
    finally:
        sys.argv, sys.path[:], modules = before
        for added in [added for added in sys.modules if added not in modules]:
            source = getattr(sys.modules[added], "__file__", None)
            if source is not None and Path(source).parent == path.resolve().parent:
                del sys.modules[added]


def _execute(path: Path) -> object:
    # Not under its plain name: a train.py may lie beside a package "train" that is there already.
    name = f"memlab_script_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path.resolve())
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _function(module: object, file: str, name: str) -> Callable:
    there = [
        called
        for called, value in vars(module).items()
        if inspect.isfunction(value) and value.__module__ == module.__name__
    ]
    if not hasattr(module, name):
        raise ValueError(f"{file} has no function {name!r}. It has: {', '.join(there) or 'none'}")
    function = getattr(module, name)
    if not callable(function):
        raise ValueError(f"{name} in {file} is no function, but {type(function).__name__}")
    return function


@contextlib.contextmanager
def _its_own_errors(path: Path) -> Iterator[None]:
    """Turn an exception that comes out of a file into `ScriptFailed`; leave memlab's own."""
    try:
        yield
    except SyntaxError as error:
        raise ScriptFailed("".join(traceback.format_exception_only(error))) from error
    except (Exception, SystemExit) as error:
        frames = error.__traceback__
        while frames is not None and frames.tb_frame.f_code.co_filename != str(path.resolve()):
            frames = frames.tb_next
        if frames is None:
            raise
        shown = traceback.format_exception(type(error), error, frames)
        raise ScriptFailed("".join(shown)) from error
