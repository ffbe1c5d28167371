"""Time, steps, and the arithmetic a machine can do."""
import copy
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.work import Pair, stock
from kd_arbitrary.teachers.networks import count_flops, count_parameters, make_model

try: import resource
except ImportError: resource = None                      # Windows: the loaders' processes are not counted


def cpu_seconds() -> float:
    "Processor time of this process and of its finished children."
    children = resource.getrusage(resource.RUSAGE_CHILDREN) if resource else None
    return time.process_time() + (children.ru_utime + children.ru_stime if children else 0)


def timed(
    go: Callable,
    device: str = "cpu",
) -> dict:  # wall and cpu, in seconds
    "How long a call takes."
    wait = torch.cuda.synchronize if torch.device(device).type == "cuda" else lambda: None
    wait()
    wall, cpu = time.perf_counter(), cpu_seconds()
    go()
    wait()
    return dict(wall=time.perf_counter() - wall, cpu=cpu_seconds() - cpu)


def unit(
    device: str,
) -> str:  # key of what `timed` returns
    "What is compared: processor time, which other work on the machine leaves alone; on an accelerator the clock on the wall."
    return "cpu" if torch.device(device).type == "cpu" else "wall"


class Updates:
    "Counts the optimiser steps of whoever takes them."

    def __enter__(self):
        self.n, self.handle = 0, register_optimizer_step_post_hook(self._step)
        return self

    def _step(self, *_): self.n += 1

    def __exit__(self, *_): self.handle.remove()


def interleaved(
    calls: dict[str, Callable],  # label to call
    repeats: int,  # rounds
    inner: int = 1,  # calls per measurement
    device: str = "cpu",
) -> dict[str, list[dict]]:  # label to seconds per call, one entry a round
    "A B C, A B C, ...: whatever disturbs the machine disturbs all of them. The first round is thrown away."
    out = {name: [] for name in calls}
    def several(go):
        for _ in range(inner): go()
    for i in range(repeats + 1):
        for name, go in calls.items():
            t = timed(lambda: several(go) if i else go(), device)
            if i: out[name].append({k: v / inner for k, v in t.items()})
    return out


def rates(
    device: str = "cpu",
    repeats: int = 7,
) -> dict[str, float]:  # floating-point operations a second, best of the repeats; copy in bytes a second
    "What this machine can do at its best: matrix products, convolutions, copies."
    best = lambda go, work: work / min(t[unit(device)] for t in interleaved({"": go}, repeats, 2, device)[""])
    out, n, (b, c, s) = {}, 1024, (32, 64, 32)
    with torch.inference_mode():
        for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
            m = torch.rand(n, n, device=device).to(dtype)
            out[f"matmul_{name}"] = best(lambda: m @ m, 2 * n**3)
            x, w = torch.rand(b, c, s, s, device=device).to(dtype), torch.rand(c, c, 3, 3, device=device).to(dtype)
            if dtype == torch.bfloat16: x, w = x.to(memory_format=torch.channels_last), w.to(memory_format=torch.channels_last)
            out[f"conv_{name}"] = best(lambda: F.conv2d(x, w, padding=1), 2 * b * c * c * 9 * s * s)
        a = torch.zeros(16 << 20, device=device)                                      # 64 MiB: more than the caches hold
        z = torch.empty_like(a)
        out["copy"] = best(lambda: z.copy_(a), 2 * a.numel() * 4)
    return out


def step_flops(
    model: nn.Module,
    shape: tuple[int, int, int],
) -> int:  # without the gradient to the image, which nobody needs
    "Floating-point operations of one image's forward and backward pass."
    model = copy.deepcopy(model).to("meta").train()
    with FlopCounterMode(display=False) as counter: model(torch.empty(2, *shape, device="meta")).sum().backward()
    return counter.get_total_flops() // 2


def bound(
    pair: Pair,
    rate: dict[str, float],  # of `rates`
    batch_size: int,
) -> dict:  # counts per image; floor: seconds per image by regime and precision
    "The least a pass can cost: its arithmetic at the machine's best rate, or its bytes at the rate of a copy, whichever is more."
    teacher, student = (stock(make_model(name, pair.shape, 10)) for name in (pair.teacher, pair.student))
    forward, step, ask = count_flops(student, pair.shape), step_flops(student, pair.shape), count_flops(teacher, pair.shape)
    pixels = pair.shape[0] * pair.shape[1] * pair.shape[2]
    moved = 7 * 4 * count_parameters(student) / batch_size               # weight, gradient, two moments read; weight and two moments written
    data = dict(cached=pixels + 4 * 10 + moved, views=pixels + moved + 4 * count_parameters(teacher) / batch_size)
    flops = dict(cached=step, views=step + ask)
    top = {p: max(rate[f"matmul_{p}"], rate[f"conv_{p}"]) for p in ("float32", "bfloat16")}
    floor = {p: {r: max(flops[r] / top[p], data[r] / rate["copy"]) for r in flops} for p in top}
    return dict(student_forward=forward, student_step=step, teacher_forward=ask, bytes=data, floor=floor, peak=top, batch_size=batch_size,
                parameters=dict(student=count_parameters(student), teacher=count_parameters(teacher)))


def median(runs: list[dict], unit: str) -> float: return statistics.median(r[unit] for r in runs)
