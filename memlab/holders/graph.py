"""What autograd's graphs hold, and which tensors hold the graphs.

Only memory of tensors that autograd saved in a documented place is found: what a node keeps of its
inputs and results (`SavedTensor`), what a hook for saved tensors packed, and a leaf that gets a
gradient. A node that was written in C++ may keep more.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch.autograd.graph import Node

from memlab.meters.live import storages, tensors_in

#: More nodes than these are not looked at.
MOST_NODES = 100_000
#: How many tensors are remembered for each node as those that hold it.
MOST_OWNERS = 3


class Graphs:
    """All graphs that can be reached from some tensors and nodes.

    It holds nodes, which hold tensors: it is made for one search and thrown away.

    Args:
        tensors: those that may have a graph.
        nodes: nodes that Python holds by themselves.
    """

    def __init__(self, tensors: Iterable[torch.Tensor], nodes: Iterable[Node]):
        #: `id` of an object that a node holds (what a hook packed, a hook) -> that node.
        self.holder: dict[int, Node] = {}
        self._nodes: dict[int, Node] = {}
        self._next: dict[int, list[Node]] = {}
        self._owners: dict[int, list[object]] = {}
        starts = []
        for tensor in tensors:
            with contextlib.suppress(Exception):  # strangers, of any class
                if tensor.grad_fn is not None:
                    starts.append((tensor.grad_fn, tensor))
        starts += [(node, node) for node in nodes]
        self._follow([node for node, _ in starts])
        self._find_owners(starts)

    def _follow(self, nodes: list[Node]) -> None:
        while nodes and len(self._nodes) < MOST_NODES:
            node = nodes.pop()
            if id(node) not in self._nodes:
                self._nodes[id(node)] = node
                following = [n for n, _ in node.next_functions if n is not None]
                self._next[id(node)] = following
                nodes.extend(following)

    def _find_owners(self, starts: Sequence[tuple[Node, object]]) -> None:
        """Note for each node which tensors hold it: first those that are not part of another
        tensor's graph.
        """
        inner = {id(node) for following in self._next.values() for node in following}
        for start, owner in sorted(starts, key=lambda pair: id(pair[0]) in inner):
            nodes, seen = [start], set()
            while nodes:
                node = nodes.pop()
                owners = self._owners.setdefault(id(node), [])
                if id(node) in seen or len(owners) >= MOST_OWNERS:
                    continue
                seen.add(id(node))
                if owner is not node:
                    owners.append(owner)
                nodes.extend(self._next.get(id(node), ()))

    @property
    def lists(self) -> list[list]:
        """Its own lists."""
        return [*self._next.values(), *self._owners.values()]

    def owners(self, node: object) -> list[object]:
        """The tensors (and nodes) whose graph a node belongs to; none for anything else."""
        return self._owners.get(id(node), [])

    def savers(self, addresses: set[int], device: torch.device) -> dict[int, list[Node]]:
        """Which nodes saved what lies at some addresses of a device."""
        found: dict[int, list[Node]] = {}
        for node in list(self._nodes.values()):
            for value in self._saved(node):
                for tensor in tensors_in(value):
                    with contextlib.suppress(Exception):
                        if tensor.device != device:
                            continue
                        for storage in storages(tensor):
                            if storage.data_ptr() in addresses:
                                found.setdefault(storage.data_ptr(), []).append(node)
        return found

    def _saved(self, node: Node) -> Iterator[object]:
        """What a node saved, as it lies there: nothing is unpacked, no hook is called."""
        with contextlib.suppress(Exception):
            if (leaf := getattr(node, "variable", None)) is not None:
                yield leaf
        for name in _saved_names(type(node)):
            with contextlib.suppress(Exception):  # freed already
                saved = getattr(node, name)
                for part in saved if isinstance(saved, (tuple, list)) else (saved,):
                    packed, hook = part.data, getattr(part, "unpack_hook", None)
                    if hook is not None:
                        self.holder[id(packed)] = self.holder[id(hook)] = node
                    yield packed


@functools.cache
def _saved_names(kind: type) -> tuple[str, ...]:
    return tuple(name for name in dir(kind) if name.startswith("_raw_saved_"))
