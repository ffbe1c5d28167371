"""Ten thousand damaged and hand-made files: each is refused with the error that is promised, or read; none crashes, hangs, takes the memory or runs code."""
import gzip, io, json, os, pickle, random, resource, signal, struct, tarfile, zipfile, zlib
from dataclasses import asdict
from hashlib import sha256

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from kd_arbitrary.storage import load_tensors
from kd_arbitrary.pictures.files import read_pictures
from kd_arbitrary.pictures.natural import fetch, load_array, load_picture
from kd_arbitrary.studies.records import RecordError, load_record, write_record
from kd_arbitrary.studies.execution import claim
from kd_arbitrary.studies.runs import Run
from kd_arbitrary.teachers.networks import make_model
from kd_arbitrary.teachers.recipes import load_model, save_model
from kd_arbitrary.teachers.teacher import Teacher
from kd_arbitrary.teachers.training import fit
from kd_arbitrary.transfer.sets import TransferSet, label

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")          # what it says of broken pictures before it gives up
SHAPE, ROOM, SECONDS = (1, 4, 4), 768 << 20, 5       # a file of a few kilobytes needs neither so many bytes nor so long
ODD = [None, True, -1, 0, 1, 3.5, 1e308, float("nan"), 2**70, -2**63, "", "x" * 50, "../../x", "F64", "I8", [], {}, [[]], [0, 0], [0, 2**62], [2**40] * 3,
       [-1, 5], {"a": 1}, ["a"], [None], {"dtype": "F32"}, 10**6]
JUNK = [b"", b"\0", b"{", b"[" * 10**5, b'{"a":' * 10**5, b"\0" * 10**4, b"\xff" * 100, b"null", b"1", b'"x"', b"{}", b"9" * 10**5, b"PK\x03\x04" + b"\0" * 99,
        struct.pack("<Q", 2**63), struct.pack("<Q", 2**64 - 1) + b"{", struct.pack("<Q", 2**26) + b"{}", struct.pack("<Q", 2) + b"{}", struct.pack("<Q", 2) + b"[]"]


class Bomb:
    "What a pickle can do: run anything. This one makes a folder."
    def __init__(self, mark): self.mark = str(mark)
    def __reduce__(self): return os.mkdir, (self.mark,)


class TooLong(BaseException): "Nobody catches this one by mistake."


@pytest.fixture
def mark(tmp_path):
    "A folder that must not come to be."
    yield tmp_path / "executed"
    assert not (tmp_path / "executed").exists()


@pytest.fixture(autouse=True)
def limits():
    "A bound on memory and a clock for each file."
    def late(*_): raise TooLong(f"more than {SECONDS} s for one file")
    before, soft = signal.signal(signal.SIGALRM, late), resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as f: resource.setrlimit(resource.RLIMIT_AS, (int(f.read().split()[0]) * resource.getpagesize() + ROOM, soft[1]))
    try: yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, soft)


def bombs(mark):
    "Pickles, bare and in the wrappings they come in."
    bare, wrapped, zipped = pickle.dumps(Bomb(mark)), io.BytesIO(), io.BytesIO()
    torch.save(Bomb(mark), wrapped)
    with zipfile.ZipFile(zipped, "w") as z: z.writestr("../../escaped.txt", "x"), z.writestr("data.pkl", bare)
    return [bare, wrapped.getvalue(), zipped.getvalue(), gzip.compress(bare)]


def damaged(data: bytes, r: random.Random) -> bytes:
    "The bytes with something wrong."
    at, to, n = r.randrange(len(data)), r.randrange(len(data)), r.choice((1, 2, 8, 100))
    match r.randrange(8):
        case 0: return data[:at] + bytes([data[at] ^ 1 << r.randrange(8)]) + data[at + 1:]
        case 1: return data[:at]
        case 2: return data[:at] + r.randbytes(n) + data[at:]
        case 3: return data[:at] + bytes(n) + data[at + n:]
        case 4: return data[:at] + data[at + n:]
        case 5: return r.choice((2**63, 2**64 - 1, 2**31, 2**26, len(data), 0, 1, 7)).to_bytes(8, "little") + data[8:]
        case 6: return data[:at] + data[to:to + n] + data[at + n:]
        case _: return data + r.randbytes(n)


def odd(tree, r: random.Random):
    "The JSON value with one thing in it replaced, left out, or put in another's place."
    places = []
    def walk(x):
        for k in (list(x) if isinstance(x, dict) else range(len(x)) if isinstance(x, list) else ()): places.append((x, k)), walk(x[k])
    walk(tree)
    if not places or r.random() < 0.02: return r.choice(ODD)
    (a, i), (b, j) = r.choice(places), r.choice(places)
    match r.randrange(3):
        case 0: a[i] = r.choice(ODD)
        case 1: del a[i]
        case _: a[i] = json.loads(json.dumps(b[j]))
    return tree


def forged(data: bytes, r: random.Random) -> bytes:
    "A file of ours with an odd header and the digest that goes with it, as somebody could make it by hand."
    n = int.from_bytes(data[:8], "little")
    head, ours = json.loads(data[8:8 + n]), json.loads(json.loads(data[8:8 + n])["__metadata__"]["kd_arbitrary"])
    if r.random() < 0.5: ours = odd(ours, r)
    else: head = odd(head, r)
    if isinstance(ours, dict) and "sha256" in ours and r.random() < 0.95: ours["sha256"] = "0" * 64
    if isinstance(head, dict) and isinstance(head.get("__metadata__"), dict): head["__metadata__"]["kd_arbitrary"] = json.dumps(ours)
    raw = json.dumps(head).encode()
    raw += b" " * (-len(raw) % 8)
    whole = len(raw).to_bytes(8, "little") + raw + data[8 + n:]
    return whole.replace(b"0" * 64, sha256(whole).hexdigest().encode(), 1)


def storm(path, read, data, n, make, seed, error=ValueError, extra=()) -> int:
    "Read n files made from good data; how many were accepted."
    r, accepted = random.Random(seed), 0
    for i in range(n):
        path.write_bytes(extra[i] if i < len(extra) else make(data, r))
        signal.alarm(SECONDS)
        try: read(path); accepted += 1
        except error as e: assert path.name in str(e) or path.parent.name in str(e), repr(e)
        signal.alarm(0)
    path.write_bytes(data)
    read(path)
    return accepted


def a_transfer_set(folder):
    images = torch.randint(0, 256, (6, *SHAPE), dtype=torch.uint8)
    teacher = Teacher(nn.Sequential(nn.Flatten(), nn.Linear(16, 3)), 3, SHAPE)
    return label(images, teacher).save(folder / "set.safetensors"), TransferSet.load


def a_model(folder):
    card = dict(arch="lenet5_half", shape=[1, 28, 28], classes=list("0123456789"))
    return save_model(folder / "model.safetensors", make_model("lenet5_half"), card), load_model


def a_checkpoint(folder):
    def read(path):
        net = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
        fit(net, lambda m, i, g: m(torch.ones(len(i), *SHAPE)).square().mean(), 8, epochs=2, batch_size=4, checkpoint=path, show=False,
            measure=lambda m: dict(agreement=0.5))
    read(folder / "run.safetensors")
    return folder / "run.safetensors", read


@pytest.mark.parametrize("kind", [a_transfer_set, a_model, a_checkpoint])
def test_tensor_files(tmp_path, mark, kind):
    path, read = kind(tmp_path)
    data = path.read_bytes()
    extra = JUNK + bombs(mark) + [other(tmp_path)[0].read_bytes() for other in (a_transfer_set, a_model, a_checkpoint) if other is not kind]
    accepted = storm(path, read, data, 1400, damaged, 1, extra=extra)
    assert accepted < 40                                              # those where a byte was replaced by itself
    assert storm(path, read, data, 1100, forged, 2) < 900             # an odd word in the provenance is still provenance


def test_foreign_safetensors(tmp_path):
    from safetensors.torch import save_file
    for i, meta in enumerate([None, {"format": "pt"}, {"kd_arbitrary": "{}"}, {"kd_arbitrary": "[1, 2]"}, {"kd_arbitrary": "x"}]):
        save_file(dict(a=torch.zeros(3)), tmp_path / f"{i}.safetensors", metadata=meta)
        with pytest.raises(ValueError, match="is foreign"): load_tensors(tmp_path / f"{i}.safetensors")


def resigned(data: bytes, r: random.Random) -> bytes:
    "A record with an odd value and the checksum that goes with it."
    record = odd(json.loads(data), r)
    if isinstance(record, dict):
        record.pop("sha256", None)
        if r.random() < 0.95: record["sha256"] = sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
    return (json.dumps(record) + "\n").encode()


def test_records(tmp_path, mark):
    run = Run(target="digits", source="strokes", n=100)
    config = json.loads(json.dumps(asdict(run)))
    path = write_record(tmp_path, dict(key=run.key, version=1, status="done", finished="2026", config=config, results=dict(accuracy=0.5, per_class=[0.5, None])))
    data = path.read_bytes()
    assert storm(path, load_record, data, 800, damaged, 3, RecordError, JUNK + bombs(mark)) < 40
    storm(path, load_record, data, 700, resigned, 4, RecordError)


def test_run_json(tmp_path, mark):
    config = dict(target="digits", n=100, source="strokes", lr=0.01)
    claim(tmp_path, config)
    path, read = tmp_path / "run.json", lambda path: claim(tmp_path, config)
    data = path.read_bytes()
    storm(path, read, data, 500, damaged, 5, extra=JUNK + bombs(mark))
    storm(path, read, data, 500, lambda data, r: json.dumps(odd(json.loads(data), r)).encode(), 6)


# What users bring

def npy(x, **kw): f = io.BytesIO(); np.save(f, x, **kw); return f.getvalue()


def npz(**kw): f = io.BytesIO(); np.savez_compressed(f, **kw); return f.getvalue()


def liar(shape, data=b"\0" * 100, descr="|u1"):
    "An array file that says it is larger than it is."
    head = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}".encode()
    head += b" " * (64 - (len(head) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(head)) + head + data


def zipped(**files): f = io.BytesIO(); z = zipfile.ZipFile(f, "w", zipfile.ZIP_DEFLATED); [z.writestr(k + ".npy", v) for k, v in files.items()]; z.close(); return f.getvalue()


@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_arrays(tmp_path, mark, suffix):
    images, path = np.random.default_rng(0).integers(0, 256, (3, 5, 5, 3), np.uint8), tmp_path / f"images{suffix}"
    objects, wide = np.array([[[Bomb(mark)]]], dtype=object), (10**6, 10**6)
    extra = JUNK + bombs(mark) + [npy(objects, allow_pickle=True), npz(images=objects), npz(pictures=images), npy(images.astype(float)),
        *(liar(s) for s in (wide, (1, *wide), (2**40, 28, 28), (2**62, 4, 4), (-1, 4, 4), (0, 4, 4))),
        *(zipped(images=liar(s)) for s in (wide, (1, *wide), (2**40, 28, 28), (2**62, 4, 4), (-1, 4, 4))),
        zipped(images=liar((3000, 1000, 1000), b"\0" * 100)), zipped(images=bombs(mark)[0]), zipped(**{"../../images": npy(images)})]
    data = npy(images) if suffix == ".npy" else npz(images=images)
    storm(path, load_array, data, 600, damaged, 7, extra=extra)


def test_an_array_that_unpacks_to_more_than_the_memory(tmp_path, monkeypatch):
    path = tmp_path / "zeros.npz"
    path.write_bytes(npz(images=np.zeros((2000, 28, 28), np.uint8)))
    assert path.stat().st_size < 20_000 and load_array(path).shape == (2000, 1, 28, 28)
    monkeypatch.setattr("kd_arbitrary.core.available_memory", lambda: 10**6)
    with pytest.raises(ValueError, match=r"zeros\.npz .*GiB of memory"): load_array(path)


@pytest.mark.parametrize("suffix", ["png", "jpeg", "gif", "bmp", "tiff", "webp", "ppm"])
def test_pictures(tmp_path, mark, suffix):
    f, path = io.BytesIO(), tmp_path / f"broken.{suffix}"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 7, 3), np.uint8)).save(f, suffix)
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(" + str(mark).encode() + b") (w) file\n%%EOF\n"
    storm(path, load_picture, f.getvalue(), 200, damaged, 8, extra=[*JUNK, *bombs(mark), postscript])


def bomb_png(side):
    "A picture of a few bytes that says it is huge."
    def chunk(kind, body): return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("data, why", [(bomb_png(9000), "pixels"), (bomb_png(11_000), "pixels"), (bomb_png(2**31 - 1), "pixels"), (b"no picture", "identify")])
def test_a_folder_names_the_picture(tmp_path, data, why):
    def shape(**kw): return tuple(read_pictures(tmp_path, (3, 8, 8), tmp_path / "root", show=False, **kw).images.shape)
    Image.new("RGB", (9, 9), "red").save(tmp_path / "good.png")
    assert shape() == (1, 3, 8, 8)
    (tmp_path / "bad.png").write_bytes(data)
    with pytest.raises(ValueError, match=rf"bad\.png.*{why}"): shape(strict=True)
    with pytest.warns(UserWarning, match=rf"1 of 2 pictures are left out.*bad\.png.*{why}"): assert shape() == (1, 3, 8, 8)


def test_pickles_of_published_sets_are_checked_first(tmp_path, mark):
    "CIFAR comes as pickles; they are opened only if they have the published checksums."
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta"]: (folder / name).write_bytes(pickle.dumps(Bomb(mark)))
    with pytest.raises(FileNotFoundError, match="cifar10 cannot be read"): fetch("cifar10", tmp_path, download=False)


def test_archives_that_are_not_the_published_ones_are_not_unpacked(tmp_path):
    with tarfile.open(tmp_path / "cifar-10-python.tar.gz", "w:gz") as t:
        info = tarfile.TarInfo("../escaped.txt"); info.size = 1
        t.addfile(info, io.BytesIO(b"x"))
    with pytest.raises(FileNotFoundError): fetch("cifar10", tmp_path, download=False)
    assert not (tmp_path.parent / "escaped.txt").exists()
