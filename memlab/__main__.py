"""The commands of `python -m memlab`: predict, solve, plan, run, diff, measure, check, report,
doctor.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import memlab
from memlab import commands, receipt, results, script
from memlab.course import doctor, documents, homework, notebook, run, tables
from memlab.results.lessons import LESSONS
from memlab.watch import EVERY
from memlab.workloads.scale import scale


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command. Returns the exit status: 0 all is well, 1 something failed, 2 it was called
    wrongly, 3 what was predicted does not fit.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    asked, of_script = _read(arguments)
    try:
        if asked.command == "run":
            return script.run_script(
                asked.script,
                of_script,
                as_module=asked.module,
                size=asked.budget,
                report=asked.report,
                save=asked.save,
                lines=asked.lines,
                every=asked.every,
            )
        if asked.command in commands.COMMANDS:
            return commands.run_command(asked)
        if asked.command == "measure":
            return run_measure(
                asked.notebooks, asked.in_place, asked.output, asked.cells, asked.timeout
            )
        if asked.command == "check":
            return run_check(asked.notebook, asked.timeout)
        if asked.command == "diff":
            return run_diff(asked.old, asked.new, asked.at_most)
        if asked.command == "report":
            return run_report(asked.check)
        return doctor.run(memlab.__version__)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        print(f"python -m memlab {asked.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _read(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The command with its options, and what comes after `--`: the arguments of the script."""
    parser = _parser()
    if arguments[:1] in (["predict"], ["solve"], ["plan"]):
        asked, unknown = parser.parse_known_args(arguments)
        if unknown:
            parser.error(
                f"memlab {asked.command} does not know {' '.join(unknown)!r}. An option of the"
                " run's own is written --option NAME=VALUE, such as --option batch=8"
            )
        return asked, []
    if arguments[:1] != ["run"]:
        return parser.parse_args(arguments), []
    end = arguments.index("--") if "--" in arguments else len(arguments)
    asked, unknown = parser.parse_known_args(arguments[:end])
    if unknown:
        parser.error(
            f"memlab run does not know {unknown[0]!r}. What the script is to be given comes after"
            f" --: python -m memlab run {asked.script} -- {' '.join(unknown)}"
        )
    return asked, arguments[end + 1 :]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m memlab", description=__doc__, epilog=memlab.__doc__.split("\n")[0]
    )
    known = parser.add_subparsers(dest="command", required=True, metavar="command")

    commands.add_commands(known)
    _add_commands_of_receipts(known)

    measure = known.add_parser(
        "measure", help="run the notebooks on this machine's device and print what they measured"
    )
    measure.add_argument(
        "notebooks", nargs="*", help="which: 03, gradient_checkpointing or a path (all by default)"
    )
    measure.add_argument(
        "--in-place",
        action="store_true",
        help="write the outputs into the notebooks and the records into results/",
    )
    measure.add_argument(
        "--output", type=Path, metavar="DIR", help="where copies and records go (default: build)"
    )
    measure.add_argument(
        "--cells",
        metavar="TAG",
        help="run only the cells with this tag; the notebooks stay as they are",
    )
    measure.add_argument(
        "--timeout",
        type=int,
        default=600,
        metavar="S",
        help="seconds a cell may take (default: 600)",
    )

    check = known.add_parser(
        "check", help="run a learner's notebook, and say of each exercise whether it passes"
    )
    check.add_argument("notebook", type=Path, help="the notebook with the answers")
    check.add_argument(
        "--timeout", type=int, default=600, metavar="S", help="seconds a cell may take"
    )

    report = known.add_parser(
        "report",
        help="write the generated tables into README.md, results/README.md and the notebooks",
    )
    report.add_argument(
        "--check",
        action="store_true",
        help="write nothing; say what differs, and fail if anything does",
    )

    known.add_parser(
        "doctor", help="show the device, its scale, and whether the meter measures right here"
    )
    return parser


def _add_commands_of_receipts(known) -> None:
    run_parser = known.add_parser(
        "run",
        help="run a script, watch all of it, and print its receipt",
        usage="python -m memlab run [options] train.py -- --its --own arguments",
    )
    run_parser.add_argument("script", help="a file or, with -m, a module")
    run_parser.add_argument(
        "-m", dest="module", action="store_true", help="run a module or package, as python -m does"
    )
    run_parser.add_argument(
        "--budget", metavar="SIZE", help='allow at most "8 GiB", and say what would help'
    )
    run_parser.add_argument(
        "--lines", action="store_true", help="say which lines made most of the peak (slower)"
    )
    run_parser.add_argument(
        "--every",
        type=int,
        default=EVERY,
        metavar="N",
        help=f"record two of so many steps in full (default: {EVERY}; 1: all, slower)",
    )
    run_parser.add_argument(
        "--report", type=Path, metavar="FILE", help="write the receipt as one HTML page"
    )
    run_parser.add_argument(
        "--save", type=Path, metavar="FILE", help="keep the receipt, for python -m memlab diff"
    )

    diff = known.add_parser(
        "diff", help="compare two receipts; exit status 1 if the later run needs more"
    )
    diff.add_argument("old", type=Path, help="a receipt that `measurement.save(path)` wrote")
    diff.add_argument("new", type=Path, help="that of a later run")
    diff.add_argument(
        "--at-most",
        default="0",
        metavar="SIZE",
        help='by how much it may grow: "1%%", "64 KiB" or bytes (default: 0)',
    )


def run_diff(old: Path, new: Path, at_most: str) -> int:
    """Compare two receipts. 1 if the later run needs more than is allowed, else 0."""
    difference = receipt.diff(receipt.load(old), receipt.load(new), at_most)
    print(difference)
    return int(difference.grew)


def run_measure(
    names: Sequence[str],
    in_place: bool = False,
    output: Path | None = None,
    cells: str | None = None,
    timeout: int = 600,
) -> int:
    """Run notebooks and print this machine's numbers beside the committed ones. 1 if a notebook
    failed, else 0.
    """
    root = notebook.find_root()
    chosen = notebook.select(names, root)
    if not chosen:
        print(f"there are no notebooks in {root / 'notebooks'}", file=sys.stderr)
        return 1
    sizes = scale()
    print(sizes, flush=True)
    of_lessons = all(notebook.is_lesson(path, root) for path in chosen)
    folder = root / (LESSONS if of_lessons else "results")
    file = folder / results.file_name(results.environment(root, sizes.device), sizes.name)
    committed = results.load(file) if file.is_file() else None  # now: a run in place replaces it
    outcomes = run.run(
        chosen, in_place=in_place, output=output, timeout=timeout, root=root, cells=cells
    )
    kept = [each for outcome in outcomes for each in outcome.records]
    records = [each for each in kept if isinstance(each, results.Record)]
    print(f"\n{tables.run_table(records, committed)}\n\n{run.summary(outcomes)}")
    return int(any(outcome.failed for outcome in outcomes))


def run_check(path: Path, timeout: int = 600) -> int:
    """Say of each exercise of a notebook whether it passes. 0 if all do, else 1."""
    answers = homework.check(path, timeout)
    print("\n".join(map(str, answers)))
    return int(not all(answer.passed for answer in answers))


def run_report(check: bool = False) -> int:
    """Write the generated tables, or with `check` say what differs. 1 if anything
    differs, else 0.
    """
    changed = documents.generate(notebook.find_root(), check=check)
    if check and changed:
        print("\n".join(changed))
        print("\nThese differ from the records. Run: python -m memlab report")
        return 1
    print("\n".join(f"written: {name}" for name in changed) or "everything is as the records say")
    return 0


if __name__ == "__main__":
    sys.exit(main())
