"""Predict the rows of memlab/will_it_fit/predictions.json anew: python tools/will_it_fit.py [path]

It takes a quarter of an hour on two quiet cores. The rows of another run of this very day stay, so
an interrupted run is taken up again; `--all` predicts all.
"""

import gc
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

from memlab.units import format_bytes
from memlab.will_it_fit.rows import FILE, kept_options, load, predict_row, table_of, write


def main(arguments: list[str]) -> int:
    today = datetime.now(UTC).date().isoformat()
    paths = [Path(argument) for argument in arguments if not argument.startswith("-")]
    path = paths[0] if paths else FILE
    rows = []
    if path.is_file() and "--all" not in arguments and load(path).date == today:
        rows = load(path).rows
    wanted = kept_options()
    for options in wanted:
        if any(row.options == options for row in rows):
            continue
        start = time.perf_counter()
        row = predict_row(options)
        gc.collect()
        rows = [*rows, row]
        in_order = sorted(rows, key=lambda row: wanted.index(row.options))
        write(table_of(in_order, today), path)
        seconds = time.perf_counter() - start
        print(f"{row.name}: {format_bytes(row.reserved_bytes)}, {seconds:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
