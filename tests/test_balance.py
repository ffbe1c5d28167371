"""What balance promises, for any teacher, source, size and seed."""
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings, strategies as st
from torch import nn

import kd_arbitrary.transfer.active  # noqa: F401  registers strategies
from kd_arbitrary.pictures.sources import make_source
from kd_arbitrary.studies.records import read_records
from kd_arbitrary.teachers.teacher import Teacher
from kd_arbitrary.transfer.balance import STRATEGIES, balance
from kd_arbitrary.transfer.diagnosis import STEPS_A_NUDGE
from kd_arbitrary.transfer.quotas import FillReport, quotas
from kd_arbitrary.transfer.sets import count_distinct

pytestmark = pytest.mark.filterwarnings("ignore:class.* got no image")      # asked for by empty="keep"
SHAPE = (1, 8, 8)
RESULTS = Path(__file__).resolve().parent.parent / "data/results"


def teacher(k: int, favour: float, seed: int) -> Teacher:
    "A random network with a preference for its first class."
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, k))
    with torch.no_grad():
        net[1].bias.copy_(-net[1].weight.sum(1) / 2)
        net[-1].weight *= 4
        net[-1].bias[0] += favour
    return Teacher(net, k, SHAPE)


class Small(Teacher):
    "A teacher that asks for few images at a time."
    def __call__(self, images, batch_size=1024): return super().__call__(images, 7)


cases = given(k=st.integers(2, 6), favour=st.floats(0, 3), n=st.integers(6, 300), seed=st.integers(0, 99),
              source=st.sampled_from(["uniform", "powerlaw", "shapes", "0.7*strokes+0.3*pyramid"]), strategy=st.sampled_from(list(STRATEGIES)))


@cases
@example(k=3, favour=3.0, n=11, seed=2, source="0.7*strokes+0.3*pyramid", strategy="fill")        # once nudged one picture twice
@settings(max_examples=40, deadline=None)
def test_promises(k, favour, n, seed, source, strategy):
    who = teacher(k, favour, seed)
    ts, report = balance(make_source(source, SHAPE), who, n, strategy, seed=seed, empty="keep", show=False)
    total = {c: torch.tensor(getattr(report, c)) for c in ("seen", "accepted", "perturbed", "repeated", "missing")}
    assert torch.equal(who(ts.images).argmax(1), ts.predicted)
    assert torch.equal(total["accepted"] + total["perturbed"] + total["repeated"], ts.counts)
    known = STRATEGIES.facts[strategy]                                  # who chooses draws more than is asked about
    assert total["seen"].sum() <= report.drawn if known.get("chooses") else total["seen"].sum() == report.drawn
    assert (total["accepted"] <= total["seen"]).all()
    copies = len(ts) - count_distinct(ts.images)
    flat = report.drawn - count_distinct(balance(make_source(source, SHAPE), who, report.drawn, "none", seed=seed, show=False)[0].images)
    assert copies <= total["repeated"].sum() + flat + (total["perturbed"].sum() if strategy in ("fill", "impress") and report.drawn < n else 0)
    if known.get("as_drawn"): assert len(ts) == n
    else: assert torch.equal(ts.counts + total["missing"], quotas(n, k))
    assert FillReport.from_dict(report.to_dict()) == report and ts.info["report"] == report.to_dict()


@cases
@settings(max_examples=15, deadline=None)
def test_same_seed_same_set_whatever_the_batch_size(k, favour, n, seed, source, strategy):
    who = teacher(k, favour, seed)
    small = Small(who.module, k, SHAPE)
    a, b = (balance(make_source(source, SHAPE), t, n, strategy, seed=seed, empty="keep", show=False)[0] for t in (who, small))
    assert torch.equal(a.images, b.images) and torch.equal(a.origin, b.origin)
    assert torch.allclose(a.scores, b.scores, atol=1e-5)


def test_a_nudge_costs_what_the_records_say():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                                     # some folders hold what is no record
        records = [r for folder in RESULTS.glob("*/") for r in read_records(folder)]
    reports = [r["report"] for r in records if r.get("report") and r["config"]["balance"] == "fill"]
    steps = [t["gradients"] / sum(t["perturbed"]) for t in reports if t.get("gradients") and sum(t["perturbed"])]
    assert len(steps) > 300 and round(sum(steps) / len(steps)) == STEPS_A_NUDGE
