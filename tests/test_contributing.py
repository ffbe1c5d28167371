"""What the page on contributing adds appears everywhere, when it is a file of the user's."""
import json
from pathlib import Path

import pytest

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
