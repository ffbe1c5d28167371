"""The benchmark at toy size: its record is whole, and nobody took fewer steps or another network."""
import json

import pytest
import torch

from benchmarks.__main__ import fair, main
from benchmarks.contenders import OURS, PACKAGES, PEERS, Contender, installed, line_up, pictures
from benchmarks.micro import ahead, seeds, threads
from benchmarks.work import PAIRS, make_work, normalised, plain


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    "One round of two hundred images."
    out = tmp_path_factory.mktemp("benchmarks")
    args = "--pair lenet --images 200 --repeats 1 --batch 50 100 --skip-micro --balance 200"
    path, = main([*args.split(), "--target", "none", "--out", str(out)])
    return json.loads(path.read_text())


def test_record_is_whole(record):
    assert record["pair"] == "lenet" and record["settings"]["batches"] == [50, 100] and record["versions"]["torch"] == torch.__version__
    assert {r["loop"] for r in record["contenders"]} > {OURS, *PEERS}                # also those that are not installed
    for r in record["contenders"]:
        assert r["installed"] == installed(r["loop"]) and len(r["runs"]) == r["installed"]
        assert all(t["wall"] > 0 and t["cpu"] > 0 for t in r["runs"])
    for b, at in record["bound"].items():
        assert at["student_forward"] * 2 < at["student_step"] < at["student_forward"] * 3     # no gradient to the image
        assert 0 < at["floor"]["float32"]["cached"] < at["floor"]["float32"]["views"]
        pure = min(t["cpu"] for r in record["contenders"] if r["loop"] == "student alone" and r["batch_size"] == int(b) for t in r["runs"])
        assert pure / 200 > at["floor"]["float32"]["cached"]                           # nobody is below the floor
    assert [m["name"] for m in record["micro"]] == ["balance, gaussian noise", "balance, pyramid noise"]
    assert all(m["report"]["none"]["queries"] == 200 and set(m["runs"]) == {"none", "fill"} for m in record["micro"])


def test_same_number_of_updates(record):
    for r in record["contenders"]:
        if r["installed"]: assert r["updates"] == (0 if r["loop"] == "asking once" else 200 // r["batch_size"])
    record["contenders"][0]["updates"] += 1
    with pytest.raises(RuntimeError, match="must take the same number"): fair(record["contenders"])


def test_a_peer_that_is_missing_is_shown(monkeypatch):
    monkeypatch.setitem(PACKAGES, "timm", "no_such_package")
    assert not installed("timm") and any(c.loop == "timm" for c in line_up(("fast", "stock"), (128,), False))


@pytest.mark.parametrize("pair", ["lenet", "alexnet"])
def test_all_networks_are_the_same_function(pair):
    work = make_work(PAIRS[pair], 8)
    x = work.transfer.images
    seen = torch.stack([pictures(work, Contender("", "cached", "stock", 8), 8)[i][0] for i in range(8)])
    assert torch.allclose(seen, normalised(x), atol=1e-6)                            # the peers' transforms, picture by picture
    for kind in ("fast", "stock"):
        theirs = plain(work.teachers[kind].module).eval()(seen)
        assert torch.allclose(theirs, work.teachers["fast"](x), atol=1e-4)


def test_seeds_and_drawing_ahead_run():
    work = make_work(PAIRS["lenet"], 16)
    (n, calls), = seeds(work, 16, many=2).values()
    assert n == 32 and len(calls) == 3
    for go in calls.values(): go()                                                   # the batched step runs through vmap
    before = torch.get_num_threads()
    for report in ahead(work, 100, 1, "gaussian") + threads(work, 16, 1, 1): assert report["unit"] == "wall" and len(report["runs"]) > 1
    assert torch.get_num_threads() == before


def test_a_look_at_the_sources(tmp_path):
    from benchmarks.sources import main as look
    path = look(f"--target digits --sample 100 --sources gaussian strokes --no-batch-statistics --out {tmp_path}".split())
    record = json.loads(path.read_text())
    assert [r["source"] for r in record["rows"]] == ["gaussian", "strokes", "original"]
    noise, drawn, real = record["rows"]
    assert sum(noise["counts"]) == 100 and noise["entropy"] < real["entropy"] and noise["confidence"] < real["confidence"]
    assert all(r["images_per_second"] > 100 and 0 <= r["rarest"] <= 0.1 for r in record["rows"])
