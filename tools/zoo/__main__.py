"""Predict and measure every row of the zoo: `python -m tools.zoo`, or `make zoo`.

It writes results/zoo.json; `python -m memlab report` makes the table of it. Rows that are done
stand in build/zoo.jsonl meanwhile, and an interrupted run goes on from there. With words, only the
rows whose name holds one of them are run and shown, and nothing is written.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from tqdm.auto import tqdm

from memlab.course.zoo import is_miss
from memlab.forms import replace
from memlab.results.zoo import ZOO, Zoo, ZooRow
from tools.zoo.compare import compare_number, prepare
from tools.zoo.reasons import with_reason
from tools.zoo.rows import rows, rows_with, versions

ROOT = Path(__file__).resolve().parents[2]
DONE = ROOT / "build" / "zoo.jsonl"


def main(words: Sequence[str]) -> int:
    found = rows_with(words)
    if not found:
        print(f"no row of the zoo holds {' or '.join(words)}", file=sys.stderr)
        return 2
    done = {} if words else _done_before()
    missing = [number for number, row in enumerate(found) if row.name not in done]
    with multiprocessing.get_context("spawn").Pool(2, prepare, (list(words),)) as pool:
        results = pool.imap_unordered(compare_number, missing)
        for result in tqdm(results, "zoo", len(missing), unit=" rows"):
            done[result.name] = result
            if words or is_miss(result):
                tqdm.write(result.sentence)
            if not words:
                _keep(result)
    if not words:
        write(done)
    return 0


def write(done: dict[str, ZooRow]) -> None:
    """Write the file of results/, and forget the rows beside it."""
    ordered = [with_reason(done[row.name]) for row in rows()]
    zoo = Zoo(**versions(), models=len({row.model for row in ordered}), rows=ordered)
    replace(ROOT / "results" / ZOO, zoo.model_dump_json(indent=1, exclude_defaults=True) + "\n")
    DONE.unlink(missing_ok=True)
    print(f"written: results/{ZOO}. Now: python -m memlab report")


def _done_before() -> dict[str, ZooRow]:
    lines = DONE.read_text(encoding="utf-8").splitlines() if DONE.is_file() else []
    return {row.name: row for row in map(ZooRow.model_validate_json, lines)}


def _keep(row: ZooRow) -> None:
    DONE.parent.mkdir(exist_ok=True)
    with DONE.open("a", encoding="utf-8") as file:
        file.write(row.model_dump_json() + "\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
