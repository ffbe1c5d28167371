"""Bad input from outside: devices that go away, number formats that are not there, half-downloaded archives, teachers of other classes."""
import warnings

import pytest
import torch

from kd_arbitrary import core
from kd_arbitrary.pictures.natural import OFFICIAL, fetch
from kd_arbitrary.pictures.sources import make_source
from kd_arbitrary.students.distill import distill
from kd_arbitrary.studies.records import find_record, read_records, run_grid
from kd_arbitrary.studies.execution import execute
from kd_arbitrary.studies.runs import Run
from kd_arbitrary.teachers import training
from kd_arbitrary.teachers.networks import make_model
from kd_arbitrary.teachers.teacher import Teacher
from kd_arbitrary.transfer.balance import balance
from kd_arbitrary.transfer.sets import label

SHAPE = (3, 32, 32)


def fails_at(monkeypatch, step: int, message: str):
    "From that optimiser step on, the device is gone."
    real, left = training._step, iter(range(step - 1))
    def dying(*args):
        if next(left, None) is None: raise RuntimeError(message)
        return real(*args)
    monkeypatch.setattr(training, "_step", dying)


def test_a_device_that_goes_away_loses_nothing(tmp_path, monkeypatch):
    run = Run(target="digits", source="strokes", balance="none", n=300, epochs=4, batch_size=64, views="none")
    whole = execute(run, show=False)
    monkeypatch.setattr(training, "SAVE_EVERY", 0)
    with monkeypatch.context() as m:
        fails_at(m, 2 * 5 + 3, "CUDA error: unspecified launch failure\nlong advice")
        with pytest.warns(UserWarning, match=r"1 runs were lost.*DeviceLost.*failed in epoch 3 of 4 \(CUDA error: unspecified launch failure\); what is done is kept"):
            assert run_grid([run], tmp_path, show=False) == []
    assert find_record(tmp_path, run) is None and (tmp_path / ".work" / run.key / "checkpoint.safetensors").exists()
    begun = []
    with monkeypatch.context() as m:
        real = training._epoch
        m.setattr(training, "_epoch", lambda loop, epoch: begun.append(epoch) or real(loop, epoch))
        record, = run_grid([run], tmp_path, show=False)
    assert begun == [2, 3] and record["results"]["accuracy"] == whole["results"]["accuracy"] and len(read_records(tmp_path)) == 1


def test_other_errors_are_failures_of_the_run(tmp_path, monkeypatch):
    fails_at(monkeypatch, 1, "mat1 and mat2 shapes cannot be multiplied")
    record, = run_grid([Run(target="digits", source="strokes", balance="none", n=300, epochs=1, batch_size=64)], tmp_path, show=False)
    assert record["status"] == "failed" and "shapes" in record["error"]["message"]


def test_bfloat16_where_there_is_none(monkeypatch):
    torch.manual_seed(0)
    teacher, source = Teacher(make_model("alexnet_half", SHAPE), 10, SHAPE), make_source("pyramid", SHAPE)
    pupil = lambda layout: make_model("alexnet_half", SHAPE, seed=1).to(memory_format=layout)
    learn = lambda bfloat16, layout=torch.contiguous_format: distill(teacher, pupil(layout), made(bfloat16), epochs=1, batch_size=16, views="flip", bfloat16=bfloat16, show=False).student
    made = lambda bfloat16: balance(source, teacher, 40, "none", bfloat16=bfloat16, show=False)[0]
    monkeypatch.setattr(core, "has_bfloat16", lambda device="cpu": False)
    for part in ("teachers.frozen", "students.distill"): monkeypatch.setattr(f"kd_arbitrary.{part}.has_bfloat16", lambda device="cpu": False)
    with pytest.warns(UserWarning, match="no units for bfloat16; going on in float32"): fallen = learn(True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain = learn(False, torch.channels_last)                   # float32 to the bit, in the layout that is faster for wide networks
    assert not next(p for p in fallen.parameters() if p.ndim == 4).is_contiguous()
    assert all(torch.equal(a, b) for a, b in zip(fallen.state_dict().values(), plain.state_dict().values()))


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_a_half_downloaded_archive(tmp_path, name):
    archive = tmp_path / OFFICIAL[name].files[0]
    archive.write_bytes(b"\x1f\x8b" + bytes(1_000))
    with pytest.raises(FileNotFoundError, match=rf"{archive.name} with 1,002 bytes.*downloaded in part.*Put the official {archive.name} there"):
        fetch(name, tmp_path, download=False)
    assert archive.stat().st_size == 1_002                                              # nothing was deleted or written


def test_a_teacher_of_another_number_of_classes():
    images = make_source("pyramid", SHAPE).draw(8, core.generator(0))
    hundred = make_model("wrn16_1", SHAPE, 100)
    with pytest.raises(ValueError, match=r"returned shape \[8, 100\] for 8 images; expected \[8, 10\] for logits of 10 classes"): Teacher(hundred, 10, SHAPE)(images)
    ten, many = Teacher(make_model("wrn16_1", SHAPE), 10, SHAPE), Teacher(hundred, 100, SHAPE)
    with pytest.raises(ValueError, match="the set has scores for 10 classes, the teacher has 100"):
        distill(many, make_model("wrn16_1", SHAPE, 100), label(images, ten), show=False)
    with pytest.raises(ValueError, match="the student has 10 outputs, the teacher 100 classes"):
        distill(many, make_model("wrn16_1", SHAPE), label(images, many), show=False)
