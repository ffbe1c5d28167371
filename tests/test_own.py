"""The user's own teacher, as the user meets it: on the command line, with files of strangers, killed and started again."""
import json, shlex, signal, sqlite3, sys, time
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from typer import Exit
from typer.testing import CliRunner

from kd_arbitrary import cli
from kd_arbitrary.options import exit_with
from kd_arbitrary.pictures import files
from kd_arbitrary.students.export import export_student, load_student
from kd_arbitrary.transfer.balance import read_made
from processes import Job, command, kd_distill as distill

LETTERS = "abcdefghijklmnopqrstuvwxyz"
SMALL = ["--input-shape", "3,24,24", "--student", "wrn16_1", "--n", "400", "--epochs", "1", "--batch-size", "64", "--quiet"]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    "A network of 26 letters as TorchScript, a function that only labels, names in a file, and a folder with damaged pictures."
    at = tmp_path_factory.mktemp("own")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 5, 2), nn.ReLU(), nn.Flatten(), nn.Linear(800, 26)).eval()
    with torch.no_grad(): net[-1].weight *= 8
    torch.jit.trace(net, torch.rand(2, 3, 24, 24)).save(str(at / "letters.ts"))
    (at / "names.txt").write_text("\n".join(LETTERS))
    (at / "ask.py").write_text(f"import time, torch\nnet = torch.jit.load({str(at / 'letters.ts')!r})\n"
                               "def label(x):\n    time.sleep(0.02)\n    with torch.no_grad(): return net(x).argmax(1)\n")
    rng = np.random.default_rng(0)
    (at / "pictures").mkdir()
    for i in range(300): Image.fromarray(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)).save(at / f"pictures/{i:03d}.png")
    (at / "pictures/broken.jpg").write_bytes(b"\xff\xd8 no picture"), (at / "pictures/empty.png").touch()
    return at


def test_own_network_and_own_pictures(home, tmp_path):
    words = ["--teacher", home / "letters.ts", "--classes", home / "names.txt", "--images", home / "pictures", *SMALL, "--empty", "keep", "--export", "pt2", "--json"]
    done = distill(*words, "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["teacher"]["classes"] == list(LETTERS) and told["job"]["n"] == 300 and told["job"]["balance"] == "fill"
    assert "2 of 302 pictures are left out" in done.stderr and told["export_differs"] < 1e-3
    model, card = load_student(tmp_path / "run/student.safetensors")
    assert card["classes"] == list(LETTERS) and model(torch.rand(1, 3, 24, 24)).shape == (1, 26)
    strict = distill(*words, "--strict", "--out", tmp_path / "strict")
    assert strict.returncode == 1 and "broken.jpg" in strict.stderr and strict.stdout == ""


def test_of_a_large_folder_no_more_is_read_than_is_of_use(home, tmp_path, monkeypatch):
    words = ["--teacher", home / "letters.ts", "--classes", home / "names.txt", "--images", home / "pictures", *SMALL, "--n", "26", "--balance", "none", "--views", "none"]
    read = []
    real = files._pixels
    monkeypatch.setattr(files, "_pixels", lambda what, shape: read.append(1) or real(what, shape))
    status, told, _ = called(cli.distill_app, *words, "--empty", "keep", "--out", tmp_path / "run")
    assert status == 0 and "94 more pictures: what was read is all that a set of this size may ask about" in told     # 302 - 8 x 26
    assert len(read) <= 208 and "94 more pictures" in (tmp_path / "run/report.html").read_text()
    assert "most=208" in read_made(tmp_path / "run/transfer.safetensors").info["source"]


def test_a_budget_holds_through_kills(home, tmp_path):
    words = ["--teacher", f"{home / 'ask.py'}:label", "--classes", "26", *SMALL, "--n", "300", "--budget", "500", "--empty", "keep", "--out", tmp_path / "run"]
    ledger, kills = tmp_path / "run/answers.sqlite", 0
    def count(table, what): return sqlite3.connect(ledger, timeout=30).execute(f"SELECT {what} FROM {table}").fetchone()[0] or 0
    for patience in (0.05, 0.2):
        job = Job(command, *words)
        job.until(ledger.exists, 60)
        time.sleep(patience)
        kills += job.running()
        job.killed()
    done = distill(*words, "--json")
    assert kills and (done.returncode == 0 or "the budget of 500 questions is spent" in done.stderr), done.stderr
    assert count("paid", "SUM(images)") <= 500 and count("paid", "SUM(images)") >= count("answers", "COUNT(*)") > 100
    assert count("paid", "SUM(images)") - count("answers", "COUNT(*)") <= 64 * kills                   # at the most the batch that was under way


def called(app, *words):
    "The command in this process, which saves the imports."
    done = CliRunner().invoke(app, [str(w) for w in words])
    return done.exit_code, done.stdout, done.stderr


def test_refused_before_anything_is_made(home, tmp_path):
    whole = ["--teacher", home / "letters.ts", "--input-shape", "3,24,24"]
    (tmp_path / "test/seven").mkdir(parents=True)
    (tmp_path / "file.py").write_text("from torch import nn\ndef narrow(): return nn.Sequential(nn.Flatten(), nn.Linear(1728, 3))")
    cases = [(["--teacher", home / "none.ts"], 1, "does not exist"), (["--teacher", home / "letters.ts"], 1, "(--input-shape 3,32,32)"),
             (["--teacher", home / "letters.ts", "--input-shape", "3x24"], 2, "e.g. 3,32,32"), ([*whole, "--mean", "half"], 2, "e.g. 0.5,0.5,0.5"),
             ([*whole, "--images", "x", "--source", "pyramid"], 2, "name one"), ([*whole, "--classes", "a,b"], 1, "26 classes, but 2 are named"),
             ([*whole, "--export", "tflite"], 2, "unknown kind of export"), ([*whole, "--views", "blur"], 2, "unknown view 'blur'"),
             ([*whole, "--loss", "ce"], 2, "kl, mse, l1"), ([*whole, "--epochs", "0"], 2, "(--epochs)"), ([*whole, "--budget", "1"], 2, "(--budget)"),
             ([*whole, "--init", "teacher"], 2, "--init belongs to a benchmark"), ([*whole, "--target", "digits"], 2, "leave out --target"),
             ([*whole, "--impressed", "0.3"], 2, "--impressed belongs to --balance impress"), ([*whole, "--balance", "impress", "--ahead", "-1"], 2, "ahead must be a whole number of views"),
             ([*whole, "--mean", "0.5,0.5"], 1, "mean has 2 numbers, the images have 3 channels"), ([*whole, "--n", "20"], 1, "20 images cannot cover 26 classes"),
             ([*whole, "--test", tmp_path / "test"], 1, "no classes: seven"), ([*whole, "--student", f"{tmp_path}/file.py:narrow"], 1, "gives [2, 3] for 2 images of 26"),
             ([*whole, "--student", "torchvision:resnet19"], 1, "no network 'resnet19'"), ([*whole, "--images", tmp_path / "test"], 1, "holds no pictures")]
    for words, status, message in cases:
        code, out, err = called(cli.distill_app, *words, "--out", tmp_path / "run", "--quiet")
        assert (code, message in err, out, err.count("\n")) == (status, True, "", 1), (words, err)
    assert not list((tmp_path / "run").glob("*.safetensors"))


def test_mere_weights_and_what_a_file_says(home, tmp_path):
    "Weights with the network of a file; the file's constants; the same answers as the network itself."
    from safetensors.torch import save_file
    net = torch.jit.load(str(home / "letters.ts"))
    save_file({k.removeprefix("net."): v.contiguous() for k, v in net.state_dict().items()}, str(tmp_path / "letters.safetensors"))
    (tmp_path / "net.py").write_text("""from torch import nn
INPUT_SHAPE, CLASSES = (3, 24, 24), "abcdefghijklmnopqrstuvwxyz"
class Net(nn.Sequential):
    def __init__(self): super().__init__(nn.Conv2d(3, 8, 5, 2), nn.ReLU(), nn.Flatten(), nn.Linear(800, 26))
""")
    look = ["--sample", "50", "--json", "--results", tmp_path]
    whole = called(cli.diagnose_app, "--teacher", home / "letters.ts", "--input-shape", "3,24,24", "--classes", home / "names.txt", *look)
    mere = called(cli.diagnose_app, "--teacher", tmp_path / "letters.safetensors", "--arch", f"{tmp_path}/net.py:Net", "--input-shape", "3,24,24", "--classes", home / "names.txt", *look)
    told = [json.loads(out) for code, out, err in (whole, mere)]
    assert told[0]["counts"] == told[1]["counts"] and told[0]["classes"] == list(LETTERS)
    code, out, err = called(cli.diagnose_app, "--teacher", f"{tmp_path}/net.py:Net", *look)                # says shape and names itself
    assert code == 0 and json.loads(out)["classes"] == list(LETTERS) and err == ""
    assert called(cli.diagnose_app, "--teacher", tmp_path / "letters.safetensors", *look)[0::2] == (1, "error: " + str(tmp_path / "letters.safetensors")
        + " holds weights only; name the network they are for: arch=..., on the command line --arch FILE.py:NAME, timm:NAME or torchvision:NAME\n")


def test_a_look_is_not_paid_twice(home, tmp_path):
    "What kd_diagnose asked a black box, kd_distill does not ask again; what a model prints does not come between."
    (tmp_path / "loud.py").write_text((home / "ask.py").read_text().replace("def label(x):", "def label(x):\n    print('asked')"))
    words = ["--teacher", f"{tmp_path / 'loud.py'}:label", "--classes", "26", "--input-shape", "3,24,24", "--ledger", tmp_path / "answers.sqlite"]
    code, out, err = called(cli.diagnose_app, *words, "--n", "200", "--sample", "100", "--json", "--out", tmp_path / "look.svg")
    assert code == 0 and json.loads(out)["sample"] == 100 and "asked\n" in err and (tmp_path / "look.svg").read_text().startswith("<?xml")
    paid = lambda: sqlite3.connect(tmp_path / "answers.sqlite").execute("SELECT SUM(images) FROM paid").fetchone()[0]
    assert paid() == 102
    code, out, err = called(cli.distill_app, *words, "--n", "200", "--balance", "none", "--student", "wrn16_1", "--epochs", "1", "--views", "none", "--out", tmp_path / "run", "--json", "--quiet")
    assert code == 0 and json.loads(out)["paid"] == paid() == 202, err


@pytest.mark.skipif(not (find_spec("onnxruntime") and find_spec("onnx")), reason="needs the extra onnx")
def test_from_onnx_to_a_smaller_onnx(home, tmp_path):
    torch.onnx.export(torch.jit.load(str(home / "letters.ts")), (torch.rand(2, 3, 24, 24),), str(tmp_path / "t.onnx"), dynamo=False, input_names=["x"],
                      dynamic_axes={"x": {0: "n"}})
    done = distill("--teacher", tmp_path / "t.onnx", *SMALL, "--empty", "keep", "--export", "onnx", "--out", tmp_path / "run", "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["job"]["balance"] == "repeat" and (tmp_path / "run/student.onnx").exists() and told["paid"] >= 400


@pytest.mark.skipif(not (find_spec("onnxruntime") and find_spec("onnx")), reason="needs the extra onnx")
def test_an_export_that_fails_prints_no_graph(tmp_path, capfd):
    class Rooted(nn.Module):
        def forward(self, x): return nn.functional.rms_norm(x.flatten(1)[:, :4], (4,))                 # no operator of the exporter's
    with pytest.raises(ValueError, match="cannot be written as s.onnx"): export_student(Rooted(), tmp_path / "s.onnx", (1, 8, 8), tuple("abcd"))
    assert capfd.readouterr().out == ""


def test_stopped_it_says_how_to_go_on(home, tmp_path):
    words = ["--teacher", home / "letters.ts", *SMALL, "--epochs", "40", "--empty", "keep", "--out", tmp_path / "run"]
    job = Job(command, *words)
    assert job.until((tmp_path / "run/transfer.safetensors").exists)
    job.send(signal.SIGINT)
    job.wait(120)
    assert (job.returncode, job.stdout) == (130, "") and job.stderr.endswith("stopped; the same command goes on from here\n"), job.stderr
    made = (tmp_path / "run/transfer.safetensors").stat().st_mtime_ns
    done = distill(*words, "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["history"][-1]["epoch"] == 40, done.stderr
    assert (tmp_path / "run/transfer.safetensors").stat().st_mtime_ns == made and (tmp_path / "run/report.html").exists()


@pytest.fixture
def interruptible():
    "Ctrl-C as a terminal has it; a shell in the background has its children ignore it."
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_an_interrupt_is_one_where_compiled_code_made_another_error_of_it(interruptible, capsys):
    "TorchScript passes an interrupt of the Python that it calls on as an error without words."
    with pytest.raises(Exit) as left, exit_with(1):
        try: signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt: raise RuntimeError("") from None
    assert left.value.exit_code == 130 and capsys.readouterr().err == "stopped; the same command goes on from here\n"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    with pytest.raises(Exit) as left, exit_with(1): raise RuntimeError("no luck")
    assert left.value.exit_code == 1


def report(*words):
    "`kd_report` with these words."
    sys.argv = ["kd_report", *map(str, words)]
    cli.report_main()


def test_what_was_said_is_said_again_and_costs_nothing(home, tmp_path):
    "A ledger, a plugin with the student, and test pictures of which one is empty; the report's command repeats them."
    (plug := tmp_path / "plug.py").write_text("from torch import nn\nfrom kd_arbitrary.teachers.networks import MODELS\n@MODELS.add\n"
                                              "def tiny(shape, classes): return nn.Sequential(nn.Flatten(), nn.Linear(shape[0] * shape[1] * shape[2], classes))\n")
    for name in ("a", ".ipynb_checkpoints", "b"): (tmp_path / "test" / name).mkdir(parents=True)
    (tmp_path / "test/a/0.png").write_bytes((home / "pictures/000.png").read_bytes()), (tmp_path / "test/a/1.png").touch()
    words = ["--teacher", f"{home / 'ask.py'}:label", "--classes", ",".join(LETTERS), "--input-shape", "3,24,24", "--source", "pyramid", "--n", "60", "--balance", "none",
             "--epochs", "1", "--views", "flip", "--cached-views", "1", "--student", "tiny", "--plugin", plug, "--ledger", tmp_path / "answers.sqlite", "--device", "cpu", "--quiet"]
    done = distill(*words, "--test", tmp_path / "test", "--out", tmp_path / "run")
    assert done.returncode == 0 and "of 1 test images, 1 left out" in done.stdout, done.stderr
    paid = lambda: sqlite3.connect(tmp_path / "answers.sqlite").execute("SELECT SUM(images) FROM paid").fetchone()[0]
    before, page = paid(), (tmp_path / "run/report.html").read_text()
    told = json.loads(Job(report, tmp_path / "run", "--json", "--plugin", plug).wait().stdout)
    assert "asked" in told["runs"]["run"]["heldout"] and told["runs"]["run"]["record"]["paid"] == before
    again = distill(*shlex.split(told["command"])[1:], "--quiet")
    assert (again.returncode, again.stdout) == (0, done.stdout) and paid() == before and (tmp_path / "run/report.html").read_text() == page, again.stderr
    assert distill(*words, "--ledger", tmp_path / "other.sqlite", "--out", tmp_path / "run").returncode == 0 and paid() == before
    assert not list(tmp_path.glob("*/answers.sqlite")) and not (tmp_path / "other.sqlite").exists()
    plain = Job(report, tmp_path / "run").wait()                                        # whoever has no plugin gets a report all the same
    assert plain.returncode == 0 and "the student cannot be made again. unknown model &#x27;tiny&#x27;" in (tmp_path / "run/report.html").read_text(), plain.stderr
    strict = distill(*words, "--test", tmp_path / "test", "--strict", "--out", tmp_path / "strict")
    assert strict.returncode == 1 and "1.png" in strict.stderr and paid() == before


def _on_a_full_disk(*words):
    import resource
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    command(*words)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="sets limits")
def test_a_full_disk_and_a_place_that_is_none(home, tmp_path):
    words = ["--teacher", f"{home / 'ask.py'}:label", "--classes", "26", *SMALL, "--empty", "keep"]
    full = Job(_on_a_full_disk, *words, "--out", tmp_path / "run").wait()
    assert full.returncode == 1 and "run/answers.sqlite" in full.stderr and "Free some space" in full.stderr, full.stderr
    (tmp_path / "file").touch()
    wrong = distill(*words, "--out", tmp_path / "file/run")
    assert wrong.returncode == 1 and "choose a place that you may use (--out" in wrong.stderr and wrong.stderr.count("\n") == 1
