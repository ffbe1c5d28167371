"""A rival's set as a user meets it: killed and started again, on the command line, behind a black box."""
import json, os, random

import pytest
import torch
from torch import nn

from kd_arbitrary.storage import load_tensors
from kd_arbitrary.pictures.sources import make_source
from kd_arbitrary.studies.records import find_record, load_record, write_record
from kd_arbitrary.studies.execution import execute
from kd_arbitrary.studies.runs import Run
from kd_arbitrary.teachers.teacher import Teacher
from kd_arbitrary.transfer import rivals
from processes import Job, kd_distill as kd

TEXT = "0.75*zskd(steps=30, lr=0.05, batch=8) + 0.25*strokes"
RUN = Run(target="digits", source=TEXT, n=240, balance="repeat", epochs=1, batch_size=64)
TIMES = ("seconds", "cpu", "finished", "sha256", "peak_memory_mb")


def job(folder):
    torch.set_num_threads(1)
    rivals.EVERY = 0                       # saved after every batch
    if find_record(folder / "out", RUN) is None: write_record(folder / "out", execute(RUN, root=folder / "root", out=folder / "out", show=False))


def untimed(record):
    if isinstance(record, dict): return {k: untimed(v) for k, v in record.items() if k not in TIMES}
    return [untimed(v) for v in record] if isinstance(record, list) else record


def outcome(folder):
    "The generated images, and the record without its times."
    path, = (folder / "root/generated").glob("*.safetensors")
    tensors, info = load_tensors(path, "generated images")
    return tensors["images"], untimed(info), untimed(load_record(folder / f"out/{RUN.key}.json"))


def test_killed_while_images_are_made(tmp_path):
    "Killed with half of the images made, and again, the run ends with the same images, the same price and the same record."
    torch.set_num_threads(1)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    write_record(whole / "out", execute(RUN, root=whole / "root", out=whole / "out", show=False))
    images, info, record = outcome(whole)
    chance, kept = random.Random(0), []
    def done():
        files = list((broken / "root/generated").glob("*.safetensors"))
        return load_tensors(files[0], "generated images")[1]["done"] if files else 0
    for _ in range(2):
        process, more = Job(job, broken), done() + chance.randint(2, 5)      # until some more batches are in the file
        assert process.until(lambda: done() >= more)
        process.killed()
        kept.append(done())
    assert 0 < kept[0] < kept[1] <= info["done"]
    assert Job(job, broken).wait().returncode == 0
    again = outcome(broken)
    assert torch.equal(again[0], images) and again[1] == info
    code = lambda r: {k: v for k, v in r.items() if k != "code"}
    assert code(again[2]) == code(record)
    assert record["data"]["making"]["gradients"] == 30 * 180 and record["results"]["gradients"] >= 30 * 180


def test_on_the_command_line(tmp_path):
    "As drawn and balanced come from one set of images, and both tables say the whole price."
    words = ["--target", "digits", "--source", "zskd(steps=10,lr=0.05)", "--n", 100, "--epochs", 1, "--views", "none", "--empty", "keep", "--quiet"]
    done = kd(*words, "--json", "--out", tmp_path / "out", "--root", tmp_path / "root")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert len(list((tmp_path / "root/generated").glob("zskd-*.safetensors"))) == 1
    for way in ("unbalanced", "balanced"):
        assert told[way]["data"]["kind"] == "generated"
        assert told[way]["data"]["making"]["gradients"] == 10 * 100 <= told[way]["results"]["gradients"]
        assert told[way]["results"]["queries"] >= 10 * 100 + 100
    wrong = kd(*words[:2], "--source", "zskd(stps=3)", "--out", tmp_path / "wrong")
    assert wrong.returncode == 2 and "Did you mean 'steps'" in wrong.stderr
    assert "zskd" in kd("--help").stdout and "deepinversion" in kd("--help").stdout


def test_black_boxes_are_told_what_remains(tmp_path):
    "On the command line and in the library."
    (tmp_path / "ask.py").write_text("import torch\ndef label(x): return (x.mean((1, 2, 3)) * 9.99).long()\n")
    words = ["--teacher", f"{tmp_path}/ask.py:label", "--input-shape", "1,12,12", "--classes", 10, "--gives", "labels"]
    done = kd(*words, "--source", "zskd", "--student", "lenet5_half", "--out", tmp_path / "out", "--quiet")
    assert done.returncode == 1 and "needs gradients" in done.stderr and "'quota', 'repeat'" in done.stderr
    labels = Teacher(nn.Sequential(nn.Flatten(), nn.Linear(16, 3)), 3, (1, 4, 4), gives="labels")
    for name in rivals.RIVALS.where(kind="set"):
        with pytest.raises(ValueError, match="'quota', 'repeat'"): make_source(name, (1, 4, 4), tmp_path, teacher=labels)


@pytest.mark.parametrize("text, words", {
    "zskd(start='mnist')": "the target's own images", "zskd(scales=())": "numbers above 0", "zskd(steps=1.5)": "whole number",
    "deepinversion(tv=-1.0)": "0 or more", "deepinversion(start='zskd')": "generated itself", "0.5*zskd(stps=2)+strokes": "Did you mean"}.items())
def test_runs_refuse_what_cannot_be_before_a_teacher_is_there(text, words):
    with pytest.raises(ValueError, match=words): Run(target="mnist", source=text)


def test_folder_that_cannot_be_written(tmp_path):
    "Images are made all the same, and not kept."
    if os.getuid() == 0: (tmp_path / "root").touch()              # root may write anywhere: a file stands in the way
    else: (tmp_path / "root").mkdir(mode=0o500)
    torch.manual_seed(0)
    teacher = Teacher(nn.Sequential(nn.Flatten(), nn.Linear(16, 3)), 3, (1, 4, 4))
    source = make_source("zskd(steps=2)", (1, 4, 4), tmp_path / "root", teacher=teacher, n=12)
    assert source.draw(12, torch.Generator()).shape == (12, 1, 4, 4)
