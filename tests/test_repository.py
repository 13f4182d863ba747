"""The rules of the repository, each a function from a folder to a list of what is wrong there.

Every rule is used twice: on this repository, where it must find nothing, and on a small tree made
wrong on purpose, where it must find that. What a rule is for, and how to satisfy it, is in
CONTRIBUTING.md.
"""

import ast
import copy
import json
import re
import runpy
import subprocess
import sys
import tomllib
from pathlib import Path

import nbformat
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from memlab.course import documents
from memlab.course.notebook import in_depth, lessons, source_hash

ROOT = Path(__file__).resolve().parents[1]

#: The notebooks that are about no technique, and those that have fewer sections than a technique's.
NO_TECHNIQUE = {"measuring_memory", "will_it_fit"}
OF_ANOTHER_FORM = {"measuring_memory", "capstone", "will_it_fit"}
#: The tests in tests/techniques/ that are about no single one.
ABOUT_ALL_TECHNIQUES = {"contract"}

#: The headings of a technique's notebook, in order, and of the two of another form.
SECTIONS = (
    "The problem",
    "Predict",
    "The technique",
    "Measure again",
    "Proof",
    "Turn the knob",
    "When it does not help",
    "In production",
    "Exercises",
    "Takeaways",
)
FEWER_SECTIONS = ("Predict", "Exercises", "Takeaways")
#: The headings of a lesson, in order.
LESSON_SECTIONS = (
    "The idea",
    "The problem, measured",
    "Predict",
    "By hand",
    "Measure again",
    "The same training?",
    "At your scale",
    "When it does not help",
    "In your trainer",
    "Exercise",
    "Takeaways",
)

MAX_NOTEBOOK_BYTES = 1_500_000

# A path of somebody's machine. Not preceded by a word or a dot: https://example.org/home/page is a
# link.
MACHINE_PATH = re.compile(
    r"(?<![\w.~])/(?:root|home|tmp|work|opt|content|mnt|private|Users|var/folders)/\w|\b[A-Z]:\\+Users"
)
REGISTRY = re.compile(
    r"https?://[^\s\"')>]*/simple\b|pythonhosted\.org|https?://(?!127\.)\d+\.\d+\.\d+\.\d+"
    r"|\b(?:artifactory|devpi|nexus)\b",
    re.IGNORECASE,
)
FORBIDDEN_WORDS = re.compile(r"\b(?:simply|obviously|trivially|TODO|FIXME|XXX)\b")
DEPRECATED = re.compile(r"\btorch\.cuda\.amp\b|\btorch\.cpu\.amp\b|\bexport_memory_timeline\b")


# --- Reading a tree -------------------------------------------------------------------------------


def tracked_files(root):
    """The files that git tracks or would track; without git (an unpacked archive), all that is not
    hidden.
    """
    command = "git ls-files -z --cached --others --exclude-standard".split()
    try:
        ended = subprocess.run(command, cwd=root, capture_output=True, check=True, text=True)
        listed = ended.stdout.split("\0")
    except (OSError, subprocess.CalledProcessError):
        skip = {"build", "__pycache__", "memlab.egg-info"}
        paths = [path.relative_to(root) for path in root.rglob("*")]
        hidden = [any(part in skip or part[0] == "." for part in path.parts) for path in paths]
        listed = [str(path) for path, left_out in zip(paths, hidden, strict=True) if not left_out]
    return sorted(root / p for p in listed if p and (root / p).is_file())


def text_files(root):
    """(path, text) of every tracked text file but this one, whose patterns match themselves."""
    for path in tracked_files(root):
        if path == Path(__file__).resolve() or path.suffix in {".png", ".ipynb"}:
            continue
        yield path.relative_to(root).as_posix(), path.read_text(encoding="utf-8")


def notebook_paths(root):
    """The lessons, and the notebooks in depth."""
    return [*lessons(root), *in_depth(root)]


def topic(path):
    """`03_gradient_checkpointing.ipynb` is about `gradient_checkpointing`,
    `e2_pruning.ipynb` about `pruning`.
    """
    return re.sub(r"^e?\d+_", "", path.stem)


def code_cells(notebook):
    return [c for c in notebook.cells if c.cell_type == "code" and c.source.strip()]


def output_texts(cell):
    """Every text in a cell's outputs. A picture is no text: it is encoded."""
    for output in cell.outputs:
        yield from (output.get("text", ""), output.get("evalue", ""))
        shown = {k: v for k, v in output.get("data", {}).items() if k != "image/png"}
        yield from (text for text in shown.values() if isinstance(text, str))


def third_party(tree):
    """The modules outside the standard library that a syntax tree imports. What is tried may be
    missing.
    """
    tried = {
        id(node)
        for statement in ast.walk(tree)
        if isinstance(statement, ast.Try)
        for line in statement.body
        for node in ast.walk(line)
    }
    names = set()
    for node in ast.walk(tree):
        if id(node) in tried:
            continue
        if isinstance(node, ast.Import):
            names |= {a.name.split(".")[0] for a in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add(node.module.split(".")[0])
    return names - set(sys.stdlib_module_names) - {"memlab"}


def requirements(root):
    """{"": runtime, "course": …, "dev": …} -> lists of Requirement, from pyproject.toml."""
    project = pyproject(root)["project"]
    groups = {"": project["dependencies"], **project.get("optional-dependencies", {})}
    return {group: [Requirement(line) for line in lines] for group, lines in groups.items()}


def pyproject(root):
    return tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))


def pins(path):
    """{name: version} of a constraints file, and the lines that are not plain pins."""
    lines = path.read_text(encoding="utf-8").splitlines()
    lines = [line for line in lines if line and not line.startswith("#")]
    plain = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*)==([0-9A-Za-z.]+)")
    found = {canonicalize_name(m[1]): m[2] for m in map(plain.fullmatch, lines) if m}
    return found, [line for line in lines if not plain.fullmatch(line)]


# --- One technique, one name, three places --------------------------------------------------------


def taught(path):
    """The techniques that a notebook teaches: those in its metadata, or the one in its name."""
    about = json.loads(path.read_text(encoding="utf-8"))["metadata"].get("memlab", {})
    return about.get("techniques", [topic(path)])


def name_problems(root):
    notebooks = [p for p in in_depth(root) if topic(p) not in NO_TECHNIQUE]
    subjects = [name for path in notebooks for name in taught(path)]
    tests = {p.stem[5:] for p in (root / "tests/techniques").glob("test_[!_]*.py")}
    places = {
        "memlab/techniques/{}.py": {p.stem for p in (root / "memlab/techniques").glob("[!_]*.py")},
        "notebooks/in_depth/NN_{}.ipynb": set(subjects),
        "tests/techniques/test_{}.py": tests - ABOUT_ALL_TECHNIQUES,
    }
    for name in sorted(set.union(*places.values())):
        missing = [place.format(name) for place, names in places.items() if name not in names]
        if missing:
            yield f"technique {name}: missing {' and '.join(missing)}"
        if subjects.count(name) > 1:
            yield f"technique {name} is taught by {subjects.count(name)} notebooks"
    for path in notebook_paths(root):
        if not re.fullmatch(r"(\d\d|e\d)_[a-z0-9_]+", path.stem):
            yield f"{path.name}: a notebook is named by two digits, or e and a digit, and a name"
    behind = {path.name for path in in_depth(root)}
    for path in lessons(root):
        metadata = json.loads(path.read_text(encoding="utf-8"))["metadata"].get("memlab", {})
        evidence = metadata.get("evidence", "")
        if path.name not in behind and not (evidence and (root / evidence).is_file()):
            yield f"the lesson {path.name} has no notebook in depth of its name"


def mirror_problems(root):
    """Unit tests mirror the package."""
    for path in sorted((root / "memlab").rglob("[!_]*.py")):
        folder = path.relative_to(root / "memlab").parent
        test = root / "tests" / folder / f"test_{path.name}"
        if not test.is_file():
            yield f"{path.relative_to(root)} has no {test.relative_to(root)}"


def test_one_technique_one_name_three_places():
    assert list(name_problems(ROOT)) == []


@pytest.mark.parametrize(
    "lost",
    ["memlab/techniques/x.py", "notebooks/in_depth/01_x.ipynb", "tests/techniques/test_x.py"],
)
def test_a_technique_without_one_of_its_places_is_found(good_tree, lost):
    assert list(name_problems(good_tree)) == []
    (good_tree / lost).unlink()
    [problem] = name_problems(good_tree)
    assert problem.startswith("technique x: missing") and Path(lost).name.lstrip("01") in problem


def test_a_notebook_may_say_in_its_metadata_which_techniques_it_teaches(good_tree):
    path = good_tree / "notebooks/in_depth/01_x.ipynb"
    notebook = json.loads(path.read_text(encoding="utf-8"))
    notebook["metadata"].setdefault("memlab", {})["techniques"] = ["x", "y"]
    path.write_text(json.dumps(notebook), encoding="utf-8")
    [problem] = name_problems(good_tree)
    assert problem.startswith("technique y: missing memlab/techniques/y.py")
    path.with_name("02_x.ipynb").write_bytes(path.read_bytes())
    assert "technique x is taught by 2 notebooks" in list(name_problems(good_tree))


def test_a_notebook_without_a_number_is_found(good_tree):
    path = good_tree / "notebooks/in_depth/01_x.ipynb"
    path = path.rename(path.with_name("e1_x.ipynb"))
    assert list(name_problems(good_tree)) == []
    path.rename(path.with_name("x.ipynb"))
    assert ["two digits" in p for p in name_problems(good_tree)] == [True]


def test_a_lesson_without_its_notebook_in_depth_is_found(good_tree):
    path = good_tree / "notebooks/in_depth/01_x.ipynb"
    lesson = good_tree / "notebooks/01_x.ipynb"
    lesson.write_bytes(path.read_bytes())
    assert list(name_problems(good_tree)) == []
    lesson.rename(lesson.with_name("02_y.ipynb"))
    problem = "the lesson 02_y.ipynb has no notebook in depth of its name"
    assert list(name_problems(good_tree)) == [problem]
    notebook = json.loads(path.read_text(encoding="utf-8"))
    notebook["metadata"]["memlab"] = {"evidence": "results/README.md"}
    lesson.with_name("02_y.ipynb").write_text(json.dumps(notebook), encoding="utf-8")
    (good_tree / "results").mkdir(exist_ok=True)
    (good_tree / "results/README.md").write_text("tables", encoding="utf-8")
    assert list(name_problems(good_tree)) == []


def test_unit_tests_mirror_the_package():
    assert list(mirror_problems(ROOT)) == []


def test_a_module_without_its_test_is_found(good_tree):
    assert list(mirror_problems(good_tree)) == []
    (good_tree / "tests/test_ledger.py").unlink()
    assert list(mirror_problems(good_tree)) == ["memlab/ledger.py has no tests/test_ledger.py"]


# --- Readable beats short -------------------------------------------------------------------------

LONGEST_FUNCTION = 60  # lines
LONGEST_FILE = 250  # lines; a technique or a workload is one file, however long


def length_problems(root):
    """Files and functions, docstrings included, that nobody reads in one sitting."""
    for path in sorted((root / "memlab").rglob("*.py")):
        file = path.relative_to(root)
        source = path.read_text(encoding="utf-8")
        lines = source.count("\n")
        if file.parts[1] not in ("techniques", "workloads") and lines > LONGEST_FILE:
            yield f"{file}", f"has {lines} lines, more than {LONGEST_FILE}"
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                lines = node.end_lineno - node.lineno + 1
                if lines > LONGEST_FUNCTION:
                    yield f"{file}: {node.name}", f"has {lines} lines, more than {LONGEST_FUNCTION}"


def test_files_and_functions_can_be_read_in_one_sitting():
    assert list(length_problems(ROOT)) == []


def test_what_is_too_long_is_found(good_tree):
    assert list(length_problems(good_tree)) == []
    long = "def f():\n" + "    1\n" * LONGEST_FUNCTION
    write(good_tree / "memlab/techniques/x.py", long)
    write(good_tree / "memlab/ledger.py", "1\n" * (LONGEST_FILE + 1))
    write(good_tree / "memlab/workloads/gpt.py", "1\n" * (LONGEST_FILE + 1))
    assert list(length_problems(good_tree)) == [
        ("memlab/ledger.py", "has 251 lines, more than 250"),
        ("memlab/techniques/x.py: f", "has 61 lines, more than 60"),
    ]


# --- Same code on every device --------------------------------------------------------------------

ASKS_FOR_THE_DEVICE = re.compile(
    r"cuda\.is_available\(|device_count\(|\.type\s*(?:[!=]=|in\b)|\.is_cuda\b"
)
#: How many lines ask, by file: these are known, and each is to go. The sizes of a device's
#: experiments and what is to be expected there are questions for `memlab.workloads.scale()`.
KNOWN_TO_ASK = {
    "notebooks/in_depth/00_measuring_memory.ipynb": 1,
    "notebooks/in_depth/01_mixed_precision.ipynb": 1,
    "notebooks/in_depth/02_low_precision.ipynb": 2,
    "notebooks/in_depth/05_sharding.ipynb": 7,
    "notebooks/in_depth/06_data_loading.ipynb": 2,
    "notebooks/in_depth/07_in_place.ipynb": 2,
    "notebooks/in_depth/08_offloading.ipynb": 10,
    "notebooks/in_depth/09_lean_optimizers.ipynb": 1,
    "notebooks/in_depth/10_compilation_and_fusion.ipynb": 2,
    "notebooks/in_depth/e2_pruning.ipynb": 1,
    "notebooks/in_depth/e4_chunked_input.ipynb": 1,
    "notebooks/in_depth/e5_distillation.ipynb": 1,
    "notebooks/in_depth/e7_memory_pools.ipynb": 2,
}


def device_questions(root):
    """How many lines ask on which device they are, by file: of the notebooks and of memlab.

    A device is one file in `memlab/meters/`. A technique may ask, since it has to work without the
    rest.
    """
    sources = {}
    for path in notebook_paths(root):
        source = "\n".join(c.source for c in code_cells(nbformat.read(path, as_version=4)))
        sources[f"{path.relative_to(root)}"] = source
    for path in sorted((root / "memlab").rglob("*.py")):
        file = path.relative_to(root)
        if file.parts[1] not in ("meters", "techniques"):
            sources[f"{file}"] = path.read_text(encoding="utf-8")
    found = {
        file: sum(bool(ASKS_FOR_THE_DEVICE.search(line)) for line in source.splitlines())
        for file, source in sources.items()
    }
    return {file: count for file, count in found.items() if count}


def test_nobody_asks_which_device_it_is_on():
    """More than is known: find what differs in `memlab.workloads.scale()` or give the devices in
    `memlab/meters/` a method. Fewer: well done, and KNOWN_TO_ASK can say so.
    """
    assert device_questions(ROOT) == KNOWN_TO_ASK


@pytest.mark.parametrize(
    ("line", "asks"),
    [
        ("if torch.cuda.is_available():", True),
        ("second = 2 if here.device.type == 'cuda' else 4", True),
        ("if x.device.type in ('cuda', 'cpu'):", True),
        ("if loss.is_cuda:", True),
        ("with torch.autocast(here.device.type, dtype=torch.bfloat16):", False),
    ],
)
def test_a_question_for_the_device_is_found(good_tree, line, asks):
    assert device_questions(good_tree) == {}
    edit(
        good_tree / "notebooks/in_depth/01_x.ipynb", "measure(build)", f"{line} 1".replace('"', "'")
    )
    write(good_tree / "memlab/ledger.py", line)
    write(good_tree / "memlab/meters/cpu.py", line)
    found = {"notebooks/in_depth/01_x.ipynb": 1, "memlab/ledger.py": 1}
    assert device_questions(good_tree) == (found if asks else {})


# --- Notebooks ------------------------------------------------------------------------------------


def notebook_problems(path):
    if path.stat().st_size > MAX_NOTEBOOK_BYTES:
        yield f"{path.stat().st_size:,} bytes: too heavy to read on the web"
    notebook = nbformat.read(path, as_version=4)
    try:
        nbformat.validate(notebook)
    except nbformat.ValidationError as error:
        yield f"not valid: {error.message}"
    cells = code_cells(notebook)
    counts = [c.execution_count for c in cells]
    if counts != list(range(1, len(cells) + 1)):
        yield f"not executed in order from 1: execution counts {counts}"
    if not any("image/png" in o.get("data", {}) for c in cells for o in c.outputs):
        yield "no figure among its outputs: execute it before committing it"
    if notebook.metadata.get("memlab", {}).get("source_hash") != source_hash(notebook):
        yield "its outputs are older than its code: execute it again in place"
    if "widgets" in notebook.metadata:
        yield "carries widget state, with which it does not open on GitHub"
    if notebook.metadata.get("kernelspec", {}).get("name") != "python3":
        yield "its kernel has to be python3, the one that everybody has"
    for number, cell in enumerate(cells, start=1):
        where = f"code cell {number}"
        if DEPRECATED.search(cell.source):
            yield f"{where}: deprecated: {DEPRECATED.search(cell.source)[0]}"
        if any(o.output_type == "error" for o in cell.outputs):
            if "raises-exception" not in cell.metadata.get("tags", []):
                yield f"{where}: the output is an error"
        for text in output_texts(cell):
            if found := re.search(r"(?:Deprecation|Future|User)Warning", text):
                yield f"{where}: a warning in the output: {found[0]}"
            if found := MACHINE_PATH.search(text):
                yield f"{where}: a path of a machine in the output: {found[0]}"
    yield from shape_problems(notebook, sections_of(path))
    for cell in notebook.cells:
        if found := FORBIDDEN_WORDS.search(cell.source) or MACHINE_PATH.search(cell.source):
            yield f"not to be written in a notebook: {found[0]}"
        if cell.cell_type == "markdown":
            yield from link_problems(path, cell.source)


def sections_of(path):
    """The headings that a notebook has to have."""
    of_another_form = topic(path) in OF_ANOTHER_FORM
    if path.parent.name == "notebooks" or (path.parent.name == "electives" and not of_another_form):
        return LESSON_SECTIONS
    return FEWER_SECTIONS if of_another_form else SECTIONS


def shape_problems(notebook, sections):
    """The form of a notebook: a title, a set-up cell, and the sections in their order."""
    first = notebook.cells[0] if notebook.cells else None
    if first is None or first.cell_type != "markdown" or not first.source.startswith("# "):
        yield "the first cell has to be the title: '# ...'"
    cells = code_cells(notebook)
    if not cells or not re.search(
        r"import memlab\b.*(ImportError|ModuleNotFoundError)", cells[0].source, re.DOTALL
    ):
        yield (
            "the first code cell has to be the set-up: import memlab, and install it where the"
            " import fails"
        )
    prose = "\n".join(c.source for c in notebook.cells if c.cell_type == "markdown")
    prose = re.sub(r"^```.*?^```", "", prose, flags=re.MULTILINE | re.DOTALL)
    headings = iter(re.findall(r"^##+ +(.*)$", prose, flags=re.MULTILINE))
    for section in sections:
        if not any(section.lower() in heading.lower() for heading in headings):
            order = ", ".join(sections)
            yield f"no section '{section}', or not in its place; the order is: {order}"
            return


def link_problems(path, markdown):
    """Links to files of this repository lead somewhere."""
    for target in re.findall(r"\]\(([^)\s#]+)[^)]*\)|(?:src|href)=\"([^\"#]+)\"", markdown):
        target = "".join(target)
        if not re.match(r"[a-z]+:", target) and not (path.parent / target).exists():
            yield f"a link leads nowhere: {target}"


@pytest.mark.parametrize(
    "path", notebook_paths(ROOT), ids=lambda path: f"{path.parent.name}/{path.stem}"
)
def test_a_notebook_is_as_it_should_be(path):
    assert list(notebook_problems(path)) == []


def _set(**changes):
    """A change to the second code cell, the one with a figure."""
    return lambda nb: code_cells(nb)[1].update(**changes)


def _text_output(text):
    return lambda nb: code_cells(nb)[1].outputs.append(nbformat.v4.new_output("stream", text=text))


def _replace(old, new):
    def change(notebook):
        for cell in notebook.cells:
            cell.source = cell.source.replace(old, new)

    return change


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (_set(execution_count=3), "not executed in order"),
        (_set(execution_count=None), "not executed in order"),
        (_set(outputs=[]), "no figure"),
        (_replace("measure(build)", "measure(other)"), "older than its code"),
        (lambda nb: nb.metadata.pop("memlab"), "older than its code"),
        (lambda nb: nb.metadata.update(widgets={}), "widget state"),
        (lambda nb: nb.metadata.kernelspec.update(name="mine"), "python3"),
        (
            lambda nb: code_cells(nb)[1].outputs.append(nbformat.v4.new_output("error")),
            "is an error",
        ),
        (_text_output("a.py:3: FutureWarning: old"), "FutureWarning"),
        (_text_output('File "/home/me/a.py", line 3'), "path of a machine"),
        (_text_output("x" * MAX_NOTEBOOK_BYTES), "too heavy"),
        (_replace("# Title", "Title"), "has to be the title"),
        (
            lambda nb: nb.cells.insert(0, nbformat.v4.new_markdown_cell("Hello.")),
            "has to be the title",
        ),
        (_replace("## Proof", "## Evidence"), "no section 'Proof'"),
        (_replace("## Predict", "```\n## Predict\n```"), "no section 'Predict'"),
        (_replace("Words.", "This simply works."), "simply"),
        (_replace("Words.", "See [there](nowhere.md)."), "leads nowhere: nowhere.md"),
    ],
)
def test_what_is_wrong_in_a_notebook_is_found(good_tree, change, found):
    path = good_tree / "notebooks/in_depth/01_x.ipynb"
    assert list(notebook_problems(path)) == []
    notebook = nbformat.read(path, as_version=4)
    change(notebook)
    nbformat.write(notebook, path)
    problems = list(notebook_problems(path))
    assert len(problems) == 1 and found in problems[0], problems


def test_sections_out_of_order_are_found():
    notebook = good_notebook()
    predict, technique = (
        i for i, c in enumerate(notebook.cells) if re.match("## (Predict|The tech)", c.source)
    )
    wrong = copy.deepcopy(notebook)
    wrong.cells[predict], wrong.cells[technique] = wrong.cells[technique], wrong.cells[predict]
    assert list(shape_problems(notebook, SECTIONS)) == []
    assert len(list(shape_problems(wrong, SECTIONS))) == 1


def test_a_notebook_without_its_set_up_cell_is_found():
    notebook = good_notebook()
    del notebook.cells[1]
    assert ["set-up" in p for p in shape_problems(notebook, SECTIONS)] == [True]


# --- One source of dependencies -------------------------------------------------------------------

#: The rooms that are held to few packages by import-linter, and those packages.
FEW_PACKAGES = {
    "units": set(),
    "meters.allocator": set(),
    "ledger": {"numpy"},
    "techniques": {"torch"},
}

# Where a package is imported under another name than it is installed by.
INSTALLED_AS = {"sklearn": "scikit-learn", "PIL": "pillow", "IPython": "ipython"}
# Packages that come with a declared one and are part of what it is for.
COMES_WITH = {"ipython": "ipywidgets", "pillow": "matplotlib"}


def dependency_problems(root):
    groups = requirements(root)
    every = [r for lines in groups.values() for r in lines]
    supported = SpecifierSet(pyproject(root)["project"]["requires-python"])

    pinned, other = pins(root / "constraints.txt")
    yield from (f"constraints.txt: not a plain pin: {line}" for line in other)
    for r in every:
        version = pinned.get(canonicalize_name(r.name))
        if version is None:
            yield f"constraints.txt does not pin {r.name}"
        elif version not in r.specifier:
            yield (
                f"constraints.txt: {r.name}=={version} does not satisfy {r.specifier} of"
                " pyproject.toml"
            )

    colab, other = pins(root / "constraints-colab.txt")
    yield from (f"constraints-colab.txt: not a plain pin: {line}" for line in other)
    for r in groups[""]:
        version = colab.get(canonicalize_name(r.name))
        if version is None:
            yield f"constraints-colab.txt does not say which {r.name} Colab has"
        elif version not in r.specifier:
            yield f"Colab has {r.name} {version}; {r.specifier} would replace it there"
    if colab.get("torch") != pinned.get("torch"):
        yield "constraints-colab.txt and constraints.txt have different versions of torch"

    conda = yaml.safe_load((root / "environment.yml").read_text(encoding="utf-8"))
    python, *rest = conda["dependencies"]
    by_pip = {"pip": ["--constraint constraints.txt", "--editable .[course]"]}
    # A specifier set has no order of its own.
    if SpecifierSet(str(python).removeprefix("python")) != supported or rest != ["pip", by_pip]:
        yield (
            f"environment.yml has {[python, *rest]}; to follow pyproject.toml it has to have"
            f" {[f'python{supported}', 'pip', by_pip]}"
        )

    makefile = (root / "Makefile").read_text(encoding="utf-8")
    low, high = re.search(r"\(3, (\d+)\) <= \S+ <= \(3, (\d+)\)", makefile).groups()
    if {m for m in range(30) if f"3.{m}" in supported} != set(range(int(low), int(high) + 1)):
        yield f"the Makefile takes Python 3.{low} to 3.{high}; pyproject.toml says {supported}"


def import_problems(root):
    """What the notebooks import is declared. deptry (`make lint`) looks at the rest."""
    groups = requirements(root)
    declared = {canonicalize_name(r.name) for r in groups[""] + groups["course"]}
    for path in notebook_paths(root):
        cells = code_cells(nbformat.read(path, as_version=4))
        # What only a notebook understands (%pip, !ls) is no Python: keep its indentation.
        source = "\n".join(re.sub(r"(?m)^(\s*)[%!].*", r"\1pass", cell.source) for cell in cells)
        for module in sorted(third_party(ast.parse(source))):
            package = canonicalize_name(INSTALLED_AS.get(module, module))
            if not {package, COMES_WITH.get(package)} & declared:
                yield f"{path.relative_to(root)} imports {module}, which is not declared"


def contract_problems(root):
    """A room that is held to few packages may import none of the other declared ones."""
    declared = {r.name for r in requirements(root)[""]}
    for contract in pyproject(root)["tool"]["importlinter"]["contracts"]:
        if contract["type"] == "forbidden":
            (room,) = contract["source_modules"]
            allowed = FEW_PACKAGES[room.removeprefix("memlab.")]
            if missing := declared - allowed - set(contract["forbidden_modules"]):
                yield f"the contract of {room} does not forbid {', '.join(sorted(missing))}"


def version_problems(root):
    version = pyproject(root)["project"]["version"]
    citation = yaml.safe_load((root / "CITATION.cff").read_text(encoding="utf-8"))
    if str(citation["version"]) != version:
        yield f"CITATION.cff has version {citation['version']}, pyproject.toml {version}"
    package = (root / "memlab/__init__.py").read_text(encoding="utf-8")
    if f'__version__ = "{version}"' not in package:
        yield f"memlab/__init__.py has another version than pyproject.toml, {version}"


def test_dependencies_have_one_source():
    assert list(dependency_problems(ROOT)) == []


@pytest.mark.parametrize(
    ("file", "old", "new", "found"),
    [
        ("constraints.txt", "numpy==2.4", "numpy==1.9", "does not satisfy"),
        ("constraints.txt", "numpy==2.4\n", "", "does not pin numpy"),
        ("constraints.txt", "numpy==2.4", "numpy==2.4\n--find-links wheels", "not a plain pin"),
        ("constraints.txt", "torch==2.13.0", "torch==2.13.0+cpu", "not a plain pin"),
        ("constraints-colab.txt", "numpy==2.1", "numpy==2.0", "would replace it"),
        ("constraints-colab.txt", "torch==2.13.0", "torch==2.12.0", "different versions of torch"),
        ("pyproject.toml", '"torch', '"tqdm", "torch', "does not pin tqdm"),
        ("environment.yml", "python>=3.11,<3.14", "python>=3.12,<3.14", "environment.yml has"),
        ("environment.yml", "  - pip:", "  - numpy\n  - pip:", "environment.yml has"),
        ("Makefile", "(3, 13)", "(3, 14)", "the Makefile takes Python 3.11 to 3.14"),
    ],
)
def test_drifting_dependencies_are_found(good_tree, file, old, new, found):
    assert list(dependency_problems(good_tree)) == []
    edit(good_tree / file, old, new)
    problems = list(dependency_problems(good_tree))
    assert problems and found in problems[0], problems


def test_imports_of_the_notebooks_are_declared():
    assert list(import_problems(ROOT)) == []


def test_an_undeclared_import_of_a_notebook_is_found(good_tree):
    assert list(import_problems(good_tree)) == []
    tried = "try:\\n    import jax\\nexcept ImportError:\\n    from scipy import stats"
    edit(good_tree / "notebooks/in_depth/01_x.ipynb", "measure(build)", tried)
    assert list(import_problems(good_tree)) == [
        "notebooks/in_depth/01_x.ipynb imports scipy, which is not declared"
    ]


def test_the_rooms_of_few_packages_are_held_to_them():
    assert list(contract_problems(ROOT)) == []


def test_a_new_dependency_that_no_contract_forbids_is_found(good_tree):
    contract = (
        '[[tool.importlinter.contracts]]\ntype = "forbidden"\nsource_modules = ["memlab.{}"]\n'
        "forbidden_modules = [{}]\n"
    )
    path = good_tree / "pyproject.toml"
    contracts = contract.format("ledger", '"torch"') + contract.format("techniques", "")
    write(path, path.read_text(encoding="utf-8") + contracts)
    problem = "the contract of memlab.techniques does not forbid numpy"
    assert list(contract_problems(good_tree)) == [problem]


def test_versions_agree():
    assert list(version_problems(ROOT)) == []


@pytest.mark.parametrize("file", ["CITATION.cff", "memlab/__init__.py"])
def test_another_version_is_found(good_tree, file):
    assert list(version_problems(good_tree)) == []
    edit(good_tree / file, "0.1.0", "0.2.0")
    assert len(list(version_problems(good_tree))) == 1


# --- Texts ----------------------------------------------------------------------------------------


def text_problems(root):
    for file, text in text_files(root):
        for pattern, what in (
            (MACHINE_PATH, "a path of a machine"),
            (REGISTRY, "the host of a package registry"),
            (FORBIDDEN_WORDS, "not to be written"),
        ):
            for found in pattern.finditer(text):
                yield f"{file}:{text.count(chr(10), 0, found.start()) + 1}: {what}: {found[0]}"
        if file.startswith("memlab/") and (found := DEPRECATED.search(text)):
            yield f"{file}: deprecated: {found[0]}"
        if file.endswith(".md"):
            yield from (f"{file}: {problem}" for problem in link_problems(root / file, text))
            yield from (f"{file}: {problem}" for problem in command_problems(root, text))


def command_problems(root, markdown):
    """Every `make something` in a text is a target of the Makefile."""
    makefile = (root / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, flags=re.MULTILINE))
    for name in re.findall(r"(?:^|`|\$ )make ([a-z][a-z-]*)", markdown, flags=re.MULTILINE):
        if name not in targets:
            yield f"there is no 'make {name}'"


def address_problems(root):
    """The repository's public address is set in pyproject.toml; everything else that names it
    repeats that.
    """
    address = pyproject(root)["project"]["urls"]["Repository"]
    owner = address.removeprefix("https://github.com/").removesuffix("/memlab")
    notebooks = [
        (str(p.relative_to(root)), p.read_text(encoding="utf-8")) for p in notebook_paths(root)
    ]
    for file, text in [*text_files(root), *notebooks]:
        named = set(re.findall(r"github(?:\.com)?/([\w.-]+)/memlab\b", text))
        if owner == "OWNER" and "\nrepository-code:" in text:
            yield f"{file} links to the placeholder: run `make address`"
        for other in sorted(named - {owner}):
            yield f"{file} names {other}'s repository, pyproject.toml {owner}'s: run `make address`"


def test_texts_are_as_they_should_be():
    assert list(text_problems(ROOT)) == []


@pytest.mark.parametrize(
    ("file", "line", "found"),
    [
        ("README.md", "See /home/me/notes.", "path of a machine"),
        ("constraints.txt", "# from https://registry.example.org/simple/numpy", "package registry"),
        ("memlab/ledger.py", "# This simply adds.", "simply"),
        ("memlab/ledger.py", "import torch.cuda.amp", "deprecated"),
        ("README.md", "[Start](notebooks/02_y.ipynb)", "leads nowhere"),
        ("README.md", "Run `make coffee`.", "no 'make coffee'"),
        ("README.md", "    \nmake coffee\n", "no 'make coffee'"),
    ],
)
def test_what_is_wrong_in_a_text_is_found(good_tree, file, line, found):
    assert list(text_problems(good_tree)) == []
    write(good_tree / file, (good_tree / file).read_text(encoding="utf-8") + line + "\n")
    [problem] = text_problems(good_tree)
    assert found in problem


def test_the_readme_gives_the_commands():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [c for c in ("make lab", "make test", "make measure") if c not in readme] == []


def test_the_address_has_one_source():
    assert list(address_problems(ROOT)) == []


def test_another_address_is_found(good_tree):
    assert list(address_problems(good_tree)) == []
    edit(good_tree / "README.md", "OWNER/memlab", "somebody/memlab")
    edit(good_tree / "CITATION.cff", "# repository-code", "repository-code")
    assert ["make address" in p for p in address_problems(good_tree)] == [True, True]


def test_make_address_writes_the_address_everywhere(good_tree):
    edit(good_tree / "pyproject.toml", "OWNER/memlab", "somebody/memlab")
    assert len(list(address_problems(good_tree))) == 3  # README.md, CITATION.cff and the notebook
    runpy.run_path(str(ROOT / "tools/address.py"))["main"](good_tree)
    assert list(address_problems(good_tree)) == []
    assert list(notebook_problems(good_tree / "notebooks/in_depth/01_x.ipynb")) == []
    citation = (good_tree / "CITATION.cff").read_text(encoding="utf-8")
    assert citation.endswith("\nrepository-code: https://github.com/somebody/memlab\n")


# --- What is generated ----------------------------------------------------------------------------


def test_the_generated_tables_equal_the_records():
    # tests/test_report.py shows that `report` finds what differs.
    assert documents.generate(ROOT, check=True) == []


# --- A tree where every rule holds ----------------------------------------------------------------


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def edit(path, old, new):
    text = path.read_text(encoding="utf-8")
    assert old in text, f"{old!r} is not in {path.name}: this test would change nothing"
    write(path, text.replace(old, new))


def good_notebook():
    new = nbformat.v4
    figure = new.new_output("display_data", data={"image/png": "AAAA", "text/plain": "<Figure>"})
    install = "%pip install -q git+https://github.com/OWNER/memlab"
    set_up = f"try:\n    import memlab\nexcept ImportError:\n    {install}"
    notebook = new.new_notebook(
        metadata={"kernelspec": {"name": "python3", "display_name": "Python 3"}}
    )
    notebook.cells = [
        new.new_markdown_cell("# Title\n\nWords."),
        new.new_code_cell(set_up, execution_count=1),
        *(new.new_markdown_cell(f"## {name}") for name in SECTIONS),
        new.new_code_cell("measure(build)", execution_count=2, outputs=[figure]),
    ]
    notebook.metadata["memlab"] = {"source_hash": source_hash(notebook)}
    return notebook


@pytest.fixture
def good_tree(tmp_path):
    """The smallest repository in which every rule holds."""
    files = {
        "README.md": "[The repository](https://github.com/OWNER/memlab). Run `make lab`.\n",
        "CITATION.cff": "version: 0.1.0\n# repository-code: https://github.com/OWNER/memlab\n",
        "Makefile": (
            "SUPPORTED := sys.exit(not (3, 11) <= version <= (3, 13))\nlab:\n\tjupyter lab\n"
        ),
        "constraints.txt": "# CI\nnumpy==2.4\npytest==9.0\ntorch==2.13.0\n",
        "constraints-colab.txt": "# Colab\nnumpy==2.1\ntorch==2.13.0\n",
        "environment.yml": (
            "dependencies:\n  - python>=3.11,<3.14\n  - pip\n  - pip:\n"
            "      - --constraint constraints.txt\n      - --editable .[course]\n"
        ),
        "pyproject.toml": (
            '[project]\nversion = "0.1.0"\nrequires-python = ">=3.11,<3.14"\n'
            'dependencies = ["torch>=2.11", "numpy>=2.1"]\n'
            'optional-dependencies = { course = [], dev = ["pytest"] }\n'
            'urls = { Repository = "https://github.com/OWNER/memlab" }\n'
        ),
        "memlab/__init__.py": '__version__ = "0.1.0"\n',
        "memlab/ledger.py": "import numpy\n",
        "memlab/meters/cpu.py": "import torch\n",
        "memlab/techniques/x.py": "from torch import nn\n",
        "memlab/workloads/gpt.py": "from . import text\n",
        "tests/test_ledger.py": "import pytest\n",
        "tests/meters/test_cpu.py": "",
        "tests/techniques/test_x.py": "",
        "tests/workloads/test_gpt.py": "",
    }
    for file, text in files.items():
        write(tmp_path / file, text)
    (tmp_path / "notebooks/in_depth").mkdir(parents=True)
    nbformat.write(good_notebook(), tmp_path / "notebooks/in_depth/01_x.ipynb")
    return tmp_path
