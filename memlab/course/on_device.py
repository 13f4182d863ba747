"""What a notebook itself keeps on the device while it measures: its cells' own tensors."""

from __future__ import annotations

import ast
import math
from collections.abc import Iterator

from memlab.course.slices import root_name, statements_of

# What gives back Python's own numbers.
_GIVES_NUMBERS = {"gradient_difference", "losses", "time_together", "item", "tolist"}


def leaves_on_device(notebook: dict) -> list[tuple[str, int, float]]:
    """What a notebook itself, outside of its functions, has on the device, and between which lines.

    A run that is measured meanwhile finds the allocator not empty. A proof's gradients are such
    tensors, and whatever is made or moved with `here.device`.

    Args:
        notebook: the notebook as JSON.

    Returns:
        The name; the line that gives it a value; the line that deletes it, or infinity. Lines are
        counted through all code cells.
    """
    found: list[tuple[str, int, float]] = []
    alive: dict[str, int] = {}
    for statement in statements_of(notebook):
        for node in _simple(statement):
            if isinstance(node, ast.Delete):
                for target in node.targets:
                    if (name := root_name(target)) in alive:
                        found.append((name, alive.pop(name), node.lineno))
            elif isinstance(node, ast.Assign) and _on_device(node.value):
                targets = [name for target in node.targets for name in ast.walk(target)]
                alive |= {each.id: node.lineno for each in targets if isinstance(each, ast.Name)}
    return found + [(name, line, math.inf) for name, line in alive.items()]


def _simple(statement: ast.stmt) -> Iterator[ast.stmt]:
    """The statements that a statement is made of, without functions."""
    if not isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
        yield statement
        for child in ast.iter_child_nodes(statement):
            if isinstance(child, ast.stmt):
                yield from _simple(child)


def _on_device(value: ast.expr) -> bool:
    if isinstance(value, ast.Lambda):
        return False
    if isinstance(value, ast.Attribute) and root_name(value) == "here":
        return value.attr == "device" and isinstance(value.value, ast.Name)
    called = getattr(value.func, "attr", "") if isinstance(value, ast.Call) else ""
    if called in _GIVES_NUMBERS:
        return False
    if called == "first_step":
        return True
    return any(map(_on_device, ast.iter_child_nodes(value)))
