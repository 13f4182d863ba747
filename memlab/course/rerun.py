"""A notebook's recorded runs again, predicted instead of measured, as on the GPU of the record.

Only the statements that lead to the notebook's records are run (`slices`), with stand-ins for
`measure`, `compare` and `results.record`. They are run twice. The first time nothing is predicted:
it shows which call of `measure` is which variant of which record. The second time each of those
calls is predicted at its place, where the notebook measured.
"""

from __future__ import annotations

import ast
import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode

import memlab
import memlab.proof
import memlab.workloads.scale
from memlab import results
from memlab.course.notebook import read
from memlab.course.on_device import leaves_on_device
from memlab.course.slices import statements_for_records
from memlab.prediction import Prediction
from memlab.results import Record


@dataclass
class Call:
    """One call of `measure` in a notebook: which run, with which options.

    What a notebook reads of it, other than by recording it, is read from its prediction.
    """

    number: int
    predict: Callable[[], Prediction]
    #: What earlier statements of the notebook have left on the device.
    beside: list[str]
    prediction: Prediction | None = None

    def __getattr__(self, name: str) -> object:
        if self.prediction is None:
            self.prediction = self.predict()
        return getattr(self.prediction, name)


@dataclass
class Again:
    """What running a notebook again has found.

    Attributes:
        records: in their order, the technique, the sizes, and variant → the call of `measure`.
        stopped: statements that could not be run, each with the reason.
    """

    records: list[tuple[str, dict, dict[str, Call]]] = field(default_factory=list)
    stopped: list[str] = field(default_factory=list)


def run_again(
    path: Path, scale_name: str, gpu: str, on_call: Callable[[Call], None], record: Record
) -> Again:
    """Run the statements of a notebook that lead to its records.

    Args:
        path: the notebook.
        scale_name: the scale of the records: "t4", "gpu" or "large".
        gpu: the GPU of the records, as `predict` takes it.
        on_call: called with each call of `measure`, at its place.
        record: one of the notebook's records, from that GPU.

    Returns:
        The records that the notebook made, and what could not be run.
    """
    found = Again()
    notebook = read(path)
    names: dict[str, object] = {"__name__": "__main__"}
    beside = leaves_on_device(notebook)
    with _stand_ins(found, on_call, gpu, beside, scale_name, record.environment), _in(path.parent):
        for statement in statements_for_records(notebook):
            measures = any(getattr(node, "id", "") == "measure" for node in ast.walk(statement))
            try:
                with contextlib.nullcontext() if measures else _OnHost():
                    code = compile(ast.Module([statement], []), path.name, "exec")
                    exec(code, names)
                    _data_set(path, names, record)
            except Exception as error:
                first = ast.unparse(statement).splitlines()[0]
                found.stopped.append(f"{first}: {type(error).__name__}: {error}")
    return found


class _OnHost(TorchFunctionMode):
    """What a notebook computes between its runs is computed on the host: there is no GPU."""

    def __torch_function__(self, function, types, arguments=(), keywords=None):
        def on_host(value: object) -> object:
            is_device = isinstance(value, torch.device) and str(value).startswith("cuda")
            return torch.device("cpu") if is_device else value

        keywords = {name: on_host(value) for name, value in (keywords or {}).items()}
        return function(*map(on_host, arguments), **keywords)


@contextlib.contextmanager
def _stand_ins(
    found: Again,
    on_call: Callable[[Call], None],
    gpu: str,
    beside: list[tuple[str, int, float]],
    scale_name: str,
    environment: results.Environment,
) -> Iterator[None]:
    calls: list[Call] = []

    def measure(run, *, steps=2, repeats=0, device=None, lines=False, **options) -> Call:
        line = sys._getframe(1).f_lineno
        left = [name for name, born, died in beside if born < line < died]
        call = Call(
            len(calls),
            lambda: memlab.predict(run, steps=steps, gpu=gpu, progress=False, **options),
            left,
        )
        calls.append(call)
        on_call(call)
        return call

    def compare(*runs, names=None, predicted=None) -> dict[str, Call]:
        return dict(zip(names, runs, strict=True))

    def record(comparison, *, technique, sizes, **keywords) -> None:
        found.records.append((technique, sizes, comparison))

    # The module; the package has the function by this name.
    scale = sys.modules["memlab.workloads.scale"]
    properties = {
        "name": environment.gpu,
        "memory_bytes": environment.gpu_bytes,
        "native_bfloat16": True,
    }
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.dict(os.environ, {"MEMLAB_SCALE": scale_name}))
        for where, name, stand_in in (
            (memlab, "measure", measure),
            (memlab, "compare", compare),
            # The limit of a budget changes no byte.
            (memlab, "budget", lambda limit: contextlib.nullcontext()),
            (memlab, "proof", _PROOF),
            (results, "record", record),
            (scale, "resolve_device", lambda: torch.device("cuda", 0)),
            (scale, "has_own_memory", lambda device: True),
            (scale, "properties", lambda device: properties),
        ):
            stack.enter_context(mock.patch.object(where, name, stand_in))
        yield


# Proofs and times are no part of what is predicted.
_PROOF = SimpleNamespace(
    first_step=lambda run, **options: SimpleNamespace(gradients={}, flops=0, loss=0.0),
    time_together=lambda runs, *more, **options: dict.fromkeys(runs),
    losses=lambda run, steps, **options: [],
)


@contextlib.contextmanager
def _in(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def _data_set(path: Path, names: dict[str, object], record: Record) -> None:
    """Give notebook 06 a data set of the size that it had: it is made of the machine's own files.

    Nothing of it is read but its size.
    """
    file = names.get("path")
    if path.stem == "06_data_loading" and isinstance(file, Path) and not file.exists():
        file.touch()
        os.truncate(file, int(record.sizes["tokens in the data set"]))
