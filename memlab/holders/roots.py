"""Where a search for holders ends: what has a name. The variables of running functions, of modules,
and the outputs of a notebook.
"""

from __future__ import annotations

import dis
import gc
import inspect
import re
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from memlab.meters.user_code import is_memlab, is_user_code, place_of

#: Values of modules that have a name by themselves, or hold nothing: most of them are.
_UNINTERESTING = {
    *(types.ModuleType, types.BuiltinFunctionType, types.BuiltinMethodType),
    *(types.WrapperDescriptorType, types.MethodDescriptorType, types.MethodType, type),
    *(str, int, float, bool, bytes, type(None)),
}


class Root(NamedTuple):
    """A name for an object.

    Attributes:
        name: `losses`, or `Out[3]`.
        where: "in train() at train.py:30", "in module cache".
        kind: "variable" or "notebook output".
        weight: 0 for the user's own code, 1 for that of a library.
        frees: the line that takes this name away.
    """

    name: str
    where: str
    kind: str = "variable"
    weight: int = 0
    frees: str | None = None


@dataclass
class Roots:
    """All names, by the `id` of what they name. Nothing of it keeps an object alive.

    Attributes:
        names: `id` of an object -> its names, the user's own first.
        spaces: the `id` of each dictionary that was read for that: a module's, a notebook's.
        libraries: the `id` of the dictionary of each other module -> the module's name. They have
            hundreds of thousands of names, so theirs are read only where they are met.
    """

    names: dict[int, list[Root]] = field(default_factory=dict)
    spaces: set[int] = field(default_factory=set)
    libraries: dict[int, str] = field(default_factory=dict)

    def add(self, value: object, root: Root) -> None:
        """Note a name."""
        known = self.names.setdefault(id(value), [])
        if root not in known:
            known.append(root)

    def add_library(self, values: dict, thing: object) -> None:
        """Note the name that a library's module gives to an object."""
        for name, value in list(values.items()):
            if value is thing:
                self.add(thing, variable(name, f"in module {self.libraries[id(values)]}", 1))

    def of(self, thing: object) -> list[Root]:
        """The names of an object."""
        return self.names.get(id(thing), [])


def variable(name: str, where: str, weight: int) -> Root:
    """A variable, and the line that takes it away: nobody deletes a library's, or `self`."""
    frees = f"del {name}" if weight == 0 and name != "self" else None
    return Root(name, where, weight=weight, frees=frees)


def _can_hold(value: object) -> bool:
    """Whether a variable's value may hold a tensor, and has no name without it."""
    kind = type(value)
    if kind is types.FunctionType:
        return value.__closure__ is not None
    # What the garbage collector does not follow (numbers, texts) holds nothing.
    return kind not in _UNINTERESTING and gc.is_tracked(value)


def find_roots() -> Roots:
    """Look for everything that has a name now."""
    roots = Roots()
    _name_outputs(roots)
    _name_locals(roots)
    _name_globals(roots)
    for known in roots.names.values():
        if len(known) > 1:
            known.sort(key=lambda root: (root.weight, root.name == "self"))
    return roots


# Running functions --------------------------------------------------------------------------------


def running_frames() -> Iterator[types.FrameType]:
    """The frames of all threads that run now, the outermost first; those of memlab left out.

    Python's garbage collector does not know them: it sees a frame only once it has stopped.
    """
    for frame in sys._current_frames().values():
        stack = []
        while frame is not None:
            # A list that holds the frame it belongs to is a cycle, and would keep all alive.
            if not is_memlab(frame.f_code.co_filename):
                stack.append(frame)
            frame = frame.f_back
        yield from reversed(stack)


def variables(frame: types.FrameType) -> dict[str, object]:
    """The local variables of a frame, by name. What a function only borrows from the one around it
    is left out.
    """
    values = frame.f_locals
    found = dict(values)
    if frame.f_code.co_flags & inspect.CO_OPTIMIZED:
        found = {k: v for k, v in found.items() if k not in frame.f_code.co_freevars}
        # Until Python 3.12 this is a copy that the frame keeps: what is in it would stay alive.
        # Somebody else has it too (three references are the frame's and ours) if the function
        # called `locals()` and kept that.
        if type(values) is dict and sys.getrefcount(values) <= 3:
            values.clear()
    return found


def place_in(code: types.CodeType, name: str) -> str:
    """Where a variable of some code is first set, for people: "in train() at train.py:30"."""
    line = code.co_firstlineno
    for instruction in dis.get_instructions(code):
        stored = instruction.argval if instruction.opname.startswith(_STORES) else None
        # Python 3.13 stores two variables with one instruction.
        if stored == name or (isinstance(stored, tuple) and name in stored):
            line = instruction.positions.lineno or line
            break
    place = place_of(code.co_filename, line)
    function = name_of_function(code)
    return f"at {place}" if function == "<module>" else f"in {function}() at {place}"


_STORES = ("STORE_FAST", "STORE_DEREF", "STORE_NAME", "STORE_GLOBAL")


def name_of_function(code: types.CodeType) -> str:
    """`train`, or `Trainer.fit`."""
    return code.co_qualname.rpartition("<locals>.")[2]


def _name_locals(roots: Roots) -> None:
    for frame in running_frames():
        code = frame.f_code
        weight = 0 if is_user_code(code.co_filename) else 1
        if not code.co_flags & inspect.CO_OPTIMIZED:
            if id(frame.f_locals) in roots.spaces:  # a notebook's: all cells write there
                continue
            roots.spaces.add(id(frame.f_locals))
        for name, value in variables(frame).items():
            if _can_hold(value):
                roots.add(value, variable(name, place_in(code, name), weight))
        if id(frame.f_globals) not in roots.spaces and "__file__" not in frame.f_globals:
            # Code that was run by `exec` has a dictionary of its own in a module's place.
            file = place_of(code.co_filename, 1).rpartition(":")[0]
            _name_dictionary(roots, frame.f_globals, f"in {file}", weight)


# Modules ------------------------------------------------------------------------------------------


def _name_globals(roots: Roots) -> None:
    for name, module in list(sys.modules.items()):
        if not issubclass(type(module), types.ModuleType) or name.partition(".")[0] == "memlab":
            continue
        # Asked in the plainest way: some modules import whole packages when asked for anything.
        values = object.__getattribute__(module, "__dict__")
        # A module that runs now was named with its lines, and some have two names.
        if id(values) not in roots.spaces and id(values) not in roots.libraries:
            file = values.get("__file__")
            if name == "__main__" if file is None else is_user_code(str(file)):
                _name_dictionary(roots, values, f"in module {name}", 0)
            else:
                roots.libraries[id(values)] = name


def _name_dictionary(roots: Roots, values: dict, place: str, weight: int) -> None:
    roots.spaces.add(id(values))
    for name, value in [pair for pair in values.items() if _can_hold(pair[1])]:
        if not (place == "in the notebook" and _OUTPUT.fullmatch(str(name))):
            roots.add(value, variable(str(name), place, weight))


# Notebooks ----------------------------------------------------------------------------------------

#: IPython's names for what cells returned: `_`, `__`, `___`, `_12`, and the dictionary of them all.
_OUTPUT = re.compile(r"_{1,3}|_\d+|_oh|Out")


def notebook() -> object | None:
    """IPython's shell, if this is one (or a notebook)."""
    ipython = sys.modules.get("IPython")
    return ipython.get_ipython() if ipython is not None else None


def _name_outputs(roots: Roots) -> None:
    """Give what a cell returned one name, with everything in which IPython keeps it: one line
    removes them all.
    """
    shell = notebook()
    if shell is None:
        return
    outputs = shell.user_ns.get("_oh", {})
    places = (
        ({f"Out[{number}]": value for number, value in outputs.items()}, ""),
        (shell.user_ns, ""),
        (shell.user_ns_hidden, "user_ns_hidden"),
        (vars(shell.displayhook), "displayhook"),
    )
    kept: dict[int, tuple[object, list[str]]] = {}
    for values, place in places:
        for name, value in values.items():
            if name.startswith("Out[") or (_OUTPUT.fullmatch(name) and value is not outputs):
                words = f"{place}[{name!r}]" if place == "user_ns_hidden" else name
                words = f"displayhook.{name}" if place == "displayhook" else words
                kept.setdefault(id(value), (value, []))[1].append(words)
    for value, names in kept.values():
        visible = [name for name in names if name in shell.user_ns]
        hidden = [name for name in names if name.startswith(("user_ns_hidden", "displayhook"))]
        outputs_of = [name for name in names if name.startswith("Out[")]
        # The name with a number stays the same when the next cell has run.
        frees = f"%xdel {max(visible, key=lambda name: name[1:].isdigit())}" if visible else None
        text = "`, `".join([*outputs_of, *visible, *hidden[:1]])
        roots.add(value, Root(text, "of the notebook", "notebook output", 0, frees))
    _name_dictionary(roots, shell.user_ns, "in the notebook", 0)
    keepers = (shell.displayhook, shell.last_execution_result)
    dictionaries = [vars(keeper) for keeper in keepers if keeper is not None]
    roots.spaces.update(map(id, (shell.user_ns_hidden, outputs, *keepers, *dictionaries)))
