"""Grids through real executors, and what can happen to them: a killed worker, two processes at once, a full disk."""
import json, multiprocessing, os, signal, subprocess, sys, time, warnings
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from kd_arbitrary.experiment import Run, _attempt, execute, grid_status, now, read_records, run_grid, smoke

QUICK = dict(n=300, epochs=1, batch_size=64)
GRID = [replace(run, **QUICK) for run in smoke()]


def pool(n=2): return ProcessPoolExecutor(n, mp_context=multiprocessing.get_context("spawn"))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    "A data root with a teacher in it."
    root = tmp_path_factory.mktemp("root")
    execute(GRID[0], root=root, show=False)
    return root


@pytest.fixture(scope="module")
def reference(root, tmp_path_factory):
    "The records of the grid, done in this process."
    return run_grid(GRID, tmp_path_factory.mktemp("reference"), root=root, threads=1, show=False)


def outcome(records): return [(r["key"], r["status"], r["results"]) for r in records]


def test_a_process_pool_does_the_same(root, reference, tmp_path):
    with pool() as executor: records = run_grid(GRID, tmp_path, root=root, executor=executor, threads=1, show=False)
    assert outcome(records) == outcome(reference)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(f"{run.key}.json" for run in GRID)


def test_dask_does_the_same(root, reference, tmp_path):
    distributed = pytest.importorskip("distributed")
    with distributed.Client(n_workers=2, threads_per_worker=1, dashboard_address=None) as client:
        records = run_grid(GRID, tmp_path, root=root, executor=client.get_executor(), threads=1, show=False)
    assert outcome(records) == outcome(reference)


def test_a_killed_worker_loses_only_what_it_was_doing(root, reference, tmp_path):
    long = [Run(target="digits", source="strokes", n=500, epochs=400, batch_size=64, seed=seed) for seed in range(2)]
    with pool() as executor:
        executor.submit(_kill_when, tmp_path / ".work", [run.key for run in long])
        with pytest.warns(UserWarning, match="runs were lost"):
            records = run_grid([GRID[0], *long], tmp_path, root=root, executor=executor, threads=1, show=False)
    assert set(grid_status(long, tmp_path).values()) == {"not run"} and all(r["status"] == "done" for r in records)
    assert any((tmp_path / ".work").rglob("checkpoint.safetensors")) or not records      # they go on from here
    assert outcome(run_grid(GRID, tmp_path, root=root, threads=1, show=False)) == outcome(reference)


def _kill_when(folder, keys):
    "Die as soon as one of the runs has a checkpoint; in a worker, this breaks the pool."
    while not any((folder / key / "checkpoint.safetensors").exists() for key in keys): time.sleep(0.05)
    os.kill(os.getpid(), signal.SIGKILL)


def test_two_processes_share_a_grid(root, reference, tmp_path):
    code = ("import sys, json, torch; from kd_arbitrary.experiment import Run, run_grid; torch.set_num_threads(1)\n"
            "folder, root, *runs = sys.argv[1:]; run_grid([Run(**json.loads(r)) for r in runs], folder, root=root, show=False)")
    runs = [json.dumps(r["config"]) for r in reference]
    both = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path), str(root), *runs]) for _ in range(2)]
    assert [p.wait() for p in both] == [0, 0]
    written = {p: p.stat().st_mtime_ns for p in tmp_path.glob("*.json")}
    assert outcome(run_grid(GRID, tmp_path, root=root, show=False)) == outcome(reference)
    assert {p: p.stat().st_mtime_ns for p in tmp_path.glob("*.json")} == written
    assert not list(tmp_path.glob("*.damaged"))


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
