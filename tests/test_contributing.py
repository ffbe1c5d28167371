"""What the page on contributing adds appears everywhere, when it is a file of the user's; and teachers that are published."""
import json
from pathlib import Path

import pytest

from kd_arbitrary.students.evaluate import evaluate
from kd_arbitrary.teachers.recipes import PUBLISHED, load_model
from kd_arbitrary.teachers.targets import load_target
from kd_arbitrary.teachers.teacher import Teacher
from processes import kd_distill

ROOT = Path(__file__).resolve().parent.parent
ADDED = dict(source="stripes", views="negative", student="one_layer", target="halves", balance="rarest", loss="brier")


@pytest.fixture(scope="module")
def plugin(tmp_path_factory):
    "The cells of the page that add something, as one file."
    cells = json.loads((ROOT / "nbs/tutorials/02_contributing.ipynb").read_text())["cells"]
    path = tmp_path_factory.mktemp("plugin") / "mine.py"
    path.write_text("\n\n".join("".join(cell["source"]) for cell in cells if cell["id"].startswith("contrib-add-")))
    return path


def test_help_lists_additions(plugin):
    without, told = kd_distill("--help").stdout, kd_distill("--plugin", plugin, "--help").stdout
    for name in ADDED.values(): assert name in told and name not in without


def test_a_run_of_nothing_but_additions(plugin, tmp_path):
    options = [word for name, value in ADDED.items() for word in (f"--{name}", value)]
    done = kd_distill("--plugin", plugin, *options, "--n", 300, "--epochs", 2, "--batch-size", 64, "--root", tmp_path, "--out", tmp_path / "out", "--json", "--quiet")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["balanced"]["config"]["source"] == "stripes" and 0 <= told["balanced"]["results"]["accuracy"] <= 1
    assert len(set(told["balanced"]["report"]["accepted"])) == 1                     # what the strategy promises
    refused = kd_distill(*options, "--out", tmp_path / "other")
    assert refused.returncode == 2 and "unknown target 'halves'" in refused.stderr


def test_a_plugin_that_is_not_there(tmp_path):
    refused = kd_distill("--plugin", tmp_path / "none.py", "--help")
    assert refused.returncode == 2 and "there is no plugin" in refused.stderr


def test_a_teacher_published_by_half_is_the_network_that_was_rounded(tmp_path, monkeypatch):
    "Half the file, the accuracy of what is in it, and never other weights under a name that records know."
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import publish
    whole, = PUBLISHED.glob("digits-*.safetensors")
    monkeypatch.setattr(publish, "PUBLISHED", tmp_path)
    half = publish.publish(whole, half=True)
    model, card = load_model(half)
    digits = load_target("digits")
    assert half.stat().st_size < 0.6 * whole.stat().st_size and card["stored"] == "float16"
    assert card["test_accuracy"] == evaluate(model, digits.test_images, digits.test_labels)["accuracy"]
    assert card["fingerprint"] == Teacher(model, tuple(card["classes"]), tuple(card["shape"])).fingerprint != load_model(whole)[1]["fingerprint"]
    assert publish.publish(whole, half=True) == half
    with pytest.raises(SystemExit, match="published with other weights"): publish.publish(whole)
