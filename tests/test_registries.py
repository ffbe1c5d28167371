"What every source, view and loss must keep to, whoever adds it: the registries say which there are."
import inspect
import json
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings, strategies as st

from kd_arbitrary.core import generator
from kd_arbitrary.pictures.noise import SOURCES
from kd_arbitrary.pictures.sources import make_source
from kd_arbitrary.pictures.views import VIEWS, make_views
from kd_arbitrary.students.losses import LOSSES
from kd_arbitrary.studies import runs  # noqa: F401, all pages whose things enter a registry
from kd_arbitrary.transfer.balance import STRATEGIES

DRAWN = [*SOURCES.where(kind="noise"), *SOURCES.where(kind="synthetic")]
OFFLINE = [*DRAWN, *SOURCES.where(kind="natural", offline=True)]
SHAPES = st.sampled_from([(1, 28, 28), (3, 32, 32), (1, 16, 24), (3, 9, 8)])
few = settings(max_examples=4, deadline=None, derandomize=True)


def same(a, b): return a.dtype == b.dtype and torch.equal(a, b)


@pytest.mark.parametrize("name", DRAWN)
@few
@given(n=st.integers(0, 9), shape=SHAPES, seed=st.integers(0, 2**31))
def test_a_drawn_source_depends_on_its_generator_alone(name, n, shape, seed):
    draw, state = SOURCES[name], torch.get_rng_state()
    images = draw(n, shape, generator(seed))
    torch.manual_seed(seed + 1)
    again = draw(n, shape, generator(seed))
    torch.set_rng_state(state)
    assert images.shape == (n, *shape) and same(images, again)
    assert images.dtype == (torch.float16 if images.is_floating_point() else torch.uint8) and images.isfinite().all()


@pytest.mark.parametrize("name", DRAWN)
def test_a_drawn_source_leaves_the_global_generator_alone(name):
    before = torch.get_rng_state()
    SOURCES[name](3, (1, 16, 16), generator(0))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("name", DRAWN)
def test_options_of_a_source_have_defaults_and_can_be_written(name):
    more = list(inspect.signature(SOURCES[name]).parameters.values())[3:]
    assert all(p.kind is p.KEYWORD_ONLY and p.default is not p.empty for p in more)
    text = f"{name}({', '.join(f'{p.name}={p.default!r}' for p in more)})" if more else name
    plain, written = make_source(name, (1, 16, 16)), make_source(text, (1, 16, 16))
    assert same(plain.draw(4, generator(3)), written.draw(4, generator(3))) and written.text == text


@pytest.mark.parametrize("name", OFFLINE)
def test_a_source_streams_distinct_pictures_alone_and_in_a_mixture(name):
    shape = (3, 16, 16)
    source = make_source(name, shape)
    (first, origin), (second, _) = (block for block, _ in zip(source.stream(0, 24), range(2)))
    assert first.shape == second.shape == (24, *shape) and not origin.any()
    assert len(torch.cat([first, second]).flatten(1).unique(dim=0)) >= 44                  # repeats are rare
    assert not torch.equal(first, next(source.stream(1, 24))[0])
    blocks = [make() for (size, make), _ in zip(source.blocks(0, 24), range(2))][::-1]      # made in any order
    assert same(blocks[1][0], first) and same(blocks[0][0], second)
    mixed = make_source(f"0.5*{name} + 0.5*{'gaussian' if name == 'uniform' else 'uniform'}", shape)
    images, origin = next(mixed.stream(0, 64))
    assert images.shape == (64, *shape) and 8 <= int((origin == 0).sum()) <= 56


@pytest.mark.parametrize("name", list(VIEWS))
@few
@given(n=st.integers(1, 9), shape=SHAPES, seed=st.integers(0, 2**31))
def test_a_view_makes_pictures_of_pictures(name, n, shape, seed):
    images = torch.rand(n, *shape, generator=generator(seed))
    kept, view = images.clone(), make_views(name)
    out = view(images, generator(seed, 1))
    assert torch.equal(images, kept), "the batch is not changed in place"
    assert out.shape == images.shape and out.isfinite().all() and same(out, view(images, generator(seed, 1)))
    assert out.min() >= -1e-5 and out.max() <= 1 + 1e-5
    flat = torch.full_like(images, 0.5)
    assert name == "speckle" or view(flat, generator(seed)).max() <= 0.5 + 1e-5             # no light from nowhere, but grains


@pytest.mark.parametrize("name", list(LOSSES))
@few
@given(n=st.integers(1, 9), k=st.integers(2, 12), seed=st.integers(0, 2**31), temperature=st.floats(0.5, 20))
def test_a_loss_is_least_where_the_student_is_the_teacher(name, n, k, seed, temperature):
    g = generator(seed)
    scores, other = torch.randn(2, n, k, generator=g)
    student = other.clone().requires_grad_()
    loss = LOSSES[name](student, scores, "logits", temperature)
    assert loss.ndim == 0 and loss.isfinite()
    loss.backward()
    assert student.grad.isfinite().all()
    assert LOSSES[name](scores, scores, "logits", temperature) <= loss.detach() + 1e-5
    halves = torch.stack([LOSSES[name](other[i: i + 1], scores[i: i + 1], "logits", temperature) for i in range(n)])
    assert torch.allclose(halves.mean(), loss.detach(), rtol=1e-4, atol=1e-5), "a mean over the batch, which ranks divide"


def test_the_gallery_shows_everything():
    page = json.loads((Path(__file__).parent.parent / "nbs/tutorials/04_gallery.ipynb").read_text())
    html = "".join("".join(o.get("data", {}).get("text/html", [])) for c in page["cells"] for o in c.get("outputs", []))
    shown = set(re.findall(r"<b>(\w+)</b>", html))
    lacking = {*SOURCES, *VIEWS, *STRATEGIES} - shown
    assert not lacking, "run tools/run_notebooks.py nbs/tutorials/04_gallery.ipynb"
    assert html.count("<img") == 2 * len(OFFLINE) + 2 * len(VIEWS)
