"""Grids through real executors, and what can happen to them: a killed worker, two processes at once, a full disk."""
import json, multiprocessing, os, signal, subprocess, sys, time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from kd_arbitrary.experiment import Run, execute, now
from kd_arbitrary.grids import smoke
from kd_arbitrary.records import _attempt, grid_status, read_records, run_grid

QUICK = dict(n=300, epochs=1, batch_size=64)
GRID = [replace(run, **QUICK) for run in smoke()]


@pytest.fixture(scope="module")
def reference(root, tmp_path_factory):
    "The records of the grid, done in this process."
    return run_grid(GRID, tmp_path_factory.mktemp("reference"), root=root, threads=1, show=False)


def outcome(records): return [(r["key"], r["status"], r["results"]) for r in records]


@pytest.fixture(scope="module")
def pool():
    "Two worker processes; the second test that has them kills one."
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as executor: yield executor


def test_a_process_pool_does_the_same(root, reference, tmp_path, pool):
    records = run_grid(GRID, tmp_path, root=root, executor=pool, threads=1, show=False)
    assert outcome(records) == outcome(reference)
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file()) == sorted(f"{run.key}.json" for run in GRID)


def test_a_killed_worker_loses_only_what_it_was_doing(root, tmp_path, pool):
    long = Run(target="digits", source="strokes", n=500, epochs=40, batch_size=64)
    pool.submit(_kill_when, tmp_path / ".work" / long.key / "checkpoint.safetensors")
    with pytest.warns(UserWarning, match="1 runs were lost"):
        records = run_grid([GRID[0], long], tmp_path, root=root, executor=pool, threads=1, show=False)
    pool.shutdown()                                                                      # the other worker is stopped too
    assert [r["key"] for r in records] == [GRID[0].key] and grid_status([long], tmp_path) == {long.key: "not run"}
    assert (tmp_path / ".work" / long.key / "checkpoint.safetensors").exists()
    again, = run_grid([long], tmp_path, root=root, threads=1, show=False)
    whole = execute(long, root=root, show=False)
    assert [h["loss"] for h in again["history"]] == [h["loss"] for h in whole["history"]] and again["results"]["accuracy"] == whole["results"]["accuracy"]


def _kill_when(path):
    "Die as soon as the file exists; in a worker, this breaks the pool."
    while not path.exists(): time.sleep(0.02)
    os.kill(os.getpid(), signal.SIGKILL)


def test_dask_does_the_same(root, reference, tmp_path):
    distributed = pytest.importorskip("distributed")
    with distributed.Client(n_workers=2, threads_per_worker=1, dashboard_address=None) as client:
        records = run_grid(GRID, tmp_path, root=root, executor=client.get_executor(), threads=1, show=False)
    assert outcome(records) == outcome(reference)


def test_two_processes_share_a_grid(root, tmp_path):
    runs = [replace(GRID[0], seed=seed) for seed in range(8)]
    code = ("import sys, json, torch; from kd_arbitrary.experiment import Run; from kd_arbitrary.records import run_grid; torch.set_num_threads(2)\n"
            "folder, root, *runs = sys.argv[1:]; run_grid([Run(**json.loads(r)) for r in runs], folder, root=root, show=False)")
    other = subprocess.Popen([sys.executable, "-c", code, str(tmp_path), str(root), *(json.dumps(asdict(run)) for run in runs)])
    while not any((tmp_path / ".work").glob("*.lock")) and other.poll() is None: time.sleep(0.01)
    run_grid(runs[::-1], tmp_path, root=root, show=False)                                # from the other end
    assert other.wait() == 0
    records = run_grid(runs, tmp_path, root=root, show=False)
    assert [r["status"] for r in records] == ["done"] * 8 and not list(tmp_path.glob("*.damaged"))
    assert {r["machine"]["threads"] for r in records} == {1, 2}                           # both had a part in it


def test_a_full_disk_leaves_what_was_there(root, tmp_path, monkeypatch):
    done, lost = GRID[:2]
    run_grid([done], tmp_path, root=root, show=False)
    before = {p: p.read_bytes() for p in tmp_path.glob("*.json")}
    real = os.replace
    def full(source, target):
        if Path(target).name == f"{lost.key}.json": raise OSError(28, "No space left on device")
        return real(source, target)
    monkeypatch.setattr(os, "replace", full)
    with pytest.warns(UserWarning, match="No space left on device"): run_grid([done, lost], tmp_path, root=root, show=False)
    assert {p: p.read_bytes() for p in tmp_path.glob("*.json")} == before
    assert grid_status([done, lost], tmp_path) == {done.key: "done", lost.key: "not run"}
    monkeypatch.undo()
    assert [r["status"] for r in run_grid([done, lost], tmp_path, root=root, show=False)] == ["done", "done"]


def test_a_failure_is_recorded_and_left_to_the_next_start(root, tmp_path):
    run = replace(GRID[0], source="array(path='nowhere.npz')")
    record, = run_grid([run], tmp_path, root=root, show=False)
    assert (record["status"], record["error"]["type"]) == ("failed", "FileNotFoundError") and "nowhere.npz" in record["error"]["message"]
    args = (record["config"], tmp_path, tmp_path / ".work", root, "cpu", None)
    assert _attempt(*args, "2000-01-01", False) == "failed" and read_records(tmp_path) == [record]    # it failed after that start
    assert _attempt(*args, now(), False) == "failed" and read_records(tmp_path)[0]["finished"] > record["finished"]
