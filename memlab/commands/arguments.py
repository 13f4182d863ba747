"""What the commands are given on the command line."""

from __future__ import annotations

import ast
from collections.abc import Sequence

from memlab.run import RESERVED

#: The commands of this room.
COMMANDS = ("predict", "solve", "plan")

#: What a run's option cannot be called: the functions behind the commands have these themselves.
_OURS = (*RESERVED, "run", "field", "low", "high", "in_use", "every", "progress")
#: Those of plan have an option of the command.
_OF_PLAN = ("model", "batch", "sequence", "lora")

_STATUS = "exit status: 0 it fits, 3 it does not, 2 wrong input, 1 the script itself failed"


def add_commands(commands) -> None:
    """Add `predict`, `solve` and `plan` to a parser's commands."""
    predict = commands.add_parser(
        "predict",
        help="say what a training run would need on a GPU, without the GPU",
        epilog=_STATUS,
    )
    _add_run(predict)
    _add_gpu(predict, "which GPU (default: H100 80GB, and whether it would fit others)")

    solve = commands.add_parser(
        "solve",
        help="find the largest batch, or value of another option, that fits a GPU",
        epilog=_STATUS,
    )
    _add_run(solve)
    _add_gpu(solve, "which GPU (default: H100 80GB)")
    solve.add_argument(
        "--field", default="batch", metavar="NAME", help="the run's option (default: batch)"
    )
    solve.add_argument("--low", default="1", metavar="N", help="the lowest value (default: 1)")
    solve.add_argument(
        "--high", metavar="N", help="the highest value (default: doubled until it does not fit)"
    )

    plan = commands.add_parser(
        "plan",
        help="find the techniques with which a model's training fits a GPU",
        epilog=_STATUS,
    )
    plan.add_argument(
        "model",
        help='a config.json, a model\'s name ("Llama-3.1 8B"), or FILE.py:FUNCTION, a training loop'
        " with options named like the techniques",
    )
    plan.add_argument("--batch", default="1", metavar="N", help="rows in a step (default: 1)")
    plan.add_argument("--sequence", metavar="N", help="tokens in a row")
    plan.add_argument("--lora", metavar="RANK", help="train adapters of this rank alone")
    plan.add_argument(
        "--every", action="store_true", help="predict also what a formula excludes (slower)"
    )
    _add_options(plan)
    _add_gpu(plan, "which GPU (needed)")


def _add_run(parser) -> None:
    parser.add_argument(
        "run", metavar="FILE.py:FUNCTION", help="a training loop that yields each step's loss"
    )
    _add_options(parser)
    parser.add_argument(
        "--steps", default="2", metavar="N", help="how many steps are taken (default: 2)"
    )


def _add_options(parser) -> None:
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an option of the function, e.g. batch=8; more than once for several",
    )


def _add_gpu(parser, words: str) -> None:
    parser.add_argument("--gpu", metavar="NAME", help=f'{words}: "RTX 4090", "24 GiB"')
    parser.add_argument(
        "--in-use", default="", metavar="SIZE", help='what others hold on it: "1 GiB"'
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def whole_number(name: str, text: str) -> int:
    """Read a whole number.

    Raises:
        ValueError: it is none.
    """
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{name} has to be a whole number, not {text!r}") from None


def options_of(texts: Sequence[str], *, of_plan: bool = False) -> dict[str, object]:
    """Read `NAME=VALUE`, the value as Python would write it: a number, True, None, a list.

    What is none of these is a text.

    Raises:
        ValueError: there is no "=", the name is no name or one of memlab's own, or one was given
            twice.
    """
    options: dict[str, object] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        name = name.strip()
        if not equals or not name.isidentifier():
            raise ValueError(f"--option is NAME=VALUE, such as batch=8, not {text!r}")
        if name in _OURS or (of_plan and name in _OF_PLAN):
            raise ValueError(
                f"--option {name}: memlab has this name itself. Does the command have --{name}?"
                " Else give the run's option another name"
            )
        if name in options:
            raise ValueError(f"--option {name} was given twice: {options[name]!r} and {value!r}")
        try:
            options[name] = ast.literal_eval(value.strip())
        except (ValueError, SyntaxError):
            options[name] = value
    return options
