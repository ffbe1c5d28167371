"""Pictures from files as strangers have them: killed while they are decoded, by two processes at once, on a full disk, larger than the memory."""
import errno, json, multiprocessing, os, resource, signal, subprocess, sys, time, warnings
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kd_arbitrary.pictures import files
from kd_arbitrary.pictures.files import read_pictures
from kd_arbitrary.pictures.sources import make_source
from kd_arbitrary.studies.jobs import evaluate_folder
from kd_arbitrary.teachers.teacher import Teacher
from kd_arbitrary.transfer.balance import balance

N, SHAPE = 600, (3, 20, 20)
context = multiprocessing.get_context("fork")
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc, sets limits")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "Six hundred pictures, three of them broken."
    at, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for i in range(N): Image.fromarray(rng.integers(0, 256, (24, 30, 3), dtype=np.uint8)).save(at / f"{i:04d}.png", compress_level=1)
    for i in (5, 300, 599): (at / f"{i:04d}.png").write_bytes(b"broken")
    return at


@pytest.fixture
def few(monkeypatch):
    "So little room in memory that these go to a file."
    monkeypatch.setattr(files, "KEPT", 30_000)
    monkeypatch.setattr(files, "_BLOCK", 6_000)
    monkeypatch.setattr(files.time, "monotonic", iter(range(10**9)).__next__)                          # a second between any two looks


def read(folder, root, **kw):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return read_pictures(folder, SHAPE, root, show=False, **kw)


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory): return read(folder, tmp_path_factory.mktemp("plain"))


def same(a, b): return torch.equal(a.images, b.images) and a.left_out == b.left_out and a.faults == b.faults == 3


def test_killed_at_any_moment_it_goes_on(folder, tmp_path, few, whole):
    real, at_work = files._pixels, tmp_path / "looked"
    def slow(what, shape):
        with open(at_work, "ab") as f: f.write(b".")
        time.sleep(0.002)
        return real(what, shape)
    kills, told = 0, []
    for patience in (0.25, 0.25, 0.25):
        files._pixels = slow
        job = context.Process(target=read, args=(folder, tmp_path))
        job.start()
        files._pixels = real
        while not list(tmp_path.glob("cache/*.json")) and job.is_alive(): time.sleep(0.01)
        time.sleep(patience)
        job.kill()
        job.join()
        kills += job.exitcode == -signal.SIGKILL
        told.append(json.loads(next(tmp_path.glob("cache/*.json")).read_text())["seen"])
    assert kills >= 1 and told == sorted(told) and told[0] > 0
    assert same(read(folder, tmp_path), whole) and same(read(folder, tmp_path), whole)
    assert at_work.stat().st_size < N + kills * 150                                                     # what was done is not done again


def test_two_processes_share_the_work(folder, tmp_path, few, whole):
    queue, real = context.Queue(), files._pixels
    def job():
        count = []
        files._pixels = lambda *a: count.append(1) or real(*a)
        queue.put((same(read(folder, tmp_path), whole), len(count)))
    jobs = [context.Process(target=job) for _ in range(2)]
    for j in jobs: j.start()
    (one, a), (two, b) = queue.get(timeout=120), queue.get(timeout=120)
    for j in jobs: j.join()
    assert one and two and a + b < 2 * N and len(list(tmp_path.glob("cache/*.u8"))) == 1


def test_a_picture_that_changes_is_seen(folder, tmp_path, few, whole):
    first = read(folder, tmp_path)
    before = (folder / "0007.png").read_bytes()
    Image.new("RGB", (9, 9), "red").save(folder / "0007.png")
    try: assert not torch.equal(read(folder, tmp_path).images, first.images)
    finally: (folder / "0007.png").write_bytes(before)


def in_child(function, *args) -> str:
    "What a function raises in a process of its own."
    queue = context.Queue()
    def job():
        try: queue.put(f"fine: {function(*args)}")
        except BaseException as e: queue.put(f"{type(e).__name__} {getattr(e, 'errno', None)}: {e}")
    process = context.Process(target=job)
    process.start()
    try: return queue.get(timeout=120)
    finally: process.join()


def limited(size, function, *args):
    "A function that may write files of a few bytes only, as on a full disk."
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    return function(*args)


@linux
def test_a_full_disk_names_file_and_remedy(folder, tmp_path, few, whole):
    told = in_child(limited, 100_000, read, folder, tmp_path)
    assert told.startswith(f"OSError {errno.EFBIG}") and f"{tmp_path}/cache/" in told and "--root" in told and "goes on from here" in told
    assert same(read(folder, tmp_path), whole)                                                          # with room again, it goes on


@linux
def test_a_full_disk_while_a_set_is_drawn(tmp_path):
    teacher = Teacher(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 20 * 20, 4)), 4, SHAPE)
    draw = lambda: balance(make_source("uniform", SHAPE), teacher, 800, "quota", empty="keep", show=False, path=tmp_path / "run/set.safetensors")
    told = in_child(limited, 100_000, draw)
    assert f"{tmp_path}/run" in told and "MiB" in told and "Free some space" in told and not list(tmp_path.rglob("*.safetensors")), told


@pytest.mark.skipif(os.name != "posix", reason="POSIX permissions")
def test_no_permission(folder, tmp_path, few):
    (tmp_path / "cache").mkdir()
    def job():
        if os.geteuid() == 0: os.setegid(65534), os.seteuid(65534)
        read(folder, tmp_path)
    os.chmod(tmp_path / "cache", 0o555)
    for parent in (tmp_path, *tmp_path.parents[:3]): os.chmod(parent, os.stat(parent).st_mode | 0o055) if os.stat(parent).st_uid == os.geteuid() else None
    for parent in (folder, *folder.parents[:2]): os.chmod(parent, os.stat(parent).st_mode | 0o055) if os.stat(parent).st_uid == os.geteuid() else None
    told = in_child(job)
    os.chmod(tmp_path / "cache", 0o755)
    assert told.startswith(f"PermissionError {errno.EACCES}") and f"{tmp_path}/cache" in told and "--root" in told, told


@linux
def test_many_pictures_need_not_fit_in_memory(tmp_path):
    "Three thousand pictures that take 81 MiB, with 8 MiB of room: what is held beyond that is what is being decoded."
    code = f"""if True:
        import torch, warnings, resource
        from pathlib import Path
        from PIL import Image
        from kd_arbitrary.pictures import files
        torch.set_num_threads(1)
        at = Path({str(tmp_path)!r}); (at / "in").mkdir()
        for i in range(3_000): Image.new("RGB", (16, 16), (i % 256, i // 256, 7)).save(at / f"in/{{i}}.bmp")
        status = lambda name: int(Path("/proc/self/status").read_text().split(name + ":")[1].split()[0]) / 1024
        files.read_pictures(at / "in/1.bmp", (3, 96, 96), at, show=False)                               # what libraries allocate once
        files.KEPT, files._BLOCK = 8 << 20, 2 << 20
        Path("/proc/self/clear_refs").write_text("5")
        before = status("VmRSS")
        got = files.read_pictures(at / "in", (3, 96, 96), at, show=False)
        print(len(got.images), got.images.numel() / 2**20, status("VmHWM") - before)"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    n, size, rise = map(float, done.stdout.split())
    assert n == 3_000 and size > 75 and rise < 40, done.stdout


@pytest.mark.skipif(not find_spec("datasets"), reason="needs the extra datasets")
def test_a_data_set_of_the_hub(folder, tmp_path, whole):
    import datasets
    names = sorted(str(p) for p in folder.glob("*.png"))[:40]
    rows = [dict(id=i, shot=dict(bytes=Path(p).read_bytes(), path=None) if i % 2 else dict(bytes=None, path=p)) for i, p in enumerate(names)]
    kinds = datasets.Features(id=datasets.Value("int64"), shot=datasets.Image())
    made = datasets.Dataset.from_list(rows, features=kinds)
    made.save_to_disk(str(tmp_path / "one"))
    got = read(tmp_path / "one", tmp_path)
    assert got.faults == 1 and torch.equal(got.images[:5], whole.images[:5]) and len(got.images) == 39
    datasets.DatasetDict(train=made.select(range(30)), test=made.select(range(30, 40))).save_to_disk(str(tmp_path / "two"))
    assert len(read(tmp_path / "two", tmp_path).images) == 39
    some = read(tmp_path / "two", tmp_path, most=12)
    assert (len(some.images) + some.faults, some.unread) == (12, 28)
    datasets.Dataset.from_list([dict(a=1)]).save_to_disk(str(tmp_path / "none"))
    with pytest.raises(ValueError, match="no column of pictures; its columns are a"): read(tmp_path / "none", tmp_path)
    with pytest.warns(UserWarning, match="1 of 40 .*cannot identify its format"):
        source = make_source(f"folder(path={str(tmp_path / 'one')!r})", (1, 8, 8), tmp_path)
    assert source.size == 39 and source.left_out["count"] == 1 and "5" in source.left_out["pictures"][0]


def test_without_the_extra_it_is_named(tmp_path, monkeypatch):
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved/dataset_info.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"kd_arbitrary\[datasets\]"): read(tmp_path / "saved", tmp_path)


@pytest.mark.skipif(not find_spec("webdataset"), reason="needs webdataset")
def test_shards_that_webdataset_wrote(folder, tmp_path, whole):
    import webdataset
    names = sorted(folder.glob("*.png"))[:20]
    with webdataset.ShardWriter(str(tmp_path / "part-%03d.tar"), maxcount=8, verbose=0) as sink:
        for i, p in enumerate(names): sink.write({"__key__": f"{i:05d}", "png": p.read_bytes(), "cls": i % 3, "json": dict(name=p.name)})
    for spec in (tmp_path, tmp_path / "part-{000..002}.tar", tmp_path / "*.tar"):
        got = read(spec, tmp_path / "root")
        assert len(got.images) == 19 and got.faults == 1 and torch.equal(got.images[:5], whole.images[:5])


def test_a_labelled_folder(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        for i in range(3): Image.new("RGB", (9, 9), (255 * (name == "a"), 0, 0)).save(tmp_path / name / f"{i}.png")
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 8 * 8, 2, bias=False))
    with torch.no_grad(): model[1].weight.copy_(torch.stack([torch.ones(192), -torch.ones(192)]) - torch.tensor([[0.1], [-0.1]]))
    assert evaluate_folder(model, tmp_path, Teacher(model, ("a", "b"), (3, 8, 8)))["n"] == 6
