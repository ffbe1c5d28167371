"""Every notebook is a test, run under the rules of nbdev_test.

    pytest                                # everything, in as many processes as there are cores
    pytest nbs/pictures/01_noise.ipynb    # one notebook, in this process
    pytest --nb-flags "slow cuda"         # also the cells that are skipped otherwise
"""
import contextlib, copy, gc, io, os
from pathlib import Path

import pytest

os.environ.setdefault("MPLBACKEND", "agg")
os.environ.setdefault("OMP_NUM_THREADS", "1")    # processes share the cores, not threads
ROOT = Path(__file__).parent


def pytest_addoption(parser):
    parser.addoption("--nb-flags", default="", help="run the notebook cells with these flags too, e.g. 'slow cuda'")


def pytest_xdist_auto_num_workers(config):
    "A single file begins at once, in this process; of more, each file goes to one process a core (`-n auto --dist loadfile`)."
    asked = {arg.split("::")[0] for arg in config.args}
    return 0 if len(asked) == 1 and all(Path(config.invocation_params.dir, name).is_file() for name in asked) else None


def pytest_collect_file(file_path, parent):
    hidden = any(part[0] in "._" for part in file_path.relative_to(ROOT).parts)
    if file_path.suffix == ".ipynb" and not hidden and not (file_path.parent / ".notest").exists():
        return NotebookFile.from_parent(parent, path=file_path)


class NotebookFile(pytest.File):
    "A notebook: one test."
    def collect(self): yield NotebookTest.from_parent(self, name="notebook")


@contextlib.contextmanager
def own_additions():
    "What is added to registries inside, own definitions and changed facts, a shorter recipe say, is gone afterwards."
    import kd_arbitrary.all  # noqa: F401, every registry exists
    from kd_arbitrary.core import Registry
    before = [(r, dict(r), copy.deepcopy(r.facts)) for r in gc.get_objects() if isinstance(r, Registry)]
    try: yield
    finally:
        for registry, things, facts in before:
            registry.clear()
            registry.update(things)
            registry.facts = facts


class NotebookTest(pytest.Item):
    "All cells of a notebook in order, without those whose flag is in `tst_flags`."
    def runtest(self):
        from nbdev.config import get_config
        from nbdev.test import test_nb as run_notebook
        skip, force = get_config(path=ROOT).tst_flags.split(), self.config.getoption("--nb-flags").split()
        with contextlib.redirect_stderr(io.StringIO()) as errors, own_additions():
            passed, seconds = run_notebook(self.path, skip_flags=skip, force_flags=force, basepath=ROOT)
        if not passed: raise NotebookFailed(errors.getvalue())
        if seconds == 0: pytest.skip("skip_exec: true")

    def repr_failure(self, excinfo):
        return str(excinfo.value) if excinfo.errisinstance(NotebookFailed) else super().repr_failure(excinfo)

    def reportinfo(self): return self.path, None, str(self.path.relative_to(ROOT))


class NotebookFailed(Exception):
    "A cell raised; the message is nbdev's traceback with the number of the cell."
