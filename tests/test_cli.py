"""The commands as a user meets them: what they print, the exit status, and what happens when they are interrupted."""
import json, os, re, signal, subprocess, sys
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from kd_arbitrary import cli
from kd_arbitrary.studies import comparison
from kd_arbitrary.storage import load_tensors
from kd_arbitrary.studies.grids import GRIDS
from kd_arbitrary.studies.runs import Run
from processes import Job, command

QUICK = ["--n", "300", "--epochs", "1", "--batch-size", "64", "--quiet"]
ROWS = ("unbalanced", "balanced", "original")


def distill(*arguments): return CliRunner().invoke(cli.distill_app, [str(a) for a in arguments])


def grid(*arguments): return CliRunner().invoke(cli.experiment_app, [str(a) for a in arguments])


def content(folder): return {p: p.read_bytes() for p in Path(folder).rglob("*") if p.is_file() and p.name != ".lock"}


def weights(out): return {name: load_tensors(out / name / "student.safetensors", "model")[0] for name in ROWS}


def same(a, b): return all(a[name].keys() == b[name].keys() and all(a[name][k].equal(b[name][k]) for k in a[name]) for name in a)


@pytest.fixture(scope="module")
def done(root, tmp_path_factory):
    "A finished job: its arguments and its output."
    out = tmp_path_factory.mktemp("done")
    arguments = [*QUICK, "--root", root, "--out", out]
    return out, arguments, distill(*arguments)


def test_table_and_files(done):
    out, _, result = done
    lines = result.stdout.splitlines()
    assert result.exit_code == 0 and result.stderr == ""
    assert [line.split("  ")[0] for line in lines[1:5]] == ["teacher", "student, unbalanced", "student, balanced (fill)", "student, original data"]
    assert lines[0].split() == ["images", "accuracy", "agreement", "teacher", "queries", "seconds"] and all("%" in line for line in lines[1:5])
    listed = {Path(folder) / name for folder, names in (line.split("  ") for line in lines[6:]) for name in names.split(", ")}
    assert listed == {out / name for name in ("report.html", "run.json", "summary.png")} | {
        out / "{balanced,original,unbalanced}" / re.sub("^[0-9a-f]{16}", "KEY", p.name) for p in content(out) if p.parent == out / "balanced"}
    for name in ROWS:
        assert {"transfer.safetensors", "checkpoint.safetensors", "student.safetensors", "run.json"} < {p.name for p in (out / name).iterdir()}


def test_the_same_command_again_changes_nothing(done):
    out, arguments, result = done
    before = content(out)
    assert distill(*arguments).stdout == result.stdout and content(out) == before


def test_json_stands_alone_on_stdout(done):
    out, arguments, _ = done
    words = [sys.executable, "-m", "kd_arbitrary.cli", *map(str, arguments), "--json"]             # as a user starts it
    result = subprocess.run(words, capture_output=True, text=True, check=True)
    told = json.loads(result.stdout)
    assert result.stdout.count("\n") == 1 and result.stderr == ""
    assert all(told[name]["status"] == "done" and told[name]["results"]["queries"] > 0 for name in ROWS) and 0.9 < told["teacher"]["accuracy"] <= 1


@pytest.mark.parametrize("arguments, says", [
    (["--target", "digit"], "unknown target 'digit'; expected one of: digits, mnist, fmnist, cifar10, cifar100, kmnist_half, notmnist_half, cifar100_coarse. Did you mean 'digits'?"),
    (["--source", "stroke"], "Did you mean 'strokes'"), (["--source", "a b"], "cannot read the source"), (["--student", "lenet"], "lenet5_half"),
    (["--balance", "even"], "none, quota, repeat, reweight, fill"), (["--views", "blur"], "expected one of: affine"), (["--loss", "ce"], "kl, mse, l1"),
    (["--n", "3"], "n=3 images cannot cover 10 classes"), (["--temperature", "0"], "temperature must be positive"), (["--device", "abacus"], "auto, cpu or cuda"),
    (["--seed", "1"], "differs in seed (0 there, 1 here)"), (["--n", "many"], "valid integer"), (["--colour", "red"], "--colour")])
def test_wrong_arguments(done, arguments, says):
    out, right, _ = done
    before = content(out)
    result = distill(*right, *arguments)
    assert result.exit_code == 2 and says in result.stderr and "Traceback" not in result.stderr and result.stdout == ""
    assert content(out) == before


def test_help_and_version():
    told = " ".join(distill("--help").stdout.split())                                # lines break where the columns end
    assert all(option in told for option in ("--target", "--relabel", "--no-relabel", "--json", "--debug", "digits, mnist", "none, quota"))
    assert distill("--version").stdout.startswith("kd_arbitrary ") and grid("--version").exit_code == 0
    assert all(name in grid("--help").stdout for name in ("list", "run", "status", "table", "smoke"))


def test_a_run_that_cannot_be_done_fails_in_one_line(root, tmp_path):
    arguments = [*QUICK, "--root", root, "--out", tmp_path, "--source", "array(path='none.npz')"]
    result = distill(*arguments)
    assert result.exit_code == 1 and result.stderr.startswith("error: none.npz does not exist") and result.stderr.count("\n") == 1
    assert isinstance(distill(*arguments, "--debug").exception, FileNotFoundError)


@pytest.mark.parametrize("name", ["transfer.safetensors", "checkpoint.safetensors"])
def test_a_cut_file_is_named_and_nothing_is_touched(root, tmp_path, name):
    arguments = [*QUICK, "--root", root, "--out", tmp_path, "--balance", "none"]
    distill(*arguments)
    folder = tmp_path / "unbalanced"
    next(p for p in folder.glob("*.json") if len(p.stem) == 16).unlink()
    (folder / name).write_bytes((folder / name).read_bytes()[:-50])
    before = content(tmp_path)
    result = distill(*arguments)
    assert result.exit_code == 1 and f"{name} is truncated" in result.stderr and content(tmp_path) == before


def test_a_killed_job_ends_as_if_nothing_had_happened(root, tmp_path):
    arguments = ["--n", 300, "--epochs", 12, "--batch-size", 32, "--quiet", "--root", root, "--out"]
    job = Job(command, *arguments, tmp_path / "killed")
    assert job.until((tmp_path / "killed/balanced/checkpoint.safetensors").exists)
    assert job.killed().returncode == -signal.SIGKILL and not (tmp_path / "killed/balanced/student.safetensors").exists()
    for name in ("killed", "whole"): assert (done := distill(*arguments, tmp_path / name)).exit_code == 0, done.output
    assert same(weights(tmp_path / "killed"), weights(tmp_path / "whole"))


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_harms_nothing(done, monkeypatch, call):
    out, arguments, result = done
    record = next(p for p in (out / "balanced").glob("*.json") if len(p.stem) == 16)
    old = json.loads(record.read_text())
    record.unlink()
    before = content(out)
    def full(*args): raise OSError(28, "No space left on device")
    with monkeypatch.context() as m:
        m.setattr(os, call, full)
        failed = distill(*arguments)
    assert failed.exit_code == 1 and "No space left on device" in failed.stderr and failed.stderr.count("\n") == 1 and content(out) == before
    assert distill(*arguments).exit_code == 0 and json.loads(record.read_text())["results"] == old["results"]


def test_a_small_set_beside_the_large_one(root, tmp_path, monkeypatch):
    monkeypatch.setattr(comparison, "SCARCE", comparison.SCARCE | dict(updates=10))
    told = json.loads(distill(*QUICK, "--few", 40, "--root", root, "--out", tmp_path, "--json").stdout)
    small = [told[f"few-{name}"] for name in ("unbalanced", "balanced", "queries")]
    assert [r["config"]["n"] for r in small[:2]] == [40, 40] and [r["config"]["balance"] for r in small] == ["none", "fill", "none"]
    assert small[0]["results"]["queries"] == 40 < small[1]["results"]["queries"] == small[2]["config"]["n"] == small[2]["results"]["queries"]
    assert [line.split("  ")[0] for line in distill(*QUICK, "--few", 40, "--root", root, "--out", tmp_path).stdout.splitlines()[2:5]] == [
        "student, unbalanced", "student, balanced (fill)", "student, unbalanced, as many queries"]
    page = (tmp_path / "report.html").read_text()
    assert "--few 40" in page and "taught with 300 of strokes" in page


def test_what_changes_nothing_is_refused(tmp_path):
    for said, told in (("--source labels --init teacher --loss mse --limit 100", "--limit 100, --loss mse, --init teacher: no effect with --source labels --balance none"),
                       ("--source dafl --balance none --limit 100", "--limit 100: no effect with --source dafl"),
                       ("--source dafl --no-relabel --views affine", "--no-relabel: no effect with --source dafl"), ("--cached-views 3", "--cached-views 3: no effect")):
        refused = distill(*said.split(), "--out", tmp_path / "never")
        assert refused.exit_code == 2 and told in refused.stderr and not (tmp_path / "never").exists(), refused.stderr
    planned = {}
    with pytest.MonkeyPatch.context() as m:
        m.setattr(cli, "compare", lambda runs, *_: planned.update(runs) or {})
        m.setattr(cli, "_tell", lambda *_: None)
        assert distill("--balance", "none", "--limit", 300, "--out", tmp_path / "a").exit_code == 0 and planned["unbalanced"].n == 300
        assert distill("--source", "original", "--out", tmp_path / "b").exit_code == 0 and planned["original"].balance == "none"


def test_no_more_images_than_there_are(root, tmp_path):
    np.savez(tmp_path / "few.npz", images=np.random.default_rng(0).integers(0, 256, (150, 28, 28), np.uint8))
    arguments = ["--source", f"array(path='{tmp_path / 'few.npz'}')", "--epochs", 1, "--batch-size", 64, "--root", root, "--out", tmp_path / "out"]
    for option in ("--n", "--few"):
        refused = distill(*arguments, option, 151)
        assert refused.exit_code == 2 and f"{option} 151" in refused.stderr and "has 150 images" in refused.stderr
    told = json.loads(distill(*arguments, "--empty", "keep", "--json").stdout)
    told = {name: r for name, r in told.items() if name in comparison.LABELS}
    assert {r["config"]["n"] for r in told.values()} == {150} and list(told) == ["unbalanced", "balanced", "original"]      # no small set beside so few


def test_grid_commands(root, tmp_path, monkeypatch):
    quick = [Run(target="digits", source=s, balance=b, n=300, epochs=1) for s in ("strokes", "array(path='none.npz')") for b in ("none", "fill")]
    monkeypatch.setitem(GRIDS, "quick", lambda: quick)
    where = ["--results", tmp_path]
    assert "not run" in grid("table", "quick", *where).stdout and grid("status", "quick", *where).stdout == "quick: 4 not run\n"
    good = grid("run", "quick", "--only", "strokes", "--executor", "processes", "--root", root, "--quiet", *where)
    assert (good.exit_code, good.stdout) == (0, "quick: 2 done\n")
    bad = grid("run", "quick", "--root", root, "--quiet", *where)
    assert (bad.exit_code, bad.stdout) == (1, "quick: 2 done, 2 failed\n") and "FileNotFoundError: none.npz does not exist" in bad.stderr
    told = grid("table", "quick", *where).stdout
    assert "strokes" in told and "(1)" in told and "failed" in told
    assert "quick" in grid("list", "--only", "n=300", *where).stdout
    assert grid("run", "quack", *where).exit_code == 2 and "Did you mean 'quick'" in grid("run", "quack", *where).stderr
