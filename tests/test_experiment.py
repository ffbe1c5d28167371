"""Grids through real executors, and what can happen to them: a killed worker, two processes at once, a full disk."""
import os, pickle, signal, time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.io import savemat
from torchvision.datasets import cifar, svhn

from kd_arbitrary.experiment import grid_table
from kd_arbitrary.studies.contests import race
from kd_arbitrary.studies.grids import GRIDS, cifar100_full, smoke
from kd_arbitrary.studies.records import _attempt, grid_status, read_records, run_grid
from kd_arbitrary.studies.execution import execute, now
from kd_arbitrary.studies.runs import Run, passes, steps
from kd_arbitrary.teachers.recipes import RECIPES
from kd_arbitrary.transfer.quotas import quotas
from processes import CONTEXT, Job

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
    with ProcessPoolExecutor(2, mp_context=CONTEXT) as executor: yield executor


def test_a_process_pool_does_the_same(root, reference, tmp_path, pool):
    records = run_grid(GRID, tmp_path, root=root, executor=pool, threads=1, show=False)
    assert outcome(records) == outcome(reference)
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file()) == sorted(f"{run.key}.json" for run in GRID)


def test_workers_of_another_folder_write_where_they_are_told(root, reference, tmp_path, monkeypatch):
    (here := tmp_path / "here").mkdir(), (there := tmp_path / "there").mkdir()
    monkeypatch.chdir(here)
    with ProcessPoolExecutor(1, mp_context=CONTEXT, initializer=os.chdir, initargs=(there,)) as away:
        records = run_grid(GRID[:1], "records", root=os.path.relpath(root), work="unfinished", executor=away, threads=1, show=False)
    assert outcome(records) == outcome(reference)[:1] and (here / "records" / f"{GRID[0].key}.json").exists() and not list(there.iterdir())


def test_a_record_that_lies_elsewhere_is_told(tmp_path):
    class Elsewhere(ThreadPoolExecutor):
        "A worker on another machine: it says done, and nothing is seen here."
        def submit(self, f, *args): return super().submit(lambda: "done")
    with Elsewhere(1) as away, pytest.warns(UserWarning, match=r"1 runs were lost.*FileNotFoundError.*workers must share a file system"):
        assert run_grid(GRID[:1], tmp_path, executor=away, show=False) == []


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
    other = Job(_with_two_threads, runs, tmp_path, root)
    assert other.until(lambda: any((tmp_path / ".work").glob("*.lock")))
    run_grid(runs[::-1], tmp_path, root=root, show=False)                                # from the other end
    assert other.wait().returncode == 0
    records = run_grid(runs, tmp_path, root=root, show=False)
    assert [r["status"] for r in records] == ["done"] * 8 and not list(tmp_path.glob("*.damaged"))
    assert {r["machine"]["threads"] for r in records} == {1, 2}                           # both had a part in it


def _with_two_threads(runs, folder, root):
    torch.set_num_threads(2)
    run_grid(runs, folder, root=root, show=False)


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


@pytest.fixture
def published(tmp_path, monkeypatch):
    "A data root with stand-ins for CIFAR-100 and SVHN, in the official file formats; only the checksums are not theirs."
    rng, base = np.random.default_rng(0), tmp_path / "cifar-100-python"
    base.mkdir()
    for part, n in (("train", 300), ("test", 100)):
        rows = rng.integers(0, 256, (n, 3072), dtype=np.uint8)
        (base / part).write_bytes(pickle.dumps({"data": rows, "fine_labels": [i % 100 for i in range(n)], "coarse_labels": [0] * n}))
    (base / "meta").write_bytes(pickle.dumps({"fine_label_names": [f"class_{i}" for i in range(100)], "coarse_label_names": ["all"]}))
    savemat(tmp_path / "train_32x32.mat", {"X": rng.integers(0, 256, (32, 32, 3, 150), dtype=np.uint8), "y": np.arange(150)[:, None] % 10 + 1})
    for reader in (cifar, svhn): monkeypatch.setattr(reader, "check_integrity", lambda path, md5=None: Path(path).is_file())
    monkeypatch.setitem(RECIPES["cifar100"], "epochs", 1)
    return tmp_path


@pytest.mark.filterwarnings("ignore:class.* got no image")
def test_cells_of_cifar100_run_on_stand_ins(published, tmp_path):
    wanted = [("svhn", "none", "running"), ("svhn", "fill", "running"), ("gaussian", "fill", "batch"), ("original", "none", "running")]
    cells = [run for run in cifar100_full() if run.seed == 0 and (run.source, run.balance, run.teacher_bn) in wanted and run.teacher == "wrn40_2"]
    cells = [replace(run, n=110, epochs=1, teacher="wrn16_1", student="wrn16_1") for run in cells]
    records = run_grid(cells, tmp_path / "records", root=published, show=False)
    assert [(r["config"]["source"], r["config"]["balance"], r["config"]["teacher_bn"]) for r in records] == wanted and {r["status"] for r in records} == {"done"}
    assert all(len(r["results"]["per_class"]) == 100 and r["config"]["bfloat16"] for r in records)
    svhn_none, svhn_fill, *_ = records
    assert svhn_none["data"] == svhn_fill["data"] == dict(kind="natural", parts=dict(svhn="natural")) and svhn_none["results"]["distinct"] == 110
    assert svhn_fill["results"]["entropy"] > svhn_none["results"]["entropy"] and sum(svhn_fill["report"]["quota"]) == 110
    table = grid_table([*cells, *cifar100_full()[:2]], records)
    assert (table == "not run").sum().sum() == 2 and table.map(lambda cell: cell.endswith("(1)")).sum().sum() == 4


@pytest.mark.filterwarnings("ignore:class.* got no image")
@pytest.mark.parametrize("balance", ["none", "quota", "repeat", "reweight", "fill"])
def test_updates_are_met_whatever_is_left_of_a_finite_source(root, tmp_path, balance):
    np.savez(tmp_path / "few.npz", images=np.random.default_rng(0).integers(0, 256, (450, 28, 28), dtype=np.uint8))
    run = Run(target="digits", source=f"array(path='{tmp_path}/few.npz')", n=400, balance=balance, updates=42, batch_size=64, empty="keep", views="none")
    record = execute(run, root=root, show=False)
    left = sum(sum(record["report"][fate]) for fate in ("accepted", "perturbed", "repeated"))
    assert left < 400 if balance in ("quota", "repeat") else left == 400                # noise: some digits the teacher never sees, so none can be repeated
    assert record["results"]["updates"] == passes(run, left) * steps(run, left) and abs(record["results"]["updates"] - 42) <= steps(run, left) / 2
    assert record["config"]["epochs"] is None and len(record["history"]) == passes(run, left)


def test_out_of_balance_on_purpose(root):
    run = Run(target="digits", source="pyramid", n=400, imbalance=10, missing=2, smooth=2, epochs=1, views="none", seed=3)
    record = execute(run, root=root, show=False)
    wanted = quotas(400, 10, 10, 2, 3).tolist()
    assert record["report"]["quota"] == wanted and wanted.count(0) == 2
    assert [a + p for a, p in zip(record["report"]["accepted"], record["report"]["perturbed"])] == wanted
    even = execute(replace(run, imbalance=1, missing=0), root=root, show=False)
    assert even["report"]["quota"] == [40] * 10 and even["results"]["entropy"] > record["results"]["entropy"]


def test_every_record_belongs_to_its_grid():
    folders = {p.name: {f.stem for f in p.glob("*.json")} for p in (Path(__file__).parent.parent / "data/results").iterdir() if p.is_dir()}
    assert folders.keys() - GRIDS.keys() <= {"benchmarks", "teachers", "tuning"}
    stray = {name: keys - {r.key for r in GRIDS[name]()} for name, keys in folders.items() if name in GRIDS}
    assert not any(stray.values()), f"runs that their grid does not have: {stray}"
    assert folders["race"] & {r.key for r in race()}
