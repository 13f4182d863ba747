"""Training on several ranks, from a notebook that is one process.

What a rank holds is measured in this process: it is rank 0 of many, and PyTorch's fake process
group stands in for the others. Bytes are those of a real rank, and what is computed means nothing.
Whether ranks train right is another question. For that, real processes are started on the CPU.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import linecache
import pickle
import tempfile
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType

from memlab import exercises, measure
from memlab.measurement import Measurement
from memlab.meters.fake_ranks import fake_ranks
from memlab.techniques.sharding import run_ranks
from memlab.units import format_bytes, parse_bytes

#: How far apart losses may be that were added up in another order.
SAME_LOSS = 1e-4

_SCRIPT = """\
import os
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # two ranks cannot share a GPU
import json, pickle
from pathlib import Path
import torch.distributed
from memlab import proof
{imports}
globals().update(pickle.loads(Path({values!r}).read_bytes()))

{sources}

torch.distributed.init_process_group("gloo")
found = [proof.losses({run}, {steps}, change=c, **options_of_run) for c in [{changes}]]
print(json.dumps(found))
torch.distributed.destroy_process_group()
"""


def measure_one(run: Callable, ranks: int, **options: object) -> Measurement:
    """Measure what rank 0 of many holds, without the others.

    Args:
        run: as for `memlab.measure`. There is a process group in it.
        ranks: how many ranks there are.
        **options: those of `memlab.measure`, and keywords for the run.

    Returns:
        A `Measurement` without losses: they mean nothing.

    Raises:
        ValueError: this process is in a process group already.
    """
    with fake_ranks(ranks):
        found = measure(run, **options)
    return dataclasses.replace(found, losses=None)


def losses(
    run: Callable,
    changes: Sequence[Callable],
    *,
    ranks: int = 2,
    steps: int = 4,
    **options: object,
) -> list[list[float]]:
    """Train on real ranks, which are processes on the CPU, once with each change.

    Args:
        run: a generator function, as for `memlab.measure`, from a notebook or a module. It finds
            that `torch.distributed` is initialized.
        changes: functions of the same notebook; the run gets each in turn as its option `change`.
        ranks: how many processes.
        steps: how many steps.
        **options: further keywords for the run, which can be pickled.

    Returns:
        For each change the losses of its steps, each the mean over the ranks.

    Raises:
        memlab.techniques.sharding.RankError: a rank failed; the message has the end of its log.
    """
    found = _Found()
    for function in (run, *changes):
        found.add(function)
    found.values["options_of_run"] = options
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        values, script = Path(folder, "values.pickle"), Path(folder, "rank.py")
        values.write_bytes(pickle.dumps(found.values))
        text = _SCRIPT.format(
            imports="\n".join(found.imports),
            values=str(values),
            sources="\n\n".join(found.sources),
            changes=", ".join(change.__name__ for change in changes),
            run=run.__name__,
            steps=steps,
        )
        script.write_text(text, encoding="utf-8")
        of_ranks = [json.loads(said.splitlines()[-1]) for said in run_ranks(script, ranks)]
    return [
        [sum(of_step) / ranks for of_step in zip(*of_change, strict=True)]
        for of_change in zip(*of_ranks, strict=True)
    ]


def check(
    change: Callable | None,
    *,
    run: Callable,
    reference: Callable,
    budget: int | str,
    ranks: int = 8,
    **options: object,
) -> exercises.Result:
    """Check a learner's change to a model: a rank's bytes, and the losses of two real ranks.

    Args:
        change: the answer, which the run gets as its option `change`. None as long as there is
            none.
        run: the training run.
        reference: the change that trains right, and that does not fit the budget.
        budget: the most bytes that a rank may hold ("28 MiB"); what operators take for themselves
            does not count.
        ranks: how many ranks there are where bytes are counted.
        **options: further keywords for the run.
    """
    budget = parse_bytes(budget)
    before = measure_one(run, ranks, device="cpu", change=reference, **options)
    ledgers = {"as it is": before.known_columns}
    needed, allowed = format_bytes(before.known_bytes), format_bytes(budget)
    if change is None or change is ...:
        lines = [f"Not solved yet: {needed} has to become {allowed}"]
        return _kept(exercises.Result(False, lines, ledgers, budget))
    after = measure_one(run, ranks, device="cpu", change=change, **options)
    ledgers["yours"] = after.known_columns
    if after.known_bytes > budget:
        found = format_bytes(after.known_bytes)
        lines = [f"Over the budget of {allowed}: {found} at the peak, in {after.phase}"]
        return _kept(exercises.Result(False, lines, ledgers, budget))
    expected, answer = losses(run, [reference, change], **options)
    off = max(abs(one - other) for one, other in zip(expected, answer, strict=True))
    solved = off <= SAME_LOSS
    first = f"Solved: {needed} → {format_bytes(after.known_bytes)}, budget {allowed}"
    lines = [
        first if solved else "It fits, but two ranks do not train the same model",
        f"Largest difference of a loss in four steps: {off:.0e} (allowed {SAME_LOSS:.0e}).",
    ]
    return _kept(exercises.Result(solved, lines, ledgers, budget))


def _kept(result: exercises.Result) -> exercises.Result:
    exercises.history.append(result)
    return result


# What another process needs to run a notebook's function ------------------------------------------


class _Found:
    """Imports, values and sources, in an order in which they can be executed."""

    def __init__(self) -> None:
        self.imports: list[str] = []
        self.values: dict[str, object] = {}
        self.sources: list[str] = []
        self._names: set[str] = set()

    def add(self, function: Callable) -> None:
        """Add a function or a class, after all that its source names."""
        if function.__name__ in self._names:
            return
        self._names.add(function.__name__)
        source = _source_of(function)
        known = _globals_of(function)
        for node in ast.walk(ast.parse(source)):
            # What is only assigned is no global: the `_` of a loop is a notebook's last output.
            if not isinstance(node, ast.Name) or not isinstance(node.ctx, ast.Load):
                continue
            if node.id in known and node.id not in self._names:
                self._add_value(node.id, known[node.id], function)
        self.sources.append(source)

    def _add_value(self, name: str, value: object, user: Callable) -> None:
        if _is_of(value, user):
            self.add(value)
        elif isinstance(value, ModuleType):
            self._names.add(name)
            self.imports.append(f"import {value.__name__} as {name}")
        else:
            self._names.add(name)
            self.values[name] = value


def _is_of(value: object, user: Callable) -> bool:
    """Whether a value is a function or a class of the notebook that another one is of."""
    is_code = inspect.isfunction(value) or inspect.isclass(value)
    return is_code and value.__module__ == user.__module__


def _source_of(value: Callable) -> str:
    if inspect.isfunction(value):
        return textwrap.dedent(inspect.getsource(value))
    # `inspect` finds no class of a notebook: its module has no file. Its methods have one.
    text = "".join(linecache.getlines(_method_of(value).__code__.co_filename))
    (found,) = (
        node
        for node in ast.parse(text).body
        if isinstance(node, ast.ClassDef) and node.name == value.__name__
    )
    return ast.get_source_segment(text, found)


def _globals_of(value: Callable) -> Mapping[str, object]:
    return (value if inspect.isfunction(value) else _method_of(value)).__globals__


def _method_of(of: type) -> Callable:
    methods = [getattr(value, "__func__", value) for value in vars(of).values()]
    return next(method for method in methods if inspect.isfunction(method))
