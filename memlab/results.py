"""Records: what the notebooks measured and the claims they tested, kept in files.

A results file is one JSON object, one file for each kind of device (`results/cpu.json`,
`results/nvidia-h200.json`):

    schema       the version of this form, 1
    environment  device, gpu, gpu_bytes, torch, driver, python, threads, commit, date
    records      one for each comparison: notebook, technique, scale, sizes, variants
    claims       one for each claim that a notebook tested: notebook, number, says, verdict, found

A variant has a name, predicted and measured bytes, the ledger's columns at the peak, the phase of
the peak, reserved and device bytes, seconds, tokens per second, loss and largest gradient
difference. What does not apply, or was not measured, is null. A notebook that is run again replaces
its own records only: a record that stays from an earlier run then carries an `environment` of its
own, which holds what differs from the file's.
"""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from memlab.ledger import COLUMNS, PHASES
from memlab.meters.device import environment as measured_environment

if TYPE_CHECKING:
    from memlab.compare import Comparison

#: The version of the form of a results file. It grows when a reader of the old form would misread
#: the new one.
SCHEMA = 1

#: The environment variable that names the file to which `record` appends, one JSON object a line.
VARIABLE = "MEMLAB_RECORDS"


class Record(dict):
    """A record, a plain dictionary, which a notebook shows as one line."""

    def _repr_pretty_(self, printer, cycle: bool) -> None:
        count = len(self["variants"])
        printer.text(f"recorded: {count} variant{'s' * (count > 1)} of {self['technique']}")


def record(
    comparison: Comparison,
    *,
    notebook: str,
    technique: str,
    sizes: dict[str, object],
    tokens_per_step: int | None = None,
    loss: dict[str, float | None] | None = None,
    max_gradient_difference: dict[str, float | None] | None = None,
    scale: str | None = None,
) -> Record:
    """Make the record of a comparison, and append it to the file that MEMLAB_RECORDS names (if it
    names one).

    Args:
        comparison: what `memlab.compare` returned; the first variant is the baseline.
        notebook: the notebook's file name without `.ipynb`.
        technique: the technique's name, that of its module in `memlab.techniques`.
        sizes: what the run's bytes depend on, by name: `{"layers": 6, "batch_size": 8}`. Texts,
            numbers, true or false.
        tokens_per_step: tokens in one step, from which tokens per second are made where a step was
            timed.
        loss: variant → loss; a variant that is not named gets the last loss of its measurement, if
            there is one.
        max_gradient_difference: variant → largest difference of a gradient from the baseline's.
        scale: `"cpu"`, `"t4"`, `"gpu"` or `"large"`; by default what `memlab.workloads.scale()`
            chooses here.

    Raises:
        ValueError: a name that is no variant's, a number that is not finite, or anything else that
            a results file cannot hold.
    """
    names = [variant.name for variant in comparison.variants]
    loss, differences = loss or {}, max_gradient_difference or {}
    for what, given in (("loss", loss), ("max_gradient_difference", differences)):
        if unknown := [name for name in given if name not in names]:
            raise ValueError(
                f"{what} names {_listed(unknown)}, but the comparison has {_listed(names)}"
            )
    if tokens_per_step is not None and (not _is_whole(tokens_per_step) or tokens_per_step == 0):
        raise ValueError(
            f"tokens_per_step has to be a positive whole number, not {tokens_per_step!r}"
        )
    if scale is None:
        from memlab.workloads import scale as sizes_of_this_device

        scale = sizes_of_this_device().name
    environments = [variant.measurement.environment for variant in comparison.variants]
    for environment_ in environments:
        if any(environment_.get(key) != environments[0].get(key) for key in ("device", "gpu")):
            raise ValueError(
                "the variants were measured on different devices: compare runs on one device"
            )

    variants = []
    for variant in comparison.variants:
        m = variant.measurement
        last_loss = m.losses[-1] if m.losses else None
        timed = m.seconds is not None
        variants.append(
            {
                "name": variant.name,
                "predicted_bytes": variant.predicted_bytes,
                "peak_bytes": m.peak_bytes,
                "columns": {column: m.columns[column] for column in COLUMNS},
                "phase": m.phase,
                "reserved_bytes": m.reserved_bytes,
                "device_bytes": m.device_bytes,
                "seconds": (
                    {
                        "median": _rounded(m.seconds.median),
                        "spread": _rounded(m.seconds.spread),
                        "repeats": m.seconds.repeats,
                    }
                    if timed
                    else None
                ),
                "tokens_per_second": (
                    _rounded(tokens_per_step / m.seconds.median)
                    if timed and tokens_per_step is not None
                    else None
                ),
                "loss": _float(loss.get(variant.name, last_loss)),
                "max_gradient_difference": _float(differences.get(variant.name)),
            }
        )
    made = Record(
        notebook=notebook, technique=technique, scale=scale, sizes=dict(sizes), variants=variants
    )
    _check_record(made, f"the record of {notebook!r}")
    _append({"environment": environments[0], "record": made})
    return made


class Claim(dict):
    """A tested claim, a plain dictionary, which a notebook shows as three lines."""

    def _repr_pretty_(self, printer, cycle: bool) -> None:
        printer.text(
            f"Claim {self['number']}: {self['says']}\nVerdict: {self['verdict']}.\n{self['found']}"
        )


def claim(
    number: int, says: str, *, notebook: str, holds: bool, when: str = "", found: str
) -> Claim:
    """Give a verdict on one of the claims that the course tests, and append it to the file that
    MEMLAB_RECORDS names.

    The cell that calls it passes what it measured as `holds`, and asserts what `found` says.

    Args:
        number: the claim's number in the course's list.
        says: what the source says, in a few words.
        notebook: the notebook's file name without `.ipynb`.
        holds: whether the measurements bear the claim out.
        when: under which condition it holds; empty where it holds without one.
        found: one or two sentences: what holds instead, or what to know beside it. No number that
            another device would not give.

    Raises:
        ValueError: something given cannot be kept, or `when` comes with a claim that does not hold.
    """
    if not isinstance(holds, bool):
        raise ValueError(f"holds has to be True or False, not {holds!r}")
    if when and not holds:
        raise ValueError(
            f"the claim does not hold, and yet it is said to hold when {when!r}: say it in `found`"
        )
    verdict = "does not hold" if not holds else f"holds when {when}" if when else "holds"
    made = Claim(notebook=notebook, number=number, says=says, verdict=verdict, found=found)
    _check_claim(made, f"claim {number!r}")
    _append({"environment": measured_environment(), "claim": made})
    return made


def _append(line: dict) -> None:
    if path := os.environ.get(VARIABLE):
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def _float(value: object) -> float | None:
    return None if value is None else float(value)


def _rounded(value: float) -> float:
    """Six digits: a clock says no more, and the files stay readable."""
    return float(f"{value:.6g}")


# Results files ------------------------------------------------------------------------------------


def environment(root: Path, device: object = None) -> dict[str, object]:
    """What a result depends on: the device and the libraries, the checkout's commit, today's date
    (UTC).
    """
    return {
        **measured_environment(device),
        "commit": commit(root),
        "date": datetime.now(UTC).date().isoformat(),
    }


def commit(root: Path) -> str | None:
    """The commit of the checkout in `root`, with `-dirty` where tracked files differ from it; None
    outside of one.
    """

    def git(*arguments: str) -> str:
        asked = ["git", "-C", str(root), *arguments]
        return subprocess.run(
            asked, capture_output=True, text=True, check=True, timeout=60
        ).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != Path(root).resolve():
            # memlab lies inside somebody else's repository, whose commit says nothing about it.
            return None
        dirty = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("-dirty" if dirty else "")
    except (OSError, subprocess.SubprocessError):
        return None


def file_name(environment: dict[str, object], scale: str | None = None) -> str:
    """The name of a device's results file: `cpu.json`, `nvidia-h200.json`; that of the scale
    "large" has a file of its own.
    """
    name = str(environment["gpu"] or environment["device"]) + (" large" if scale == "large" else "")
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") + ".json"


def environment_of(data: dict, one: dict) -> dict[str, object]:
    """The environment in which one record of a results file was measured."""
    return {**data["environment"], **one.get("environment", {})}


def merge(data: dict | None, environment: dict, notebook: str, lines: Iterable[dict]) -> dict:
    """A results file in which a notebook's fresh records stand in the place of its old ones.

    Args:
        data: the results file so far, None for a new one.
        environment: the environment of the fresh records; it becomes the file's.
        notebook: the notebook that was run.
        lines: what it appended to the file of MEMLAB_RECORDS (`read_lines`).
    """
    lines = list(lines)
    merged = {"schema": SCHEMA, "environment": environment}
    for many, single, order in (
        (
            "records",
            "record",
            lambda one: one["notebook"],
        ),  # a stable sort: a notebook's records stay in their order
        ("claims", "claim", lambda one: one["number"]),
    ):
        found = []
        for one in (data or {}).get(many, []):
            if one["notebook"] != notebook:
                found.append((environment_of(data, one), one))
        found += [
            ({**environment, **line["environment"]}, line[single])
            for line in lines
            if single in line
        ]
        merged[many] = []
        for its_environment, one in found:
            differing = {
                key: value
                for key, value in its_environment.items()
                if value != environment.get(key)
            }
            one = {key: value for key, value in one.items() if key != "environment"}
            merged[many].append(one | ({"environment": differing} if differing else {}))
        merged[many].sort(key=order)
    return merged


def read_lines(path: Path) -> list[dict]:
    """What `record` and `claim` appended to a file: objects with `environment` and `record` or
    `claim`.
    """
    if not Path(path).is_file():
        return []
    return [
        json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines() if line
    ]


def load(path: Path) -> dict:
    """Read a results file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a results file of this version; the message says what is wrong, and
            where.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
        validate(data)
    except ValueError as error:
        raise ValueError(f"{path} is not a results file: {error}") from error
    return data


def write(path: Path, data: dict) -> None:
    """Write a results file: checked, its keys in one order, and whole or not at all.

    Raises:
        ValueError: the data are not those of a results file.
    """
    validate(data)
    ordered = _ordered(data, ("schema", "environment", "records", "claims"))
    ordered["environment"] = _ordered(data["environment"], _ENVIRONMENT)
    ordered["records"] = []
    for one in data["records"]:
        one = _ordered(one, _RECORD)
        one["variants"] = [_ordered(variant, _VARIANT) for variant in one["variants"]]
        for variant in one["variants"]:
            variant["columns"] = _ordered(variant["columns"], COLUMNS)
            variant["seconds"] = variant["seconds"] and _ordered(variant["seconds"], _SECONDS)
        ordered["records"].append(one)
    if "claims" in data:
        ordered["claims"] = [_ordered(one, _CLAIM) for one in data["claims"]]
    for one in [*ordered["records"], *ordered.get("claims", [])]:
        if "environment" in one:
            one["environment"] = _ordered(one["environment"], _ENVIRONMENT)
    replace(path, json.dumps(ordered, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def replace(path: Path, content: str | bytes) -> None:
    """Write a file whole or not at all, so that an interrupted run leaves the old one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(content.encode() if isinstance(content, str) else content)
    os.replace(partial, path)


def _ordered(value: dict, keys: Iterable[str]) -> dict:
    return {key: value[key] for key in keys if key in value}


def load_all(root: Path) -> list[dict]:
    """Every results file of the checkout, the CPU's first."""
    files = sorted(
        (Path(root) / "results").glob("*.json"),
        key=lambda path: (path.name != "cpu.json", path.name),
    )
    return [load(path) for path in files]


# The form -----------------------------------------------------------------------------------------


class _Kind(NamedTuple):
    """What a field may hold, in words and as a test."""

    words: str
    holds: Callable[[object], bool]


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _or_null(kind: _Kind) -> _Kind:
    return _Kind(f"{kind.words}, or null", lambda value: value is None or kind.holds(value))


_TEXT = _Kind("a text", lambda value: isinstance(value, str) and bool(value.strip()))
_WHOLE = _Kind("a whole number of at least 0", _is_whole)
_COUNT = _Kind("a whole number of at least 1", lambda value: _is_whole(value) and value >= 1)
_NUMBER = _Kind("a finite number", _is_number)
_POSITIVE = _Kind("a finite number of at least 0", lambda value: _is_number(value) and value >= 0)
_OBJECT = _Kind("an object", lambda value: isinstance(value, dict))
_LIST = _Kind("a list", lambda value: isinstance(value, list))
_DATE = _Kind(
    "a date such as 2026-01-31",
    lambda value: isinstance(value, str) and bool(re.fullmatch(r"\d{4}-\d{2}-\d{2}", value)),
)
_SIZE = _Kind(
    "a text, a finite number, true or false", lambda v: isinstance(v, (str, bool)) or _is_number(v)
)

_ENVIRONMENT = {
    "device": _Kind('"cpu" or "cuda"', lambda value: value in ("cpu", "cuda")),
    "gpu": _or_null(_TEXT),
    "gpu_bytes": _or_null(_COUNT),
    "torch": _TEXT,
    "driver": _or_null(_TEXT),
    "python": _TEXT,
    "threads": _COUNT,
    "commit": _or_null(_TEXT),
    "date": _DATE,
}
_RECORD = {
    "notebook": _TEXT,
    "technique": _TEXT,
    "scale": _TEXT,
    "sizes": _OBJECT,
    "environment": _OBJECT,  # may be absent
    "variants": _Kind(
        "a list with at least one variant", lambda value: isinstance(value, list) and bool(value)
    ),
}
_VARIANT = {
    "name": _TEXT,
    "predicted_bytes": _or_null(_COUNT),
    "peak_bytes": _COUNT,
    "columns": _OBJECT,
    "phase": _Kind(f"one of {', '.join(PHASES)}", lambda value: value in PHASES),
    "reserved_bytes": _or_null(_COUNT),
    "device_bytes": _or_null(_COUNT),
    "seconds": _or_null(_OBJECT),
    "tokens_per_second": _or_null(_POSITIVE),
    "loss": _or_null(_NUMBER),
    "max_gradient_difference": _or_null(_POSITIVE),
}
_CLAIM = {
    "number": _COUNT,
    "notebook": _TEXT,
    "says": _TEXT,
    "verdict": _Kind(
        '"holds", "holds when ..." or "does not hold"',
        lambda value: (
            isinstance(value, str)
            and bool(re.fullmatch(r"holds|holds when \S.*|does not hold", value))
        ),
    ),
    "found": _TEXT,
    "environment": _OBJECT,  # may be absent
}
_SECONDS = {"median": _POSITIVE, "spread": _POSITIVE, "repeats": _COUNT}


def validate(data: object) -> None:
    """Check that `data` has the form of a results file.

    Raises:
        ValueError: it has not; the message names the field, what it has to be and what it is.
    """
    if not isinstance(data, dict):
        raise ValueError(f"a results file is a JSON object, not {type(data).__name__}")
    if data.get("schema") != SCHEMA:
        raise ValueError(
            f"its schema is version {data.get('schema')!r}; this memlab reads version {SCHEMA}"
        )
    fields = {"schema": _COUNT, "environment": _OBJECT, "records": _LIST, "claims": _LIST}
    _check(data, fields, "the file", optional=("claims",))
    _check(data["environment"], _ENVIRONMENT, "environment")
    for number, one in enumerate(data.get("claims", [])):
        _check_claim(one, f"claims[{number}]")
    for number, one in enumerate(data["records"]):
        _check_record(one, f"records[{number}]")


def _check_claim(one: object, where: str) -> None:
    _check(one, _CLAIM, where, optional=("environment",))
    _check_own_environment(one, where)


def _check_own_environment(one: dict, where: str) -> None:
    own = one.get("environment", {})
    _check(
        own, {key: kind for key, kind in _ENVIRONMENT.items() if key in own}, f"{where}.environment"
    )


def _check_record(one: object, where: str) -> None:
    _check(one, _RECORD, where, optional=("environment",))
    _check_own_environment(one, where)
    _check(one["sizes"], dict.fromkeys(one["sizes"], _SIZE), f"{where}.sizes")
    names = []
    for number, variant in enumerate(one["variants"]):
        place = f"{where}.variants[{number}]"
        _check(variant, _VARIANT, place)
        _check(variant["columns"], dict.fromkeys(COLUMNS, _WHOLE), f"{place}.columns")
        if variant["seconds"] is not None:
            _check(variant["seconds"], _SECONDS, f"{place}.seconds")
        total = sum(variant["columns"].values())
        if total != variant["peak_bytes"]:
            raise ValueError(
                f"{place}: the columns sum to {total}, but peak_bytes is {variant['peak_bytes']}"
            )
        names.append(variant["name"])
    if len(set(names)) != len(names):
        raise ValueError(f"{where}: two variants have one name: {_listed(names)}")


def _check(
    value: object, fields: dict[str, _Kind], where: str, optional: Sequence[str] = ()
) -> None:
    if not isinstance(value, dict):
        raise ValueError(f"{where} has to be an object, not {value!r:.60}")
    if missing := [name for name in fields if name not in value and name not in optional]:
        raise ValueError(f"{where} has no {_listed(missing)}")
    if unknown := [name for name in value if name not in fields]:
        raise ValueError(f"{where} has fields that the schema does not know: {_listed(unknown)}")
    for name, held in value.items():
        if not fields[name].holds(held):
            raise ValueError(f"{where}.{name} has to be {fields[name].words}, not {held!r:.60}")


def _listed(names: Iterable[object]) -> str:
    return ", ".join(repr(name) for name in names)
