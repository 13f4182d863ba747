"""The exercises can be solved: each notebook runs with its solutions in place of its exercises, and
all checks pass.

To save time the copy that runs leaves out the cells that the exercises do not need. Which these
are, the names in the cells say: a cell is needed if it binds or changes a name that a needed cell
uses.
"""

import ast
import json
import re
import symtable

import nbformat
import pytest
from IPython.core.inputtransformer2 import TransformerManager

from memlab.course.notebook import find_root, in_depth, lessons
from memlab.course.run import run

NOTEBOOKS = in_depth(find_root())
LESSONS = lessons(find_root())

HISTORY = """import json
from memlab import exercises
print(json.dumps([[result.passed, str(result)] for result in exercises.history]))"""


def tagged(cell, tag):
    return cell.cell_type == "code" and tag in cell.metadata.get("tags", ())


def solutions(cells):
    """The solution of each exercise cell, by the cell's position. It is folded away in the next
    markdown cell.
    """
    found = {}
    for position, cell in enumerate(cells):
        if not tagged(cell, "exercise"):
            continue
        following = next(
            i
            for i in range(position + 1, len(cells) + 1)
            if i == len(cells) or cells[i].cell_type == "markdown"
        )
        check = cells[position + 1 : following]
        assert any(tagged(one, "check") for one in check), (
            f"no check follows the exercise in cell {position}"
        )
        text = cells[following].source if following < len(cells) else ""
        folded = re.findall(
            r"<details>\s*<summary>Solution</summary>(.*?)</details>", text, re.DOTALL
        )
        assert len(folded) == 1, f"no folded solution follows the exercise in cell {position}"
        code = re.findall(r"^```python\n(.*?)^```$", folded[0], re.DOTALL | re.MULTILINE)
        assert len(code) == 1, (
            f"the solution of the exercise in cell {position} is not one block of Python"
        )
        found[position] = code[0].rstrip()
    return found


def names(source):
    """The global names that a cell binds, those that it changes, those that it uses itself, and
    those its functions use.

    What a cell has bound itself before it uses it is not counted as used.
    """
    source = TransformerManager().transform_cell(source)  # %magics to Python
    tree = ast.parse(source)
    bound, changed, used, used_in_functions = set(), set(), set(), set()
    module = symtable.symtable(source, "cell", "exec")
    tables = [(module, False)]
    while tables:
        table, later = tables.pop()
        # What a comprehension of the cell uses, the cell uses; in a function it belongs to that.
        later = later or (
            table is not module and not table.get_name().endswith(("comp", "genexpr"))
        )
        tables += [(child, later) for child in table.get_children()]
        for symbol in table.get_symbols():
            if table is module or symbol.is_global():
                bound |= (
                    {symbol.get_name()} if symbol.is_assigned() or symbol.is_imported() else set()
                )
                if symbol.is_referenced() and later:
                    used_in_functions.add(symbol.get_name())
    so_far = set()
    for statement in tree.body:
        loads, stores, looped = occurrences(statement)
        used |= loads - so_far - looped
        so_far |= stores
    for node in ast.walk(tree):
        # `name.method(...)`, `name[...] = ...` and `name.attribute = ...` change what the name
        # stands for.
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            node = node.value.func
        elif not (
            isinstance(node, (ast.Attribute, ast.Subscript))
            and isinstance(node.ctx, (ast.Store, ast.Del))
        ):
            continue
        while isinstance(node, (ast.Attribute, ast.Subscript)):
            node = node.value
            if isinstance(node, ast.Name):
                changed.add(node.id)
    return bound, changed, used, used_in_functions


def occurrences(node):
    """The names that a statement reads and binds when it runs (functions' bodies run later), and
    its loops' variables.
    """
    loads, stores, looped = set(), set(), set()

    def visit(node, own=frozenset()):
        if isinstance(node, ast.Name):
            if isinstance(node.ctx, ast.Store):
                stores.add(node.id)
            elif node.id not in own:
                loads.add(node.id)
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            if not isinstance(node, ast.Lambda):
                stores.add(node.name)
            outside = [
                *getattr(node, "decorator_list", []),
                *node.args.defaults,
                *filter(None, node.args.kw_defaults),
            ]
            for part in outside:
                visit(part, own)
        elif isinstance(node, (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)):
            targets = [name for part in node.generators for name in ast.walk(part.target)]
            inner = own | {name.id for name in targets if isinstance(name, ast.Name)}
            for part in ast.iter_child_nodes(node):
                for child in (
                    [part.iter, *part.ifs] if isinstance(part, ast.comprehension) else [part]
                ):
                    visit(child, inner)
        else:
            if isinstance(node, ast.For):
                looped.update(
                    name.id for name in ast.walk(node.target) if isinstance(name, ast.Name)
                )
            if isinstance(node, ast.ClassDef):
                stores.add(node.name)
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                stores.update(
                    (alias.asname or alias.name).partition(".")[0] for alias in node.names
                )
            for child in ast.iter_child_nodes(node):
                visit(child, own)

    visit(node)
    return loads, stores, looped


def imported(source):
    """The names that a cell imports: `results.record()` does not change what `results` is."""
    nodes = ast.walk(ast.parse(TransformerManager().transform_cell(source)))
    aliases = [
        alias
        for node in nodes
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for alias in node.names
    ]
    return {(alias.asname or alias.name).partition(".")[0] for alias in aliases}


def needed(cells):
    """The positions of the cells that the exercises and checks need, with these, in order.

    What a cell itself uses was bound last before it; what its functions use may be bound anywhere.
    """
    code = {i: cell for i, cell in enumerate(cells) if cell.cell_type == "code"}
    of = {i: names(cell.source) for i, cell in code.items()}
    modules = {name for cell in code.values() for name in imported(cell.source)}
    kept = {i for i, cell in code.items() if tagged(cell, "exercise") or tagged(cell, "check")}
    waiting = list(kept)
    while waiting:
        i = waiting.pop()
        _, _, used, in_functions = of[i]
        more = {
            j
            for j, (bound, changed, *_) in of.items()
            if (bound | (changed - modules)) & in_functions
        }
        for name in used:
            before = [j for j in of if j < i and name in of[j][0]]
            since = before[-1] if before else -1
            more |= {since} if before else set()
            more |= {j for j in of if since < j < i and name in of[j][1] - modules}
        waiting += more - kept
        kept |= more
    return sorted(kept)


def solved(notebook):
    """A copy of a notebook with solutions for exercises, with the cells that they need, and the
    history at its end.
    """
    answers = solutions(notebook.cells)
    copy = nbformat.from_dict(json.loads(json.dumps(notebook)))
    for position, answer in answers.items():
        copy.cells[position].source = answer
    copy.cells = [copy.cells[position] for position in needed(copy.cells)]
    copy.cells.append(nbformat.v4.new_code_cell(HISTORY))
    return copy


def said(cell):
    """What a code cell's committed output says."""
    return "".join(
        o.get("text", "") or o.get("data", {}).get("text/plain", "") for o in cell.outputs
    )


def unsolved_problems(notebook):
    """What is wrong with a notebook as it is committed: each check has to say that it is not solved
    yet.
    """
    checks = [i for i, cell in enumerate(notebook.cells) if tagged(cell, "check")]
    return [
        f"cell {i} does not say 'Not solved yet'"
        for i in checks
        if "Not solved yet" not in said(notebook.cells[i])
    ]


def solution_problems(notebook, name, folder):
    """What is wrong with a notebook's solutions: run them, and look at what the checks found."""
    copy = solved(notebook)
    path = folder / "notebooks" / name
    path.parent.mkdir(parents=True)
    nbformat.write(copy, path)
    (outcome,) = run([path], root=folder)
    if outcome.failed:
        return [str(outcome)]
    results = json.loads(said(nbformat.read(outcome.copy, as_version=4).cells[-1]))
    checks = sum(tagged(cell, "check") for cell in notebook.cells)
    problems = [text for passed, text in results if not passed]
    if len(results) != checks:
        problems.append(f"{checks} checks gave {len(results)} results")
    return problems


# The course ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path", [*NOTEBOOKS, *LESSONS], ids=lambda path: f"{path.parent.name}/{path.stem}"
)
def test_the_exercises_are_unsolved_as_committed(path):
    notebook = nbformat.read(path, as_version=4)
    least = 1 if path in LESSONS else 2
    assert len(solutions(notebook.cells)) >= least, f"fewer exercises than {least}"
    assert unsolved_problems(notebook) == []


def class_of(path):
    @pytest.mark.slow
    class TestSolutions:
        def test_the_solutions_pass(self, tmp_path):
            assert solution_problems(nbformat.read(path, as_version=4), path.name, tmp_path) == []

    return TestSolutions


# A class a notebook, since `pytest --dist=loadscope` gives each class to one process: so they end
# at about the same time. Where a lesson stands, its exercise is what a learner does: the solutions
# in depth take long, and are left to `make test-in-depth`.
WITH_A_LESSON = {path.stem for path in LESSONS}
for path in NOTEBOOKS:
    in_depth_only = pytest.mark.in_depth if path.stem in WITH_A_LESSON else lambda each: each
    globals()[f"Test_{path.stem}"] = in_depth_only(class_of(path))
globals().update({f"Test_lesson_{path.stem}": class_of(path) for path in LESSONS})


# The test itself, on a small notebook that stands in for the course's -----------------------------

SETUP = """
%config InlineBackend.figure_format = 'png'
import torch
from torch import nn
from memlab import exercises, measure
torch.set_num_threads(1)
"""

REFERENCE = """
def build(*, rows=512, waste=True, trains=True):
    def build_run():
        torch.manual_seed(0)
        model = nn.Linear(64, 64)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        inputs = torch.randn(512, 64)

        def step():
            if not trains:
                return None
            kept = [inputs * 2 for _ in range(COUNT if waste else 0)]
            loss = model(inputs[:rows]).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    return build_run
"""


def code(source, *tags):
    return nbformat.v4.new_code_cell(source.strip("\n"), metadata={"tags": list(tags)})


def exercise(number, solution):
    text = f"<details><summary>Solution</summary>\n\n```python\n{solution}\n```\n\n</details>"
    return [
        nbformat.v4.new_markdown_cell(f"### Exercise {number}"),
        code(f"def answer_{number}():\n    return None", "exercise"),
        code(
            f"exercises.check(answer_{number}, reference=build(), budget=limit, device='cpu')",
            "check",
        ),
        nbformat.v4.new_markdown_cell(
            f"<details><summary>Hint</summary>\n\nLess.\n\n</details>\n\n{text}"
        ),
    ]


def stand_in(*answers):
    cells = [
        code(SETUP),
        code("1 / 0  # no exercise needs this, so it does not run"),
        code("COUNT = 1"),
        code("COUNT += 7"),
        code("step = build  # a local name of the reference, and nothing of the exercises\n1 / 0"),
        code(REFERENCE),
        code("limits = {}"),
        code("limits['one'] = measure(build(), device='cpu').peak_bytes // 2"),
        code("exercises.guess(None, 1)\n1 / 0"),
        code("limit = limits['one']"),
    ]
    for number, answer in enumerate(answers, 1):
        cells += exercise(number, answer)
    return nbformat.v4.new_notebook(cells=cells)


RIGHT = "def answer_{}():\n    return build(waste=False)()"


def test_wrong_solutions_are_found(tmp_path):
    notebook = stand_in(
        RIGHT.format(1),
        "def answer_2():\n    return build()()",
        "answer_3 = build(waste=False, rows=100)",
        "answer_4 = build(waste=False, trains=False)",
        "answer_5 = None",
        RIGHT.format(6),
    )
    notebook.cells[-2].source = "print('well done')"  # a check that checks nothing
    over, different, idle, missing, silent = solution_problems(
        notebook, "00_stand_in.ipynb", tmp_path
    )
    assert over.startswith("Over the budget of ")
    assert different.startswith(
        "It fits, but it does not train the same model\nThe largest gradient difference is "
    )
    assert idle.startswith(
        "It fits, but it does not train the same model\nNo parameter has a gradient"
    )
    assert missing.startswith("Not solved yet: ")
    assert silent == "6 checks gave 5 results"


def test_a_solution_that_fails_is_found(tmp_path):
    notebook = stand_in(RIGHT.format(1), "def answer_2():\n    return biuld()()")
    (problem,) = solution_problems(notebook, "00_stand_in.ipynb", tmp_path)
    assert "FAILED in cell" in problem and "NameError: name 'biuld' is not defined" in problem


def test_only_the_cells_that_exercises_need_are_kept():
    cells = solved(stand_in(RIGHT.format(1))).cells
    sources = [cell.source for cell in cells]
    assert [source.splitlines()[0] for source in sources] == [
        "%config InlineBackend.figure_format = 'png'",
        "COUNT = 1",
        "COUNT += 7",
        "def build(*, rows=512, waste=True, trains=True):",
        "limits = {}",
        "limits['one'] = measure(build(), device='cpu').peak_bytes // 2",
        "limit = limits['one']",
        "def answer_1():",
        "exercises.check(answer_1, reference=build(), budget=limit, device='cpu')",
        "import json",
    ]
    assert sources[-3] == RIGHT.format(1)


@pytest.mark.parametrize(
    "source, bound, changed, used",
    [
        ("a = b + c", "a", "", "b c"),
        ("def f(x):\n    y = x\n    return y + z", "f", "", "z"),
        ("def f():\n    global g\n    g = 1", "f g", "", ""),
        ("class A(B):\n    c = d", "A", "", "B d"),
        ("for i in range(n):\n    xs.append(i)", "i", "xs", "n range xs"),
        ("for i in a:\n    pass\ni = i + 1", "i", "", "a"),
        ("x = f(x)\ny = x", "x y", "", "f x"),
        ("a = {k: v for k, v in xs}\nb = k", "a b", "", "xs k"),
        ("def f():\n    return [corpus[v] for v in vs]", "f", "", "corpus vs"),
        ("y = [v for v in vs for v in v.w]\nz = {k: lambda: q for k in y}", "y z", "", "vs q"),
        ("import os.path as p, sys\nfrom a import b", "p sys b", "", ""),
        ("x[0].y = 1\ndel z.w", "", "x z", "x z"),
        ("with f() as g:\n    pass", "g", "", "f"),
        ("values = [v for v in vs if (w := v)]", "values w", "", "vs"),
        ("try:\n    import m\nexcept ImportError:\n    %pip install m", "m", "", "ImportError"),
        ("print(a)", "", "", "a print"),
    ],
)
def test_names(source, bound, changed, used):
    found = names(source)
    assert found[0] == set(bound.split())
    assert changed.split() == sorted(found[1] - {"get_ipython"})
    assert set(used.split()) <= found[2] | found[3] <= set(used.split()) | {"get_ipython", "w", "v"}


def test_a_name_is_that_of_the_last_cell_that_binds_it():
    cells = [
        code("x = 1"),
        code("x = 2"),
        code("def f():\n    return y"),
        code("for x in z:\n    pass"),
        code("y = 3"),
        code("answer = x, f()", "exercise"),
        code("check(answer)", "check"),
    ]
    assert needed(cells) == [2, 3, 4, 5, 6]  # z is bound nowhere: the run would say so


def test_committed_outputs_that_do_not_say_unsolved_are_found():
    notebook = stand_in(RIGHT.format(1), RIGHT.format(2))
    checks = [cell for cell in notebook.cells if tagged(cell, "check")]
    assert len(unsolved_problems(notebook)) == 2  # not even executed
    output = nbformat.v4.new_output
    checks[0].outputs = [output("stream", text="Not solved yet: 2.00 MiB has to become 1.00 MiB\n")]
    checks[1].outputs = [
        output("stream", text="Solved: 2.00 MiB → 1.00 MiB\n"),
        output("display_data", {"text/plain": "x"}),
    ]
    (problem,) = unsolved_problems(notebook)
    assert problem == f"cell {len(notebook.cells) - 2} does not say 'Not solved yet'"


@pytest.mark.parametrize(
    "cells, words",
    [
        (lambda cells: cells[:-1], "no folded solution follows"),
        (lambda cells: [*cells[:-2], cells[-1]], "no check follows"),
        (
            lambda cells: [
                *cells[:-1],
                edited(cells[-1], "<details><summary>Solution", "<details open><summary>Solution"),
            ],
            "no folded solution",
        ),
        (
            lambda cells: [*cells[:-1], edited(cells[-1], "```python", "```")],
            "is not one block of Python",
        ),
        (
            lambda cells: [*cells[:-1], edited(cells[-1], "```\n", "```\n```python\nx\n```\n")],
            "is not one block of Python",
        ),
    ],
)
def test_a_missing_solution_is_found(cells, words):
    with pytest.raises(AssertionError, match=words):
        solutions(cells(exercise(1, "pass")))


def edited(cell, old, new):
    assert old in cell.source
    return nbformat.v4.new_markdown_cell(cell.source.replace(old, new))
