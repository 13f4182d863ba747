"""What of a notebook leads to its records: a backward slice over the statements of its cells.

A notebook also proves, times and draws, and none of that changes what a recorded run needs. So a
record can be made again from the statements that its names come from, and no others. The statements
stay as they are, in their order; only what shows something or checks a value is left out of them.
"""

from __future__ import annotations

import ast
import re
import symtable
from collections.abc import Iterator

# A call of one of these, as a statement by itself, shows or checks something.
_SHOWS = {"print", "display", "figures", "widgets", "exercises"}
_CHECKS = {"within", "plot"}
# What depends on values that only a real run has, and changes no byte: of which call, which
# keywords.
_LEFT_OUT = {
    "record": {"loss", "max_gradient_difference", "tokens_per_step"},
    "compare": {"predicted"},
}
_CHANGES = {"append", "extend", "update", "add", "insert", "setdefault"}


def statements_for_records(notebook: dict) -> list[ast.stmt]:
    """The statements of a notebook that its calls of `results.record` need, in their order.

    Args:
        notebook: the notebook as JSON.

    Returns:
        The statements, to be compiled and run one after the other.
    """
    statements = [
        cleaned for statement in statements_of(notebook) if (cleaned := _cleaned(statement))
    ]
    needed = {number for number, each in enumerate(statements) if _records(each)}
    waiting = sorted(needed)
    while waiting:
        number = waiting.pop()
        for name in _uses(statements[number]):
            for found in _made_by(name, number, statements) - needed:
                needed.add(found)
                waiting.append(found)
    return [statements[number] for number in sorted(needed)]


def statements_of(notebook: dict) -> list[ast.stmt]:
    """All statements of a notebook, their lines counted through its code cells."""
    found = []
    lines = 0
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            # `%pip install` stands where memlab is not there.
            source = re.sub(r"(?m)^(\s*)%.*$", r"\1pass", "".join(cell["source"]))
            found += ast.increment_lineno(ast.parse(source), lines).body
            lines += source.count("\n") + 1
    return found


def _cleaned(statement: ast.stmt) -> ast.stmt | None:
    return ast.fix_missing_locations(cleaned) if (cleaned := _Clean().visit(statement)) else None


class _Clean(ast.NodeTransformer):
    """Leaves out what shows or checks values, outside of functions (those are runs)."""

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        return node

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.ClassDef:
        return node

    def visit_Assert(self, node: ast.Assert) -> None:
        return None

    def visit_Expr(self, node: ast.Expr) -> ast.Expr | None:
        call = node.value
        if not isinstance(call, ast.Call):
            return None
        called = call.func
        if isinstance(called, ast.Attribute) and called.attr in _CHECKS:
            return None
        return None if root_name(called) in _SHOWS else self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> ast.Call:
        called = node.func.attr if isinstance(node.func, ast.Attribute) else root_name(node.func)
        left_out = _LEFT_OUT.get(called, ())
        node.keywords = [keyword for keyword in node.keywords if keyword.arg not in left_out]
        return self.generic_visit(node)

    def generic_visit(self, node: ast.AST) -> ast.AST | None:
        super().generic_visit(node)
        if hasattr(node, "body") and node.body == []:
            node.body = [ast.Pass()]
        return node


def root_name(node: ast.AST) -> str | None:
    """The name that `a`, `a.b`, `a[b]` or `a.b(c)` begins with."""
    while isinstance(node, (ast.Attribute, ast.Subscript, ast.Call, ast.Starred)):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node.id if isinstance(node, ast.Name) else None


def _records(statement: ast.stmt) -> bool:
    return any(
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and (node.func.attr, root_name(node.func)) == ("record", "results")
        for node in ast.walk(statement)
    )


def _uses(statement: ast.stmt) -> set[str]:
    """The notebook's names that a statement uses, in functions that it defines, too."""
    table = symtable.symtable(ast.unparse(statement), "cell", "exec")
    found, tables = set(), [table]
    while tables:
        table = tables.pop()
        tables += table.get_children()
        for symbol in table.get_symbols():
            at_top = table.get_type() == "module"
            if symbol.is_referenced() and (at_top or symbol.is_global()):
                found.add(symbol.get_name())
    return (found | _changed(statement)) - _bound_first(statement)


def _bound_first(statement: ast.stmt) -> set[str]:
    """The names that a statement gives a value before it uses them: a loop's own variable."""
    first: dict[str, bool] = {}
    for node in _in_order(statement):
        if isinstance(node, ast.Name):
            first.setdefault(node.id, isinstance(node.ctx, ast.Store))
    return {name for name, bound in first.items() if bound}


def _in_order(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes of a statement in the order in which Python works on them, nearly."""
    if isinstance(node, (ast.Assign, ast.NamedExpr, ast.For, ast.comprehension)):
        fields = ("value", "iter", "targets", "target", "ifs", "body", "orelse")
    elif isinstance(node, (ast.ListComp, ast.SetComp, ast.GeneratorExp, ast.DictComp)):
        fields = ("generators", "key", "value", "elt")
    else:
        fields = node._fields
    for field in fields:
        children = getattr(node, field, None)
        for child in children if isinstance(children, list) else [children]:
            if isinstance(child, ast.AST):
                yield from _in_order(child)
    yield node


def _binds(statement: ast.stmt) -> set[str]:
    """The names that a statement gives a new value."""
    table = symtable.symtable(ast.unparse(statement), "cell", "exec")
    symbols = table.get_symbols()
    return {each.get_name() for each in symbols if each.is_assigned() or each.is_imported()}


def _changed(statement: ast.stmt) -> set[str]:
    """The names whose values a statement changes: by an item, an attribute, a method."""
    found = set()
    for node in ast.walk(statement):
        if isinstance(node, (ast.Subscript, ast.Attribute)) and isinstance(node.ctx, ast.Store):
            found.add(root_name(node))
        if isinstance(node, ast.AugAssign):
            found.add(root_name(node.target))
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr in _CHANGES
        ):
            found.add(root_name(node.func))
    return found - {None}


def _made_by(name: str, number: int, statements: list[ast.stmt]) -> set[int]:
    """The statements that a name's value comes from, where the statement `number` uses it.

    They are the last one before that gives it a value, and those since then that change the value.
    A function may use a name that gets its value later: then it is the next one.
    """
    found = set()
    for before in reversed(range(number)):
        statement = statements[before]
        if isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
            if statement.name == name:
                return found | {before}
            continue
        if name in _changed(statement):
            found.add(before)
        if name in _binds(statement):
            found.add(before)
            # A loop or a condition may leave the value as it was.
            if not isinstance(statement, (ast.If, ast.For, ast.While)):
                return found
    if found:
        return found
    later = range(number + 1, len(statements))
    following = next((each for each in later if name in _binds(statements[each])), None)
    return set() if following is None else {following}
