"""Run notebooks under the rules of nbdev_test and keep their outputs, cleaned for committing.

    python tools/run_notebooks.py                       # all notebooks
    python tools/run_notebooks.py nbs/pictures/01_noise.ipynb    # some
    python tools/run_notebooks.py --flags "slow cuda"   # also the cells that tests skip

A skipped cell keeps the output it had. A notebook that fails is left as it was. Beside an output stands, as `ran`
in the cell's metadata, a hash of the code that made it, so that a test can tell outputs older than their cells.
"""
import argparse, hashlib, multiprocessing, os, re, sys, tempfile, time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
os.environ.setdefault("MPLBACKEND", "agg")

import nbdev.test
from execnb.nbio import read_nb, write_nb
from execnb.shell import CaptureShell
from nbdev.clean import nbdev_clean
from nbdev.config import get_config
from nbdev.doclinks import nbglob


def places() -> list[tuple[str, str]]:
    "What is particular to this machine, as (pattern, replacement)."
    data = Path(os.environ.get("KD_ARBITRARY_DATA", ROOT / "data")).expanduser().resolve()
    shown = [(data, "data"), (ROOT, "."), (Path(sys.prefix), "python"), (Path.home(), "~")]
    exact = [(re.escape(str(path)) + r"(?=[/'\"\s:,)]|$)", name) for path, name in shown]
    return [(re.escape(tempfile.gettempdir()) + r"/tmp\w+", "/tmp/folder")] + exact + [(r"(?<![\w.])\./(?=\w)", "")]


def tidy(output: dict) -> dict | None:
    "The output without machine paths; None where it does not belong into a committed notebook."
    if output.get("name") == "stderr" or any("widget" in kind for kind in output.get("data", {})): return None
    def clean(text):
        joined = "".join(text)
        for pattern, name in places(): joined = re.sub(pattern, name, joined)
        return joined.splitlines(keepends=True)
    if "text" in output: output["text"] = clean(output["text"])
    for kind in output.get("data", {}):
        if kind.startswith("text/"): output["data"][kind] = clean(output["data"][kind])
    return output


def mark(source: str | list[str]) -> str:
    "Eight hex digits that change when a cell's code does."
    return hashlib.sha256("".join(source).encode()).hexdigest()[:8]


class KeepingShell(CaptureShell):
    "The shell of nbdev_test, with the outputs of the cells that ran kept in `ran`; figures at one pixel a dot."
    ran: dict = {}

    def __init__(self, path=None): super().__init__(path, mpl_format="png")

    def cell(self, cell, **kwargs):
        if cell.cell_type != "code": return
        cell.outputs = []
        super().cell(cell, **kwargs)
        warned = "".join("".join(output["text"]) for output in cell.outputs if output.get("name") == "stderr")
        for line in warned.split("\n"):
            if line.strip() and "\r" not in line: print(f"[{cell.id}] {line}", file=sys.stderr)
        self.ran[cell.id] = [kept for output in cell.outputs if (kept := tidy(output))]


def run(path: Path, flags: str) -> bool:
    "Run one notebook; write its outputs if every cell passed."
    nbdev.test.CaptureShell, KeepingShell.ran = KeepingShell, {}
    start = time.time()
    passed, _ = nbdev.test.test_nb(path, skip_flags=get_config().tst_flags.split(), force_flags=flags.split(),
                                   basepath=ROOT)
    if passed and KeepingShell.ran:
        notebook = read_nb(path)
        for cell in notebook.cells:
            if cell.id not in KeepingShell.ran: continue
            cell.outputs = KeepingShell.ran[cell.id]
            cell.metadata = {k: v for k, v in cell.metadata.items() if k != "ran"} | (dict(ran=mark(cell.source)) if cell.outputs else {})
        write_nb(notebook, path)
        nbdev_clean(str(path))
    size = path.stat().st_size / 1024
    state = "failed" if not passed else "ok" if KeepingShell.ran else "skipped (skip_exec)"
    print(f"{os.path.relpath(path, ROOT)}: {state}, {time.time() - start:.1f} s, {size:.0f} kB", flush=True)
    return passed


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebooks", nargs="*", type=Path, help="notebooks to run; all of them when none is given")
    parser.add_argument("--flags", default="", help="cells to run that tests skip, for example 'slow cuda'")
    args = parser.parse_args()
    paths = [path.resolve() for path in args.notebooks]
    os.chdir(ROOT)
    paths = paths or sorted(Path(path).resolve() for path in nbglob())
    with multiprocessing.Pool(1, maxtasksperchild=1) as pool:    # a fresh process each: no seed or module leaks over
        passed = pool.starmap(run, [(path, args.flags) for path in paths], chunksize=1)
    sys.exit(0 if all(passed) else 1)


if __name__ == "__main__": main()
