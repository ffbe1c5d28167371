"""What a job takes: the estimate made before it against what it then holds, and a set larger than what is held."""
import contextlib
import ctypes
import gc
import multiprocessing
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from kd_arbitrary.pictures.sources import make_source
from kd_arbitrary.students.distill import distill
from kd_arbitrary.students.evaluate import peak_memory_mb
from kd_arbitrary.teachers.teacher import Teacher
from kd_arbitrary.transfer.balance import balance, memory_needed

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peaks are read from /proc")
SHAPE, N = (3, 48, 48), 28_000          # 194 MB of images


def status(name): return int(Path("/proc/self/status").read_text().split(f"{name}:")[1].split()[0]) / 1024


def held():
    "The process's own memory in MiB, less what the allocator merely keeps."
    gc.collect()
    with contextlib.suppress(OSError, AttributeError): ctypes.CDLL(None).malloc_trim(0)
    return status("RssAnon")


class Rise:
    "How much more memory the block held at its peak than before it, in MiB."
    def __enter__(self): Path("/proc/self/clear_refs").write_text("5"); self.before = status("VmRSS"); return self      # 5: forget the peak
    def __exit__(self, *_): self.mb = peak_memory_mb() - self.before


def networks():
    torch.manual_seed(0)
    make = lambda: nn.Sequential(nn.Conv2d(3, 8, 5, stride=4), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 11 * 11, 4))
    return Teacher(make(), 4, SHAPE), make()


def compare(queue, folder):
    "Measured and estimated, for each stage, in memory; and what a set that goes to a file adds to the process's own memory."
    torch.set_num_threads(1)
    teacher, student = networks()
    source, rows = make_source("uniform", SHAPE), {}
    make = lambda n, strategy, path=None: balance(source, teacher, n, strategy, empty="keep", show=False, path=path)[0]
    teach = lambda ts, epochs=1, **kw: distill(teacher, student, ts, epochs=epochs, views="flip", batch_size=256, show=False, **kw)
    for strategy in ("none", "fill"): teach(make(600, strategy), relabel=False)           # what libraries allocate once
    teach(make(600, "fill", Path(folder) / "few.safetensors"))
    for strategy in ("none", "fill"):
        needed = memory_needed(N, teacher, student, strategy=strategy, batch_size=256, cached_views=2)
        with Rise() as making: ts = make(N, strategy)
        rows[f"balance {strategy}"] = making.mb, needed["balance"] / 2**20
    with Rise() as teaching: teach(ts, relabel=False, cached_views=2)
    rows["distill"] = teaching.mb, needed["distill"] / 2**20
    del ts
    before = held()
    mapped = make(N, "fill", Path(folder) / "set.safetensors")
    teach(mapped)
    rows["mapped"] = held() - before, mapped.images.numel() / 2**20
    queue.put(rows)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=compare, args=(queue, str(tmp_path_factory.mktemp("sets"))))
    process.start()
    rows = queue.get(timeout=300)
    process.join()
    return rows


@pytest.mark.parametrize("stage", ["balance none", "balance fill", "distill"])
def test_the_estimate_is_right_within_a_factor_of_two(rows, stage):
    measured, estimated = rows[stage]
    assert measured > 50 and estimated / 2 < measured < 2 * estimated, rows


def test_a_set_in_a_file_does_not_stay_in_memory(rows):
    kept, size = rows["mapped"]
    assert size > 100 and kept < size / 4, rows


def test_refused_before_anything_is_computed(monkeypatch):
    monkeypatch.setattr("kd_arbitrary.core.available_memory", lambda: 10 << 20)
    teacher, student = networks()
    source = make_source("uniform", SHAPE)
    with pytest.raises(ValueError, match=r"28,000 images .* needs about 0\.\d GiB of memory and 0\.0 GiB are available; lower n"):
        balance(source, teacher, N, show=False)
    few = balance(source, teacher, 8, "none", show=False)[0] if monkeypatch.undo() is None else None
    monkeypatch.setattr("kd_arbitrary.core.available_memory", lambda: 10 << 20)
    asked = teacher.queries
    with pytest.raises(ValueError, match="lower batch_size"): distill(teacher, student, few, batch_size=10**6, show=False)
    assert teacher.queries == asked
