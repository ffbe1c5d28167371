"""What must hold between the notebooks and the library."""
import ast, json, os, re, shutil, subprocess, sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "tools"))
from run_notebooks import mark

LIBRARY = ROOT / "kd_arbitrary"
NOTEBOOKS = [path for path in sorted((ROOT / "nbs").rglob("*.ipynb")) if path.parent.name[0] != "."]
GROUND = ("core", "html", "storage")  # below all rooms
ROOMS = ("pictures", "teachers", "transfer", "students", "studies")  # imports run down this list, and down the numbers within a room


def modules() -> list[str]:
    "The library's modules in the order in which they may import each other."
    exports = lambda path: (found := re.search(r"#\| default_exp ([\w.]+)", path.read_text())) and found[1]
    top = sorted((ROOT / "nbs").glob("[0-9]*.ipynb"))
    below = [path for path in top if exports(path) in GROUND]
    rooms = [path for room in ROOMS for path in sorted((ROOT / "nbs" / room).glob("[0-9]*.ipynb"))]
    return [module for path in (*below, *rooms, *top[len(below):]) if (module := exports(path))]


MODULES = modules()


@pytest.fixture
def copy(tmp_path):
    "A copy of the notebooks beside an empty library, and a way to run an nbdev command in it."
    shutil.copy(ROOT / "settings.ini", tmp_path)
    shutil.copytree(ROOT / "nbs", tmp_path / "nbs", ignore=shutil.ignore_patterns(".*"))
    (tmp_path / LIBRARY.name).mkdir()
    plain = {key: value for key, value in os.environ.items() if key != "IN_TEST"}   # it stops nbdev_export
    def run(code):
        subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=plain, check=True, capture_output=True)
    return tmp_path, run


def imports(module: str) -> list[tuple[str, list[str]]]:
    "What a module imports: (module, names); nbdev writes the library's own modules with dots, here they are in full."
    found, home = [], [LIBRARY.name, *module.split(".")]
    for node in ast.walk(ast.parse((LIBRARY / f"{module.replace('.', '/')}.py").read_text())):
        if isinstance(node, ast.Import): found += [(alias.name, []) for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            source = ".".join((home[:-node.level] if node.level else []) + [node.module] * bool(node.module))
            found.append((source, [alias.name for alias in node.names]))
    return found


def test_library_is_the_export_of_the_notebooks(copy):
    folder, run = copy
    run("from nbdev.doclinks import nbdev_export; nbdev_export()")
    texts = lambda top: {path.relative_to(top).as_posix(): path.read_text() for path in top.rglob("*.py")}
    exported, library = texts(folder / LIBRARY.name), texts(LIBRARY)
    assert exported.keys() == library.keys(), "run nbdev_export; delete modules whose notebook is gone"
    assert [name for name in exported if exported[name] != library[name]] == [], "run nbdev_export"


def test_notebooks_are_clean(copy):
    folder, run = copy
    run("from nbdev.clean import nbdev_clean; nbdev_clean()")
    changed = [p.name for p in NOTEBOOKS if p.read_bytes() != (folder / p.relative_to(ROOT)).read_bytes()]
    assert changed == [], "run nbdev_clean"


def test_outputs_name_no_machine():
    private = re.compile(re.escape(str(ROOT)) + r"/|/home/\w|/root/|/Users/\w|site-packages/|[A-Z]:\\\\Users")
    def texts(path):
        outputs = [output for cell in json.loads(path.read_text())["cells"] for output in cell.get("outputs", [])]
        return json.dumps([output.get("data", output) | {"image/png": None} for output in outputs])
    assert [path.name for path in NOTEBOOKS if private.search(texts(path))] == [], "run tools/run_notebooks.py"


@pytest.mark.parametrize("path", [p for p in sorted(LIBRARY.rglob("*.py")) if p.name != "_modidx.py"], ids=lambda p: p.stem)
def test_lines_fit_beside_another_file(path):
    lines = [line for line in path.read_text().split("\n") if not line.startswith("__all__")]   # nbdev breaks that one late
    assert [line for line in lines if len(line) > 120] == [], "split it: one idea a line"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.relative_to(ROOT / "nbs").as_posix())
def test_outputs_are_those_of_their_cells(path):
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code" and cell["outputs"]]
    stale = [cell["id"] for cell in cells if cell["metadata"].get("ran") != mark(cell["source"])]
    assert stale == [], "the code was changed after it ran: python tools/run_notebooks.py (with --flags 'slow cuda' for cells that tests skip)"


def test_no_two_cells_share_a_name():
    ids = {path.name: [cell["id"] for cell in json.loads(path.read_text())["cells"]] for path in NOTEBOOKS}
    assert {name: [i for i in set(own) if own.count(i) > 1] for name, own in ids.items() if len(set(own)) < len(own)} == {}


def test_notebooks_have_names_that_sort():
    wrong = [p.name for p in NOTEBOOKS if p.name != "index.ipynb" and not re.fullmatch(r"\d\d_[a-z0-9_]+\.ipynb", p.name)]
    assert wrong == [], "two digits say the order of reading, no letters"
    for room in {path.parent for path in NOTEBOOKS}:
        numbers = sorted(int(path.name[:2]) for path in NOTEBOOKS if path.parent == room and path.name != "index.ipynb")
        assert numbers == list(range(numbers[0], numbers[0] + len(numbers))), f"the numbers in {room.name} have a hole or a double"


@pytest.mark.parametrize("module", MODULES)
def test_imports_run_one_way(module):
    found = imports(module)
    own = [name for source, names in found for name in names if source == LIBRARY.name]
    own += [source.split(".", 1)[1] for source, _ in found if source.startswith(f"{LIBRARY.name}.")]
    left = ["__version__", *MODULES[:MODULES.index(module)]]
    assert [name for name in own if name not in left] == [], "a module imports only modules before it"
    assert [source for source, names in found if "*" in names] == [], "import by name"
    tools = {"nbdev", "fastcore", "execnb", "IPython", "pytest"} & {source.split(".")[0] for source, _ in found}
    assert tools == set(), "the library must run without the tools that build it"


def code_lines(function: ast.AST, text: str) -> int:
    "Lines of a function's body: no signature, no docstring, no comment, no blank line."
    body = function.body[ast.get_docstring(function) is not None:]
    lines = text.split("\n")[body[0].lineno - 1:function.end_lineno] if body else []
    return sum(bool(line.strip()) and not line.strip().startswith("#") for line in lines)


@pytest.mark.parametrize("module", MODULES)
def test_functions_fit_in_one_look(module):
    text = (LIBRARY / f"{module.replace('.', '/')}.py").read_text()
    functions = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)]
    long = {f.name: n for f in functions if (n := code_lines(f, text)) > 25}
    assert long == {}, "a function has at most 25 lines of code: give its steps names"


def test_import_is_light():
    "What takes a second to import waits until it is used: help and lists are there at once."
    code = ("import sys, kd_arbitrary.all, kd_arbitrary.cli\n"
            "print(*{'torchvision', 'torch._dynamo', 'seaborn', 'scipy', 'sklearn', 'torchmetrics', 'distributed'} & set(sys.modules))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [], "import it in the function that uses it"
