"""What must hold between the notebooks and the library."""
import ast, json, os, re, shutil, subprocess, sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = ROOT / "kd_arbitrary"
NOTEBOOKS = [path for path in sorted((ROOT / "nbs").rglob("*.ipynb")) if path.parent.name[0] != "."]
ROOMS = [path.stem.split("_", 1)[1] for path in sorted((ROOT / "nbs").glob("[0-9][0-9]*_*.ipynb"))]


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
    "What a module imports: (module, names); nbdev writes the library's own modules with a dot, here they are in full."
    found = []
    for node in ast.walk(ast.parse((LIBRARY / f"{module}.py").read_text())):
        if isinstance(node, ast.Import): found += [(alias.name, []) for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            source = ".".join([LIBRARY.name] * node.level + [node.module] * bool(node.module))
            found.append((source, [alias.name for alias in node.names]))
    return found


def test_library_is_the_export_of_the_notebooks(copy):
    folder, run = copy
    run("from nbdev.doclinks import nbdev_export; nbdev_export()")
    exported = {path.name: path.read_text() for path in (folder / LIBRARY.name).glob("*.py")}
    library = {path.name: path.read_text() for path in LIBRARY.glob("*.py")}
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


@pytest.mark.parametrize("module", ROOMS)
def test_imports_run_one_way(module):
    found = imports(module)
    own = [name for source, names in found for name in names if source == LIBRARY.name]
    own += [source.split(".", 1)[1] for source, _ in found if source.startswith(f"{LIBRARY.name}.")]
    left = ["__version__", *ROOMS[:ROOMS.index(module)]]
    assert [name for name in own if name not in left] == [], "a module imports only modules to its left"
    assert [source for source, names in found if "*" in names] == [], "import by name"
    tools = {"nbdev", "fastcore", "execnb", "IPython", "pytest"} & {source.split(".")[0] for source, _ in found}
    assert tools == set(), "the library must run without the tools that build it"
