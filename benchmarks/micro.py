"""Before and after: the measurements behind single choices of the library."""
import copy
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import torch
from torch import nn
from torch.func import functional_call, stack_module_state

from benchmarks.contenders import Contender, loader
from benchmarks.measure import interleaved, timed
from benchmarks.work import RATE, TEMPERATURE, Work, first
from kd_arbitrary.core import generator, to_float
from kd_arbitrary.pictures.sources import make_source
from kd_arbitrary.pictures.views import make_views
from kd_arbitrary.students.losses import kl
from kd_arbitrary.teachers.frozen import freeze, frozen, has_bfloat16
from kd_arbitrary.teachers.networks import PairNorm
from kd_arbitrary.transfer.balance import balance
from kd_arbitrary.transfer.collect import DRAWN


def train_step(
    work: Work,
    model: nn.Module,
    batch_size: int,
    bfloat16: bool = False,
    channels_last: bool = False,
    compiled: bool = False,
    **adam,  # of AdamW
) -> Callable:
    "One update on a fixed batch."
    ts = first(work, batch_size)
    x, scores = to_float(ts.images).to(work.device), ts.scores.to(work.device)
    if channels_last: model.to(memory_format=torch.channels_last)
    optimiser = torch.optim.AdamW(model.parameters(), lr=RATE, **(adam or dict(fused=True)))
    loss_of = lambda: kl(model(x), scores, "logits", TEMPERATURE)
    if compiled: loss_of = torch.compile(loss_of)
    def go():
        with torch.autocast(torch.device(work.device).type, torch.bfloat16, enabled=bfloat16): loss = loss_of()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
    return go


def forward(model: nn.Module, x) -> Callable:
    "Inference."
    def go():
        with torch.inference_mode(): model(x)
    return go


def to_image(model: nn.Module, x) -> Callable:
    "The gradient of a logit to the images, as filling a class needs it."
    x = x.clone().requires_grad_()
    return lambda: torch.autograd.grad(model(x)[:, 0].sum(), x)


def back_and_forth(layer: nn.Module, x) -> Callable:
    "A layer's forward pass and gradient."
    x = x.clone().requires_grad_()
    return lambda: torch.autograd.grad(layer(x).sum(), x)


def both(work: Work, b: int) -> dict[str, tuple[int, dict]]:
    "What the library's own layers bring: the same network with PyTorch's."
    x = to_float(work.transfer.images[:b]).to(work.device)
    fast, own = work.teachers["fast"].module, work.teachers["stock"].module
    train = lambda m: train_step(work, copy.deepcopy(m).train().requires_grad_(), b)
    return {
        "teacher, training step": (b, {"PyTorch's layers": train(own), "library's layers": train(fast)}),
        "student, training step": (b, {"PyTorch's layers": train_step(work, work.student("stock"), b),
                                       "library's layers": train_step(work, work.student("fast"), b)}),
        "teacher, inference": (b, {"PyTorch's layers": forward(own, x), "library's layers": forward(fast, x)}),
        "teacher, gradient to the image": (b, {"PyTorch's layers": to_image(own, x), "library's layers": to_image(fast, x)})}


def norms(work: Work, b: int) -> dict[str, tuple[int, dict]]:
    "The two normalisations of AlexNet's first layers, at their sizes."
    x = [torch.rand(b, c, s, s, device=work.device) for c, s in ((48, 32), (128, 15))]
    each = lambda layer: [back_and_forth(layer, y) for y in x]
    run = lambda calls: lambda: [go() for go in calls]
    return {"LRN of AlexNet, forward and gradient": (b, {"LocalResponseNorm(2)": run(each(nn.LocalResponseNorm(2))), "PairNorm": run(each(PairNorm()))})}


def switches(work: Work, b: int) -> dict[str, tuple[int, dict]]:
    "What is said to make training faster, tried on the student."
    step = lambda **how: train_step(work, work.student("fast"), b, **how)
    return {"student, training step: number format": (b, {"float32": step(), "channels last": step(channels_last=True), "bfloat16": step(bfloat16=True),
                                                          "bfloat16, channels last": step(bfloat16=True, channels_last=True)}),
            "student, training step: AdamW": (b, {"as PyTorch chooses": step(foreach=None), "foreach": step(foreach=True), "fused": step(fused=True)})}


def seeds(work: Work, b: int, many: int = 3) -> dict[str, tuple[int, dict]]:
    "Students of several seeds on the same batch, one after another or as one batched network."
    ts, copies = first(work, b), [work.student("stock") for _ in range(many)]
    x, scores = to_float(ts.images).to(work.device), ts.scores.to(work.device)
    weights = {k: v.detach().requires_grad_() for k, v in stack_module_state(copies)[0].items()}
    buffers = stack_module_state(copies)[1]
    optimiser = torch.optim.AdamW(weights.values(), lr=RATE, fused=True)
    answer = torch.func.vmap(lambda w, fixed: functional_call(copies[0], (w, fixed), (x,)))
    def batched():
        loss = sum(kl(z, scores, "logits", TEMPERATURE) for z in answer(weights, buffers))
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
    def in_turn(network):
        steps = [train_step(work, work.student(network), b) for _ in range(many)]
        return lambda: [go() for go in steps]
    return {f"{many} students, training step": (many * b, {"in turn, PyTorch's layers": in_turn("stock"), "in turn, library's layers": in_turn("fast"),
                                                           "one batched network (vmap), PyTorch's layers": batched})}


def with_threads(go: Callable, many: int) -> Callable:
    "The same with so many threads in each operation."
    def inside():
        before = torch.get_num_threads()
        torch.set_num_threads(many)
        try: go()
        finally: torch.set_num_threads(before)
    return inside


def threads(work: Work, b: int, repeats: int, inner: int) -> list[dict]:
    "A student's step by the number of threads; by the clock."
    calls = {f"{n} thread{'s' * (n > 1)}": with_threads(train_step(work, work.student("fast"), b), n) for n in (1, 2)}
    return [dict(name="student, training step by threads, by the clock", items=b, unit="wall", runs=interleaved(calls, repeats, inner, work.device))]


def ahead(work: Work, n: int, repeats: int, text: str = "strokes") -> list[dict]:
    "Drawing images and asking the teacher: in turn, or drawn ahead in a thread; by the clock, since a second processor is what it is for."
    source, teacher = make_source(text, work.pair.shape), work.teachers["fast"]
    blocks = lambda: islice(source.stream(0, DRAWN), -(-n // DRAWN))
    def in_turn():
        for images, _ in blocks(): teacher(images)
    def thread():
        rest = blocks()
        with ThreadPoolExecutor(1) as pool:
            coming = pool.submit(next, rest, None)
            while (block := coming.result()) is not None:
                coming = pool.submit(next, rest, None)
                teacher(block[0])
    calls = {"in turn": in_turn, "drawn ahead in a thread": thread, "in turn, two threads for each operation": with_threads(in_turn, 2)}
    return [dict(name=f"drawing {text} and asking, by the clock", items=-(-n // DRAWN) * DRAWN, unit="wall", runs=interleaved(calls, repeats, 1, work.device))]


def formats(work: Work, b: int) -> dict[str, tuple[int, dict]]:
    "The same for the teacher's answers."
    x = to_float(work.transfer.images[:b]).to(work.device)
    net = work.teachers["fast"].module
    last = copy.deepcopy(net).to(memory_format=torch.channels_last)
    def cast(go):
        def inside():
            with torch.autocast(torch.device(work.device).type, torch.bfloat16): go()
        return inside
    ways = {"float32": forward(net, x), "channels last": forward(last, x), "bfloat16": cast(forward(net, x)), "bfloat16, channels last": cast(forward(last, x)),
            "frozen, float32": forward(freeze(net, False), x)}
    if has_bfloat16(work.device): ways["frozen, bfloat16"] = forward(freeze(net, True), x)
    return {"teacher, inference: number format": (b, ways)}


def data(work: Work, b: int) -> dict[str, tuple[int, dict]]:
    "Where a batch comes from, and what a view costs."
    ts, g = work.transfer, generator("micro")
    n = min(len(ts), 8 * b)
    images, order, views = ts.images[:n], torch.randperm(n), make_views("affine")
    peer = lambda regime: loader(work, Contender("", regime, "stock", b), n)
    def slices(apply):
        def go():
            for index in order.split(b):
                x = to_float(images[index])
                if apply: apply(x, g)
        return go
    def through(batches):
        def go():
            for _ in batches: pass
        return go
    return {"a batch of the set": (n, {"DataLoader and transforms": through(peer("cached")), "slices of a tensor": slices(None)}),
            "a batch of affine views": (n, {"DataLoader and RandomAffine": through(peer("views")), "whole batches": slices(views)})}


def asked(work: Work, sizes: tuple[int, ...]) -> dict[str, tuple[int, dict]]:
    "The teacher by the number of images it is asked about at a time."
    n = min(len(work.transfer), max(sizes))
    images, teachers = work.transfer.images[:n], {"": work.teachers["fast"]}
    if work.pair.bfloat16: teachers[", frozen"] = frozen(work.teachers["fast"])
    return {f"teacher, inference by batch size{how}": (n, {str(b): (lambda b=b, teacher=teacher: teacher(images, b)) for b in sizes if b <= n}) for how, teacher in teachers.items()}


def balanced(work: Work, n: int, repeats: int, texts: tuple[str, ...] = ("gaussian", "pyramid")) -> list[dict]:
    "Seconds to draw noise for the teacher, as it comes and filled: noise that it puts into one class, and noise it sees all classes in."
    out = []
    for text in texts:
        source, runs, reports = make_source(text, work.pair.shape), {}, {}
        for _ in range(repeats):
            for strategy in ("none", "fill"):
                t = timed(lambda: reports.update({strategy: balance(source, work.teachers["fast"], n, strategy, empty="keep", show=False)[1].to_dict()}), work.device)
                runs.setdefault(strategy, []).append(t)
        out.append(dict(name=f"balance, {text} noise", items=n, runs=runs, report=reports))
    return out


def compiled(work: Work, b: int, repeats: int) -> list[dict]:
    "torch.compile on the student, if there is a compiler; its first steps apart."
    if not (shutil.which("g++") or shutil.which("clang++")) and torch.device(work.device).type == "cpu": return []
    go = train_step(work, work.student("fast"), b, compiled=True)
    start = time.perf_counter()
    for _ in range(5): go()                                    # the second step may compile again
    once = time.perf_counter() - start
    return [dict(name="student, training step: torch.compile", items=b, compile_seconds=once,
                 runs=interleaved({"eager": train_step(work, work.student("fast"), b), "compiled": go}, repeats, 20, work.device))]


def micro(
    work: Work,
    name: str,  # of the pair
    batch_size: int,
    repeats: int,
    inner: int,  # calls per measurement
) -> list[dict]:  # name, items (images per call), runs (label to seconds per call)
    "All before-and-after pairs that concern this pair of networks."
    tables = switches(work, batch_size) | formats(work, batch_size)
    if name == "lenet": tables = both(work, batch_size) | tables | data(work, batch_size) | seeds(work, batch_size) | asked(work, (64, 128, 256, 512, 1024, 2048))
    if name == "alexnet": tables = norms(work, batch_size) | both(work, batch_size) | tables | asked(work, (32, 64, 128, 256, 512, 1024))
    if name == "wrn": tables |= asked(work, (32, 64, 128, 256, 512))
    out = [dict(name=k, items=n, runs=interleaved(calls, repeats, 1 if "batch" in k else inner, work.device)) for k, (n, calls) in tables.items()]
    if torch.device(work.device).type != "cpu" or name != "lenet": return out
    return out + threads(work, batch_size, repeats, inner) + ahead(work, 8 * DRAWN, repeats)
