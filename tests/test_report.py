"""The report from the command line, and the command that it prints read back."""
import json, shlex
from dataclasses import asdict

import pytest
from typer.testing import CliRunner

from kd_arbitrary import cli
from kd_arbitrary.studies.own import Job
from kd_arbitrary.studies.report import command_of
from kd_arbitrary.studies.runs import Run

JOBS = [Job(teacher="model.onnx", source="folder(path='my pictures')", n=700, balance="repeat", student="timm:resnet18", views="none", classes=("a,b", "it's"), budget=900),
        Job(teacher="ask.py:label", source="0.5*strokes + 0.5*powerlaw(alpha=(0.5, 2))", classes=26, input_shape=(3, 24, 24), gives="top", relabel=False, bfloat16=True),
        Job(teacher="torchvision:resnet18", source="array(path='x.npy')", mean=(0.5,), std=(0.25, 0.5, 1.5), input_range=(-1.0, 1.0), multi_label=True, allow_pickle=True, seed=3),
        Job(teacher="http://localhost:80/ask", source="folder(path='pictures', strict=True)", classes=("1", "2"), lr=0.003, temperature=1.5, limit=99, empty="keep"),
        Job(teacher="model.onnx", source="strokes", n=900, balance="impress", impressed=0.25, ahead=2)]
RUNS = [Run(target="digits", source="pyramid", n=500, epochs=3), Run(target="fmnist", source="glyphs", balance="impress", impressed=1 / 3, ahead=1),
        Run(target="mnist", source="original", balance="none", epochs=7, views="none"),
        Run(target="cifar10", source="0.5*strokes + 0.5*spectra", relabel=False, cached_views=2, init="teacher", teacher_seed=2, seed=5, bfloat16=True)]


def parsed(monkeypatch, command: str):
    "What kd_distill would do."
    got = []
    monkeypatch.setattr(cli, "distil_own", lambda job, out, *args, **kw: got.append((job, str(out))))
    monkeypatch.setattr(cli, "claim", lambda *args: None)
    def compare(runs, out, *args):
        got.append((runs.get("balanced") or runs.get("original") or next(iter(runs.values())), str(out)))
        raise SystemExit
    monkeypatch.setattr(cli, "compare", compare)
    words = shlex.split(command)
    result = CliRunner().invoke(cli.distill_app, words[1:])
    assert words[0] == "kd_distill" and got, result.output
    return got[0]


@pytest.mark.parametrize("settings", [*JOBS, *RUNS], ids=lambda s: f"{s.teacher} {s.source}")
def test_the_command_gives_the_same_settings(monkeypatch, settings):
    kept = json.loads(json.dumps(asdict(settings)))                         # as they stand in a file
    back, out = parsed(monkeypatch, command_of(kept, "some where"))
    assert json.loads(json.dumps(asdict(back))) == kept and out == "some where"


def test_kd_report(root, tmp_path):
    report = lambda *words: CliRunner().invoke(cli.report_app, [str(w) for w in words])
    made = CliRunner().invoke(cli.distill_app, ["--n", "200", "--epochs", "1", "--batch-size", "64", "--quiet", "--root", str(root), "--out", str(tmp_path / "run")])
    assert made.exit_code == 0 and "report.html" in made.stdout, made.output
    page = (tmp_path / "run/report.html").read_text()
    for what in ("run", "run/balanced"):
        done = report(tmp_path / what, "--out", tmp_path / "other/page.html")
        assert (done.exit_code, done.stdout) == (0, f"{tmp_path}/other/page.html\n") and (what == "run") == ((tmp_path / "other/page.html").read_text() == page)
    told = json.loads(report(tmp_path / "run", "--json").stdout)
    assert f"--root {root}" in told["command"]                                                   # where the teacher was found
    assert set(told["runs"]) == {"unbalanced", "balanced", "original"} and sum(told["runs"]["balanced"]["heldout"]["asked"]) == 10
    assert f'root="{root}"' in json.loads(report(tmp_path / "run/balanced", "--json").stdout)["command"].replace("\\", "")
    (tmp_path / "run/balanced/student.safetensors").unlink()                                      # what is gone is left out
    assert report(tmp_path / "run/balanced").exit_code == 0
    for what, says in (("none", "does not exist"), ("other", "neither job.json nor a record")):
        failed = report(tmp_path / what)
        assert (failed.exit_code, failed.stdout, failed.stderr.count("\n")) == (2, "", 1) and says in failed.stderr
    (tmp_path / "full").write_text("")
    blocked = report(tmp_path / "run", "--out", tmp_path / "full/page.html")
    assert blocked.exit_code == 1 and "could not write" in blocked.stderr
