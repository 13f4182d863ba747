"""`find_holders`: who keeps the memory of some tensors alive."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn
from torch.autograd.graph import Node

from memlab.holders.climb import Climb
from memlab.holders.frees import line_that_frees
from memlab.holders.graph import Graphs
from memlab.holders.roots import find_roots
from memlab.holders.way import Way, without_dictionaries
from memlab.holders.words import place_of_thing, words, words_of_tensor
from memlab.meters.device import resolve_device
from memlab.meters.live import live_objects, objects_brought_back, storages

#: Of more storages than these, the holders are not looked for.
MOST_STORAGES = 64


@dataclass(frozen=True)
class Holder:
    """Who keeps a tensor's memory alive.

    Attributes:
        path: "list `losses` (200 entries) in train() at train.py:30". The line is the one that sets
            the variable.
        kind: "variable", "list" (tuples, sets and queues too), "dict", "attribute" (parameters
            too), "gradient", "closure", "hook", "graph", "traceback", "notebook output" or "cycle".
        frees: the line that takes this holder away, where it is known for sure. The memory comes
            back when the last holder is gone.
    """

    path: str
    kind: str
    frees: str | None = None

    def __str__(self) -> str:
        return self.path if self.frees is None else f"{self.path} (frees it: {self.frees})"


class _Bytes:
    """Stands for a storage that no tensor of Python holds: a graph does."""


def find_holders(
    tensors: torch.Tensor | Iterable[torch.Tensor | int],
    *,
    device: str | torch.device | None = None,
    limit: int = 10,
) -> list[Holder]:
    """Find who keeps the memory of some tensors alive.

    What holds any tensor of the same storage counts: a view keeps all of it. Searched are the
    objects that Python's garbage collector knows, the variables of running functions in all
    threads, and autograd's graphs. Not seen is what only C++ holds, a NumPy array of the same
    memory, what a running function has not yet given a name, and what was set aside by `gc.freeze`,
    names of modules apart.

    It walks through all objects of the process, once for each step up from a tensor to a name.
    Measured for a variable: 0.2 s with 200,000 objects, 0.4 s with 490,000 (transformers imported).
    At most 64 storages are looked for.

    Args:
        tensors: tensors, or the addresses of their storages (`Block.address`).
        device: where the addresses are; by default CUDA if there is a device, else the CPU.
        limit: how many holders are returned at most.

    Returns:
        The holders, each once: the user's own code first, the shortest way first.

    Raises:
        ValueError: something given is neither a tensor nor an address.
    """
    wanted: dict[torch.device, dict[int, _Bytes]] = {}
    for thing in [tensors] if isinstance(tensors, torch.Tensor) else tensors:
        if isinstance(thing, torch.Tensor):
            for storage in storages(thing):
                wanted.setdefault(storage.device, {})[storage.data_ptr()] = _Bytes()
        elif isinstance(thing, int) and not isinstance(thing, bool):
            wanted.setdefault(resolve_device(device), {})[thing] = _Bytes()
        else:
            kind = type(thing).__name__
            raise ValueError(f"find_holders() takes tensors or addresses of storages, not a {kind}")
    found: dict[str, tuple[float, Holder]] = {}
    with warnings.catch_warnings(), objects_brought_back():
        warnings.simplefilter("ignore")  # asking some tensors for their gradient warns
        for place, addresses in wanted.items():
            addresses = dict(list(addresses.items())[:MOST_STORAGES])
            for cost, holder in _search(place, addresses):
                if holder.path not in found or cost < found[holder.path][0]:
                    found[holder.path] = cost, holder
    return [holder for _, holder in sorted(found.values(), key=lambda pair: pair[0])[:limit]]


def _search(device: torch.device, addresses: dict[int, _Bytes]) -> list[tuple[float, Holder]]:
    """Find the holders of what lies at some addresses, each with the length of its way."""
    things = live_objects(torch.Tensor, Node, nn.Module)
    tensors = [thing for thing in things if issubclass(type(thing), torch.Tensor)]
    nodes = [thing for thing in things if issubclass(type(thing), Node)]
    graphs = Graphs(tensors, nodes)
    climb = Climb(find_roots(), graphs)
    climb.note_modules(thing for thing in things if issubclass(type(thing), nn.Module))
    targets: dict[int, list[object]] = {address: [stand] for address, stand in addresses.items()}
    for tensor in tensors:
        _note_target(climb, targets, tensor, device)
    for address, nodes in graphs.savers(set(addresses), device).items():
        for node in nodes:
            climb.add(addresses[address])
            for owner in graphs.owners(node):
                if not any(owner is target for target in targets[address]):
                    climb.link(addresses[address], owner, by_graph=True)
    own = [things, tensors, nodes, targets, addresses, *targets.values()]
    climb.up(set(map(id, (own, *own))))
    found: list[tuple[float, Holder]] = []
    for things in targets.values():
        holders = [pair for thing in things for pair in _holders_of(climb, thing)]
        if not holders:
            holders = [(20.0, holder) for thing in things if (holder := _cycle(climb, thing))]
        found += holders
    return found


def _note_target(
    climb: Climb, targets: dict[int, list[object]], tensor: torch.Tensor, device: torch.device
) -> None:
    """Note a tensor, or its gradient, if it lies at one of the addresses."""
    # These are strangers: half-built, lazy, fake, of any class.
    with contextlib.suppress(Exception):
        if tensor.device != device:
            return
        gradient = tensor.grad if tensor.is_leaf else None
        for thing in (tensor, gradient):
            for storage in storages(thing) if thing is not None else ():
                if (found := targets.get(storage.data_ptr())) is not None:
                    found.append(thing)
                    climb.add(thing)
                    if thing is gradient:
                        climb.link(gradient, tensor)


def _holders_of(climb: Climb, thing: object) -> list[tuple[float, Holder]]:
    found = []
    for things, root in climb.ways(thing):
        links = list(zip(map(id, things), map(id, things[1:]), strict=False))
        if len(links) > 1 and all(link in climb.by_graph for link in links[:2]):
            continue  # a node in the graph of a tensor, which is another way
        with contextlib.suppress(Exception):  # strangers again
            way = Way(without_dictionaries(things), root, frozenset(climb.by_graph))
            weight = 10.0 * root.weight if root is not None else 5.0
            holder = _holder(way)
            hidden = holder.kind in ("notebook output", "traceback")  # what is written comes first
            found.append((weight + len(way.things) + 0.5 * hidden, holder))
    return found


def _holder(way: Way) -> Holder:
    place = place_of_thing(way)
    if place.kind == "graph":
        path = f"the graph of {words(way.above()).removeprefix('variable ')}"
    elif place.kind in ("list", "dict"):
        path = words(way.above())
    else:
        path = words_of_tensor(place)
    above = [place_of_thing(way.above(steps)) for steps in range(1, len(way.things))]
    if place.kind != "graph" and any(place.kind == "hook" for place in above):
        place = place._replace(kind="hook")
    kind = {"suspended": "variable", "cache": "dict"}.get(place.kind, place.kind)
    return Holder(path, kind, line_that_frees(way, place))


def _cycle(climb: Climb, thing: object) -> Holder | None:
    """What Python's garbage collector has not found yet."""
    if not climb.parents.get(id(thing)) or not climb.is_garbage(thing):
        return None
    kind = type(climb.things[climb.parents[id(thing)][0]]).__name__
    return Holder(f"a cycle of references ({kind}); no name leads to it", "cycle", "gc.collect()")
