"""A way from a tensor up to a name, in words that a reader can check."""

from __future__ import annotations

import collections
import contextlib
import functools
import sys
import types

import torch
from torch import nn

from memlab.holders.roots import name_of_function, place_in, variables
from memlab.holders.way import (
    LISTS,
    Place,
    Way,
    attribute_of,
    is_a,
    is_of_last_error,
    key_of,
    name_in,
    stopped_frame,
)
from memlab.meters.user_code import place_of


def words(way: Way) -> str:
    """An object and where it hangs: "list `losses` (200 entries) in train() at train.py:30"."""
    thing = way.things[0]
    if is_a(thing, type):
        return f"class {thing.__name__}"
    place = place_of_thing(way)
    if is_a(thing, torch.Tensor):
        return words_of_tensor(place)
    if is_a(thing, nn.Module) and place.noun == "module":
        return f"`{place.name}` {place.where}"
    if type(thing) is types.FunctionType:
        code = thing.__code__
        text = f"{name_of_function(code)}() at {place_of(code.co_filename, code.co_firstlineno)}"
        return f"{text}, {place.where}" if place.kind == "hook" else text
    name = f" `{place.name}`" if place.name else ""
    comma = "," if place.kind == "hook" and not place.name else ""
    return f"{_noun(thing)}{name}{_entries(thing)}{comma} {place.where}".strip()


def words_of_tensor(place: Place) -> str:
    """The same of a tensor: "variable `logits` in train() at train.py:12"."""
    if place.kind == "gradient":
        return place.where
    name = f"{place.noun} `{place.name}`".strip() if place.name else "a tensor"
    return f"{name} {place.where}"


def _noun(thing: object) -> str:
    kind = type(thing)
    if kind in (collections.OrderedDict, collections.defaultdict):
        return "dict"
    name = kind.__name__
    # The node of a Function that was written in Python.
    return name.removesuffix("Backward") if hasattr(kind, "next_functions") else name


def _entries(thing: object) -> str:
    if not is_a(thing, (dict, *LISTS)):
        return ""
    with contextlib.suppress(Exception):
        count = len(thing)
        return f" ({count:,} entr{'y' if count == 1 else 'ies'})"
    return ""


# Where it hangs -----------------------------------------------------------------------------------


def place_of_thing(way: Way) -> Place:
    """Where the first object of a way hangs."""
    thing, root = way.things[0], way.root
    if len(way.things) == 1:
        if root is None:
            return Place("closure", "")
        code = root.name if root.frees and root.kind == "variable" else None
        noun = "variable" if root.kind == "variable" else ""
        return Place(root.kind, root.where, noun, root.name, code)
    holder, above = way.things[1], way.above()
    kind = type(holder)
    if (id(thing), id(holder)) in way.by_graph:
        return Place("graph", f"in the graph of {words(above).removeprefix('variable ')}")
    if issubclass(kind, torch.Tensor):
        return _place_at_tensor(thing, holder, words(above))
    if issubclass(kind, types.FrameType):
        return _place_in_stopped_frame(thing, holder, above)
    if issubclass(kind, types.MethodType):
        return place_of_thing(above)
    if kind is types.CellType:
        return _place_in_cell(above)
    if kind is _CACHE:
        name = holder.__qualname__
        return Place("cache", f"in the cache of {name}()", code=f"{name}.cache_clear()")
    if kind is types.FunctionType:
        return _place_in_function(thing, holder, above)
    if (frame := stopped_frame(holder)) is not None:
        return _place_in_generator(thing, frame, above)
    if is_a(way.above(2).owner, nn.Module):
        if (place := _place_in_module_dictionary(thing, holder, way.above(2))) is not None:
            return place
    if issubclass(kind, dict) and is_a(way.above(2).owner, torch.Tensor):
        return Place("hook", f"a hook of {words(way.above(2))}")
    if issubclass(kind, dict):
        code, key = place_of_thing(above).code, key_of(holder, thing)
        code = f"{code}[{key!r}]" if code and type(key) in (str, int) else None
        return Place("dict", f"in {words(above)}", code=code)
    if issubclass(kind, LISTS):
        return Place("list", f"in {words(above)}")
    return _place_at_object(thing, holder, above)


_CACHE = type(functools.cache(len))


def _place_at_tensor(thing: object, tensor: torch.Tensor, owner: str) -> Place:
    if name := name_in(vars(tensor), thing):
        return Place("attribute", f"of {owner}", "attribute", name)
    if is_a(thing, torch.Tensor):
        return Place("gradient", f"the gradient of {owner}")
    return Place("hook", f"a hook of {owner}")


def _place_in_stopped_frame(thing: object, frame: types.FrameType, above: Way) -> Place:
    """In a function that has ended: an exception holds its frame by the traceback."""
    name = name_in(variables(frame), thing)
    keeper = above.above_types(types.FrameType, types.TracebackType)
    where = f"{place_in(frame.f_code, name)}, kept by the traceback of {words(keeper)}"
    if is_of_last_error(frame):
        error = getattr(sys, "last_type", None) or BaseException
        where = f"{place_in(frame.f_code, name)}, kept by the last error ({error.__name__})"
    return Place("traceback", where, "variable", name)


def _place_in_generator(thing: object, frame: types.FrameType, above: Way) -> Place:
    name = name_in(variables(frame), thing)
    place = place_in(frame.f_code, name).removeprefix("in ")
    generator = place_of_thing(above).code
    code = f"{generator}.close()" if generator else None
    noun = type(above.owner).__name__.replace("_", " ")
    return Place("suspended", f"in the suspended {noun} {place}", "variable", name, code)


def _place_in_function(thing: object, function: types.FunctionType, above: Way) -> Place:
    """A function holds its arguments' defaults in a tuple."""
    where = f"of {words(above)}"
    kind = "hook" if place_of_thing(above).kind == "hook" else "closure"
    if thing is function.__defaults__:
        return Place(kind, f"among the defaults {where}")
    return Place(kind, where)


def _place_in_cell(cell: Way) -> Place:
    """A function holds the variables of the function around it in cells, in a tuple."""
    if len(cell.things) > 2 and type(cell.things[2]) is types.FunctionType:
        function = cell.things[2]
        cells = function.__closure__ or ()
        for name, other in zip(function.__code__.co_freevars, cells, strict=True):
            if other is cell.things[0]:
                kind = "hook" if place_of_thing(cell.above(2)).kind == "hook" else "closure"
                return Place(kind, f"of {words(cell.above(2))}", "cell", name)
    return Place("closure", "in a closure")


def _place_in_module_dictionary(thing: object, values: object, module: Way) -> Place | None:
    """A module keeps its parameters, its buffers and its hooks in dictionaries."""
    attribute = name_in(vars(module.things[0]), values)
    what = attribute.strip("_").replace("_", " ")
    if what.endswith("hooks"):
        return Place("hook", f"a {what.removesuffix('s')} of {words(module)}")
    nouns = {"parameters": "parameter", "buffers": "buffer"}
    if what not in nouns:
        return None
    return _place_at_module(name_in(values, thing), nouns[what], module)


def _place_at_object(thing: object, owner: object, above: Way) -> Place:
    name = attribute_of(owner, thing)
    if is_a(owner, nn.Module):
        if is_a(thing, nn.Module):
            children = dict(nn.Module.named_children(owner))
            return _place_at_module(name_in(children, thing), "module", above)
        return _place_at_module(name, "attribute", above)
    if not name:
        return Place("attribute", f"in {words(above)}")
    code = place_of_thing(above).code
    if is_a(owner, type):
        code = owner.__name__
    return Place(
        "attribute", f"of {words(above)}", "attribute", name, f"{code}.{name}" if code else None
    )


def _place_at_module(name: str, noun: str, module: Way) -> Place:
    """Something of a module, by its name in the model: "`layers.2.weight` of GPT `model`"."""
    place = place_of_thing(module)
    if place.noun == "module":
        owner = f'{place.code}.get_submodule("{place.name}")' if place.code else None
        where, full_name = place.where, f"{place.name}.{name}"
    else:
        owner, where, full_name = place.code, f"of {words(module)}", name
    if noun == "module":
        code = place.code  # that of the whole model, for `get_submodule`
    else:
        code = f"{owner}.{name}" if owner else None
    return Place("attribute", where, noun, full_name, code)
