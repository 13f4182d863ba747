"""From an object up to what has a name: who refers to it, who refers to that, and so on."""

from __future__ import annotations

import contextlib
import functools
import gc
import types
from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import nn

from memlab.holders.graph import Graphs
from memlab.holders.roots import Root, Roots
from memlab.meters.user_code import is_memlab

#: How far up.
DEEPEST = 12
#: How many objects' referrers are looked for at once. Python compares every reference in the
#: process with each of them.
MOST_AT_ONCE = 64
#: How many objects are looked for on each step up.
MOST = 256

_FUNCTIONS = (types.FunctionType, types.GeneratorType, types.CoroutineType, type)


@dataclass
class Climb:
    """What was found on the way up.

    It holds objects: it is made for one search and thrown away.

    Attributes:
        roots: what has a name.
        graphs: autograd's.
        things: every object that was met, by its `id`.
        parents: `id` of an object -> the `id`s of those that refer to it.
        by_graph: (child, parent): this parent holds the child by a graph.
        complete: whether nothing was left out.
    """

    roots: Roots
    graphs: Graphs
    things: dict[int, object] = field(default_factory=dict)
    parents: dict[int, list[int]] = field(default_factory=dict)
    by_graph: set[tuple[int, int]] = field(default_factory=set)
    complete: bool = True
    _modules: dict[int, nn.Module] = field(default_factory=dict)  # what they hold -> the module
    _skip: set[int] = field(default_factory=set)

    def add(self, thing: object) -> None:
        """Note an object whose holders are looked for."""
        self.things[id(thing)] = thing
        self.parents.setdefault(id(thing), [])

    def link(self, child: object, parent: object, *, by_graph: bool = False) -> None:
        """Note that one object holds another."""
        self.things[id(parent)] = parent
        if id(parent) not in self.parents.setdefault(id(child), []):
            self.parents[id(child)].append(id(parent))
        if by_graph:
            self.by_graph.add((id(child), id(parent)))

    def up(self, skip: set[int]) -> None:
        """Climb until everything has a name, or nothing refers to it.

        Args:
            skip: the `id`s of the search's own objects.
        """
        own = (self, self.__dict__, self.things, self.parents, self.graphs, self.graphs.__dict__)
        self._skip = skip | self.roots.spaces | set(map(id, own))
        self._skip |= set(map(id, (*vars(self).values(), *vars(self.graphs).values())))
        self._skip |= set(map(id, self.graphs.lists))
        frontier = list(self.things.values())
        done: set[int] = set()
        for _ in range(DEEPEST):
            if not frontier:
                return
            self.complete &= len(frontier) <= MOST
            done.update(map(id, frontier))
            for first in range(0, min(len(frontier), MOST), MOST_AT_ONCE):
                self._look_for_referrers(frontier[first : first + MOST_AT_ONCE], {id(frontier)})
            above = {parent for child in done for parent in self.parents.get(child, ())}
            frontier = [self.things[i] for i in above - done if not self._has_end(self.things[i])]
        self.complete = False

    def _has_end(self, thing: object) -> bool:
        """Whether there is no need to look who refers to an object: the user's code has a name for
        it.
        """
        is_named = any(root.weight == 0 for root in self.roots.of(thing))
        return is_named or issubclass(type(thing), type)

    def _look_for_referrers(self, children: list[object], skip: set[int]) -> None:
        ids = set(map(id, children))
        skip = skip | self._skip | {id(children)}
        for child in children:
            for owner in self.graphs.owners(child):
                self.link(child, owner, by_graph=True)
            if (node := self.graphs.holder.get(id(child))) is not None:
                for owner in (node, *self.graphs.owners(node)):
                    if owner is not child:
                        self.link(child, owner, by_graph=True)
            if (module := self._modules.get(id(child))) is not None:
                self.link(child, module)
        # What a module holds is known, and so is the module above it.
        children = [
            child
            for child in children
            if id(child) not in self._modules and not _is_of_memlab(child)
        ]
        skip.add(id(children))
        found = gc.get_referrers(*children) if children else []
        for parent in found:
            if id(parent) in skip or _is_of_memlab(parent) or _runs(parent):
                continue
            for child in gc.get_referents(parent):
                if id(child) in ids:
                    if id(parent) in self.roots.libraries:
                        self.roots.add_library(parent, child)
                    else:
                        self.link(child, parent)

    def note_modules(self, modules: Iterable[nn.Module]) -> None:
        """Note which module each of the modules' dictionaries and each module belongs to: the way
        from a layer up to its model is long.
        """
        for module in modules:
            with contextlib.suppress(Exception):
                values = vars(module)
                self._modules[id(values)] = module
                for value in values.values():
                    if issubclass(type(value), dict):
                        self._modules[id(value)] = module
                for child in nn.Module.children(module):
                    self._modules.setdefault(id(child), module)

    # The shortest way -----------------------------------------------------------------------------

    def ways(self, thing: object) -> list[tuple[list[object], Root | None]]:
        """The ways from an object to a name: one by each of those that hold it, the shortest.

        Returns:
            (the objects from this one up, the name of the last). A way that ends at a function or
            a class has no name: it is one by itself.
        """
        costs, best = self._ends
        found: list[tuple[list[object], Root | None]] = []
        found += [([thing], root) for root in self.roots.of(thing)]
        for parent in self.parents.get(id(thing), ()):
            if parent not in costs:
                continue
            way, current = [thing], parent
            while current is not None:
                way.append(self.things[current])
                current = best[current]
            found.append((way, next(iter(self.roots.of(way[-1])), None)))
        return found

    @functools.cached_property
    def _ends(self) -> tuple[dict[int, float], dict[int, int | None]]:
        """How far each object is from a name, and its next one on the way."""
        costs: dict[int, float] = {}
        best: dict[int, int | None] = {}
        for i, thing in self.things.items():
            roots = self.roots.of(thing)
            if roots:
                costs[i], best[i] = 10.0 * roots[0].weight, None
            elif issubclass(type(thing), _FUNCTIONS):
                costs[i], best[i] = 5.0, None  # named by itself, if nothing says where it hangs
        changed = True
        while changed:
            changed = False
            for child, parents in self.parents.items():
                for parent in parents:
                    cost = costs.get(parent, float("inf")) + 1
                    if cost < costs.get(child, float("inf")):
                        costs[child], best[child], changed = cost, parent, True
        return costs, best

    def is_garbage(self, thing: object) -> bool:
        """Whether an object is held by a cycle of references and by nothing else that was found."""
        above, todo = set(), [id(thing)]
        while todo:
            current = todo.pop()
            if current in above:
                continue
            above.add(current)
            parents = self.parents.get(current, [])
            if not parents or self.roots.of(self.things[current]):
                return False
            todo.extend(parents)
        return self.complete


def _runs(thing: object) -> bool:
    """Whether an object is a generator that runs now: its frame is among the running ones."""
    return type(thing) is types.GeneratorType and thing.gi_running


def _is_of_memlab(thing: object) -> bool:
    """Whether an object is a generator, a frame, a function or an instance of memlab."""
    kind = type(thing)
    if kind in _WITH_CODE:
        code = getattr(thing, _WITH_CODE[kind])
        return code is not None and is_memlab(code.co_filename)
    return str(getattr(kind, "__module__", "")).startswith("memlab.holders")


_WITH_CODE = {
    types.FunctionType: "__code__",
    types.GeneratorType: "gi_code",
    types.FrameType: "f_code",
}
