"""A run that is killed, at any moment and as often as one likes, ends as if nothing had happened: the same weights to the bit, the same record."""
import os, random, signal, time
from pathlib import Path

import pytest
import torch

from kd_arbitrary import storage
from kd_arbitrary.teachers import recipes, training
from kd_arbitrary.storage import load_tensors
from kd_arbitrary.students import adversarial
from kd_arbitrary.studies.records import find_record, load_record, run_grid, write_record
from kd_arbitrary.studies.execution import execute
from kd_arbitrary.studies.runs import Run
from kd_arbitrary.transfer import collect
from processes import Job

RUN = Run(target="digits", source="0.5*strokes + 0.5*pyramid", n=260, epochs=4, batch_size=64)
LOOP = Run(target="digits", source="0.5*fast(width=4, taught=4) + 0.5*strokes", n=100, balance="repeat", updates=64, batch_size=32, views="none")
STAGES = ("made", "half", "flushed", "whole", "renamed")      # of a write, at which a process can be killed
KILLED = -signal.SIGKILL


def job(folder: Path, whole_grid: bool = False) -> None:
    "What is started again and again: train a teacher, make a transfer set, teach a student, write the record."
    torch.set_num_threads(1)
    recipes.RECIPES["digits"]["epochs"], training.SAVE_EVERY = 2, 0          # a checkpoint after each epoch, however short
    collect.WORTH = 0                                                       # and a file for each block of nudges
    if whole_grid: return run_grid([RUN], folder / "grid", root=folder / "root", show=False) and None
    out = folder / "out"
    if find_record(out, RUN) is None: write_record(out, execute(RUN, root=folder / "root", out=out, show=False))


def job_killed_writing(folder: Path, nth: int, stage: str) -> None:
    "The job, but the process kills itself at a stage of its nth write."
    real, die, count = storage._replace, lambda *_: os.kill(os.getpid(), signal.SIGKILL), 0
    class Half:
        "A file that takes half of what it is given."
        def __init__(self, f): self.f = f
        def write(self, data): self.f.write(bytes(data)[: len(data) // 2]); self.f.flush(); die()
    def replaced(path, fill):
        nonlocal count
        count += 1
        if count < nth: return real(path, fill)
        if stage == "made": fill = die
        if stage == "half": fill = lambda f, fill=fill: fill(Half(f))
        if stage == "flushed": os.fsync = die
        if stage == "whole": os.replace = die
        if stage == "renamed": rename = os.replace; os.replace = lambda *names: die(rename(*names))
        real(path, fill)
    storage._replace = replaced
    job(folder)


def start(function, *arguments, seconds=None) -> int:
    "Run a function in a fresh process that lives so many seconds at the most; its exit code."
    return Job(function, *arguments).wait(seconds).returncode


def outcome(folder: Path) -> tuple[dict, dict]:
    "All tensors that were written, and the record without its times."
    files = {str(p.relative_to(folder)): load_tensors(p, kind)[0] for p, kind in tensor_files(folder)}
    return files, without_times(load_record(folder / "out" / f"{RUN.key}.json"))


def tensor_files(folder):
    kinds = dict(checkpoint="checkpoint", transfer="transfer set", student="model")
    return [(p, kinds.get(p.stem, "model")) for p in sorted(folder.rglob("*.safetensors"))]


def without_times(record):
    times = ("seconds", "cpu", "finished", "sha256", "peak_memory_mb")
    if isinstance(record, dict): return {k: without_times(v) for k, v in record.items() if k not in times}
    return [without_times(v) for v in record] if isinstance(record, list) else record


def same(a, b): return a.keys() == b.keys() and all(torch.equal(a[f][k], b[f][k]) for f in a for k in a[f] | b[f])


def names(folder): return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "The uninterrupted run: its folder, its outcome, and how long it took."
    start(time.sleep, 0)                                     # the first process waits for the imports
    folder, begun = tmp_path_factory.mktemp("whole"), time.monotonic()
    assert start(job, folder) == 0
    return folder, outcome(folder), time.monotonic() - begun


@pytest.mark.parametrize("chain", range(4))
def test_killed_at_any_moment(whole, tmp_path, chain):
    "Five kills at random moments of one run, four times; the last time through `run_grid`."
    _, (files, record), seconds = whole
    moments = sorted(random.Random(chain).uniform(0, seconds) for _ in range(5))
    grid, killed = chain == 3, 0
    for a, b in zip([0, *moments], moments): killed += start(job, tmp_path, grid, seconds=b - a) == KILLED
    assert killed >= 2 and start(job, tmp_path, grid) == 0
    if grid:
        assert without_times(load_record(tmp_path / "grid" / f"{RUN.key}.json")) == record
        assert [n for n in names(tmp_path / "grid") if not n.endswith(".lock")] == [f"{RUN.key}.json"]
    else: assert outcome(tmp_path)[1] == record and same(outcome(tmp_path)[0], files) and names(tmp_path) == names(whole[0])


@pytest.mark.parametrize("turn", range(2))
def test_killed_while_writing(whole, tmp_path, turn):
    "Each process kills itself in its first, second or third write, at some stage of it, until one has nothing left to write."
    folder, (files, record), _ = whole
    chance = random.Random(turn)
    for i in range(60):
        if (code := start(job_killed_writing, tmp_path, chance.choice((1, 2, 3, 3)), chance.choice(STAGES))) != KILLED: break
    assert code == 0 and i >= 8 and start(job, tmp_path) == 0
    assert outcome(tmp_path)[1] == record and same(outcome(tmp_path)[0], files)
    assert names(tmp_path) == names(folder)                       # no temporary file is left of all that died


def test_two_processes_do_the_same(whole, tmp_path):
    "The record says what the outcome depends on."
    assert start(job, tmp_path) == 0
    assert names(tmp_path) == names(whole[0]) and same(outcome(tmp_path)[0], whole[1][0]) and outcome(tmp_path)[1] == whole[1][1]
    record = whole[1][1]
    assert record["machine"]["threads"] == 1 and record["machine"]["processor"] and record["config"]["seed"] == RUN.seed
    assert {"torch", "numpy", "kd_arbitrary", "python"} <= record["versions"].keys()


def loop_job(folder: Path) -> None:
    "Images and student made together, with a transfer set beside them; a checkpoint after each chapter."
    torch.set_num_threads(1)
    recipes.RECIPES["digits"]["epochs"], training.SAVE_EVERY, adversarial.SAVE_EVERY = 2, 0, 0
    out = folder / "out"
    if find_record(out, LOOP) is None: write_record(out, execute(LOOP, root=folder / "root", out=out, show=False))


def test_a_generator_killed_at_any_moment(tmp_path):
    "An adversarial run that is killed five times: the same student, the same record."
    begun = time.monotonic()
    assert start(loop_job, tmp_path / "whole") == 0
    seconds, killed = time.monotonic() - begun, 0
    moments = sorted(random.Random(7).uniform(0, seconds) for _ in range(5))
    for a, b in zip([0, *moments], moments): killed += start(loop_job, tmp_path / "pieces", seconds=b - a) == KILLED
    assert killed >= 2 and start(loop_job, tmp_path / "pieces") == 0
    whole, pieces = (tmp_path / name / "out" for name in ("whole", "pieces"))
    assert without_times(load_record(whole / f"{LOOP.key}.json")) == without_times(load_record(pieces / f"{LOOP.key}.json"))
    a, b = (load_tensors(out / "student.safetensors", "model")[0] for out in (whole, pieces))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
