"""`make validate`: predicts every record of the H100 again, and writes `results/predictions.json`.

    python -m memlab.course.validate [notebook ...]

The runs are the notebooks' own (`rerun`). Each notebook has a process of its own, and what it
predicted is kept in `build/validate/`, so that an interrupted validation goes on where it ended. A
change of the package or of the notebook makes what is kept void.

Allocated bytes are compared as the records have them: without cuBLAS's workspaces, which the meter
of a GPU sets aside. Reserved bytes are those of a whole process. `measure` returns what is cached
to the driver before it begins, so they are comparable as long as nothing in the notebook lives on
the device meanwhile.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Collection
from datetime import UTC, datetime
from pathlib import Path

import torch

from memlab import results
from memlab.course import rerun
from memlab.course.kept_calls import Kept
from memlab.course.misses import NEEDS_OTHER_TEXT, REASONS, SMALL
from memlab.course.notebook import find_root, in_depth, select
from memlab.results import Bytes, Left, Predictions, Record, Row

GPU = "H100 80GB"
FILES = ("nvidia-h100-80gb-hbm3.json", "nvidia-h100-80gb-hbm3-large.json")

#: A variant's place: the record's number in its file, and the variant's name.
Key = tuple[int, str]


def main(arguments: list[str]) -> int:
    """Predict what is asked for (by default everything), then write the file."""
    root = find_root()
    if arguments[:1] == ["--one"]:
        file, stem = arguments[1:]
        found = predict_notebook(root, file, stem)
        text = json.dumps([[*key, each] for key, each in found.items()], indent=1)
        results.replace(_found_file(root, file, stem), text)
        return 0
    began = time.perf_counter()
    chosen = {path.stem for path in select(arguments, root)}
    rows, left = [], []
    before = results.load_predictions(root)
    for file, stem in _of_the_files(root):
        if stem in chosen:
            print(f"==> {stem} ({file})", flush=True)
            command = [sys.executable, "-m", "memlab.course.validate", "--one", file, stem]
            subprocess.run(command, check=True)
            found = json.loads(_found_file(root, file, stem).read_text(encoding="utf-8"))
            places = beside_the_records(root, file, stem, {(r, v): each for r, v, each in found})
        else:
            places = [*before.rows, *before.not_predicted] if before else []
            places = [each for each in places if (each.file, each.notebook) == (file, stem)]
        rows += [each for each in places if isinstance(each, Row)]
        left += [each for each in places if isinstance(each, Left)]
    results.write_predictions(root, summed_up(rows, left))
    minutes = (time.perf_counter() - began) / 60
    print(
        f"{len(rows)} variants predicted, {len(left)} not, in {minutes:.1f} minutes:"
        f" results/{results.PREDICTIONS}"
    )
    return 0


def _found_file(root: Path, file: str, stem: str) -> Path:
    return root / "build" / "validate" / f"{stem}-{Path(file).stem}-variants.json"


def _of_the_files(root: Path) -> list[tuple[str, str]]:
    """Each results file with each notebook that has records in it."""
    return [
        (file, stem)
        for file in FILES
        for stem in dict.fromkeys(r.notebook for r in results.load(root / "results" / file).records)
    ]


def predict_notebook(
    root: Path, file: str, stem: str, only: Collection[Key] | None = None
) -> dict[Key, dict]:
    """Predict the variants that a results file has of a notebook.

    Args:
        root: the checkout.
        file: the results file's name.
        stem: the notebook's name.
        only: which variants; by default all. Then nothing is read from or written to `build`.

    Returns:
        For each variant its bytes, `allocated`, `reserved`, and `beside`, the names that live on
        the device meanwhile; or an `error`.
    """
    records = dict(enumerate(results.load(root / "results" / file).records))
    records = {number: each for number, each in records.items() if each.notebook == stem}
    path = next(path for path in in_depth(root) if path.stem == stem)
    first = next(iter(records.values()))
    kept = Kept(root, path, file, only is None)

    planned = rerun.run_again(path, first.scale, GPU, lambda call: None, first)
    for line in planned.stopped:
        print(f"    not run: {line}", flush=True)
    calls: dict[Key, rerun.Call | str] = {}
    for number, record in records.items():
        found = _of_record(record, planned.records)
        for variant in record.variants:
            key = number, variant.name
            if only is None or key in only:
                calls[key] = found if isinstance(found, str) else found[variant.name]
    wanted = {each.number: each for each in calls.values() if not isinstance(each, str)}

    def on_call(call: rerun.Call) -> None:
        if call.number in wanted and call.number not in kept.found:
            call.prediction = wanted[call.number].prediction
            kept.add(call)

    if wanted.keys() - kept.found.keys():
        rerun.run_again(path, first.scale, GPU, on_call, first)
    return {
        key: {"error": each} if isinstance(each, str) else kept.found[each.number]
        for key, each in calls.items()
    }


def _of_record(record: Record, made: list[tuple[str, dict, dict]]) -> dict | str:
    """The calls of `measure` behind a record's variants; or why there are none.

    Two records may have the same names. They are in the order of the notebook, so a record that was
    found is taken out of `made`.
    """
    names = {variant.name for variant in record.variants}
    for position, (technique, sizes, calls) in enumerate(made):
        if technique != record.technique or not names <= calls.keys():
            continue
        other = {
            name: (value, sizes.get(name))
            for name, value in record.sizes.items()
            # What a proof would count is 0 here.
            if sizes.get(name) != value and sizes.get(name) != 0
        }
        if other and record.notebook not in NEEDS_OTHER_TEXT:
            continue
        del made[position]
        return calls
    return "the notebook does not make this record any more"


def beside_the_records(
    root: Path, file: str, stem: str, found: dict[Key, dict]
) -> list[Row | Left]:
    """What was predicted of a notebook, beside what was measured.

    Args:
        root: the checkout.
        file: the results file's name.
        stem: the notebook's name.
        found: what `predict_notebook` returned.

    Returns:
        A row for each variant; a `Left` where there is no prediction.
    """
    records = results.load(root / "results" / file).records
    places: list[Row | Left] = []
    for (number, name), each in found.items():
        place = {"file": file, "record": number, "notebook": stem, "variant": name}
        variant = next(v for v in records[number].variants if v.name == name)
        if reason := NEEDS_OTHER_TEXT.get(stem, {}).get(name) or each.get("error"):
            places.append(Left(**place, reason=reason))
            continue
        beside = [left for left in each["beside"] if left not in SMALL.get(stem, ())]
        reserved = Bytes(predicted=each["reserved"], measured=variant.reserved_bytes)
        places.append(
            Row(
                **place,
                allocated=Bytes(predicted=each["allocated"], measured=variant.peak_bytes),
                reserved=None if beside else reserved,
                why_not=f"on the device already: {', '.join(beside)}" if beside else "",
                reason=REASONS.get((stem, number, name), ""),
            )
        )
    return places


def summed_up(rows: list[Row], left: list[Left]) -> Predictions:
    """All of it, as `results/predictions.json` has it."""
    return Predictions(
        gpu=GPU,
        torch=torch.__version__,
        date=datetime.now(UTC).date().isoformat(),
        allocated=results.summary_of(row.allocated for row in rows),
        reserved=results.summary_of(row.reserved for row in rows),
        rows=rows,
        not_predicted=left,
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
