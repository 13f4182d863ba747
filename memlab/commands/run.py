"""The commands: what they call, what they print, and their exit status."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Iterator

from memlab.plan import Plan, plan
from memlab.predict import predict
from memlab.prediction import Fit, Prediction
from memlab.show import Table
from memlab.solve import solve
from memlab.units import format_bytes

from .arguments import options_of, whole_number
from .load import ScriptFailed, loaded

#: Where no GPU is named: the one that is predicted, and those of which it is said whether they do.
DEFAULT_GPU = "H100 80GB"
COMMON = ("RTX 3060", "T4", "RTX 4090", "L4", "RTX 5090", "L40S", "A100 40GB", "H100", "H200")

FITS, FAILED, DOES_NOT_FIT = 0, 1, 3


def run_command(asked: argparse.Namespace) -> int:
    """Run one of the commands.

    Args:
        asked: what `add_commands` understood.

    Returns:
        The exit status: 0 it fits, 3 it does not, 1 the script failed.

    Raises:
        ValueError: what was given cannot be used.
    """
    answer = {"predict": _predict, "solve": _solve, "plan": _plan}[asked.command]
    try:
        with _prints_apart(asked.json):
            fits, text, fields = answer(asked)
    except ImportError as error:
        raise ValueError(str(error)) from error  # transformers or PEFT is not installed
    except ScriptFailed as failure:
        print(f"python -m memlab {asked.command}: the script failed", file=sys.stderr)
        print(failure, end="", file=sys.stderr)
        return FAILED
    print(json.dumps(fields, indent=2) if asked.json else text)
    return FITS if fits else DOES_NOT_FIT


Answer = tuple[bool, str, dict[str, object]]


def _predict(asked: argparse.Namespace) -> Answer:
    options = options_of(asked.option)
    with loaded(asked.run) as run:
        prediction = predict(run, steps=_steps(asked), gpu=asked.gpu or DEFAULT_GPU, **options)
    fit = prediction.fits(in_use=asked.in_use)
    fields = {**_fields_of_fit(fit), **_fields_of(prediction)}
    text = f"{prediction}\n\n{fit}"
    if asked.gpu is None:
        others = [prediction.fits(name, in_use=asked.in_use) for name in COMMON]
        fields["gpus"] = [_fields_of_fit(other) for other in others]
        text += f"\n\n{_table(others).to_text()}"
        text += '\nOther GPUs may choose other kernels: name yours, --gpu "RTX 4090"'
    return bool(fit), text, fields


def _solve(asked: argparse.Namespace) -> Answer:
    options = options_of(asked.option)
    low = whole_number("--low", asked.low)
    high = None if asked.high is None else whole_number("--high", asked.high)
    with loaded(asked.run) as run:
        solution = solve(
            run,
            asked.field,
            low,
            high,
            gpu=asked.gpu or DEFAULT_GPU,
            in_use=asked.in_use,
            steps=_steps(asked),
            **options,
        )
    fields = {
        "field": solution.field,
        "value": solution.value,
        "gpu": solution.gpu,
        "notes": list(solution.notes),
        "tried": [{"value": each.value, **_fields_of_fit(each.fit)} for each in solution.tried],
        "prediction": _fields_of(solution.prediction),
    }
    return bool(solution), str(solution), fields


def _plan(asked: argparse.Namespace) -> Answer:
    if asked.gpu is None:
        raise ValueError('which GPU? --gpu "RTX 4090", or a size: --gpu "24 GiB"')
    whole = {
        name: whole_number(f"--{name}", getattr(asked, name))
        for name in ("batch", "sequence", "lora")
        if getattr(asked, name) is not None
    }
    options = options_of(asked.option, of_plan=True)
    # A path of Windows has a colon, too, and no .py before it.
    given = loaded(asked.model) if ".py:" in asked.model else contextlib.nullcontext(asked.model)
    with given as model:
        planned = plan(
            model, gpu=asked.gpu, in_use=asked.in_use, every=asked.every, **whole, **options
        )
    return planned.fits, str(planned), _fields_of_plan(planned)


def _fields_of_plan(planned: Plan) -> dict[str, object]:
    rungs = [
        {
            "switch": rung.switch,
            "needed_bytes": rung.needed_bytes,
            "predicted": rung.predicted,
            "took_bytes": rung.took_bytes,
            "off": rung.off,
        }
        for rung in planned.rungs
    ]
    return {
        "title": planned.title,
        **_fields_of_fit(planned.fit),
        "switches": list(planned.switches),
        "rungs": rungs,
        "before": _fields_of(planned.before),
        "after": _fields_of(planned.after),
        "code": planned.code,
        "assumed": list(planned.notes),
    }


def _steps(asked: argparse.Namespace) -> int:
    return whole_number("--steps", asked.steps)


def _table(fits: list[Fit]) -> Table:
    rows = [
        {
            "GPU": fit.gpu,
            "needs": format_bytes(fit.needed_bytes),
            "of": format_bytes(fit.free_bytes),
            "": "fits" if fit else "does not fit",
            "left": ("" if fit else "-") + format_bytes(abs(fit.margin_bytes)),
        }
        for fit in fits
    ]
    return Table(rows, numbers=("needs", "of", "left"))


def _fields_of_fit(fit: Fit) -> dict[str, object]:
    return {
        "gpu": fit.gpu,
        "fits": bool(fit),
        "needed_bytes": fit.needed_bytes,
        "free_bytes": fit.free_bytes,
        "margin_bytes": fit.margin_bytes,
    }


def _fields_of(prediction: Prediction) -> dict[str, object]:
    return {
        "allocated_bytes": prediction.allocated_bytes,
        "reserved_bytes": prediction.reserved_bytes,
        "process_bytes": prediction.process_bytes,
        "phase": prediction.phase,
        "columns": prediction.columns,
        "host_columns": prediction.host_columns,
        "assumed": list(prediction.notes),
    }


@contextlib.contextmanager
def _prints_apart(apart: bool) -> Iterator[None]:
    """What the script prints goes to standard error: standard output is JSON alone."""
    with contextlib.redirect_stdout(sys.stderr) if apart else contextlib.nullcontext():
        yield
