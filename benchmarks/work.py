"""What every contender is given: the networks, the images, the teacher, the number of steps."""
import copy
import inspect
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kd_arbitrary.core import generator
from kd_arbitrary.pictures.sources import make_source
from kd_arbitrary.students.distill import distill
from kd_arbitrary.teachers.networks import ConvPool, PairNorm, make_model
from kd_arbitrary.teachers.recipes import train_teacher
from kd_arbitrary.teachers.targets import load_target
from kd_arbitrary.teachers.teacher import Teacher
from kd_arbitrary.transfer.sets import TransferSet, label

TEMPERATURE, RATE, VIEWS = 4.0, 1e-3, "affine+mixup"
DEFAULT_BATCH = inspect.signature(distill).parameters["batch_size"].default


@dataclass(frozen=True)
class Pair:
    "A teacher and a student, and how much work a sample is."
    teacher: str  # as in `MODELS`
    student: str  # as in `MODELS`
    shape: tuple[int, int, int]  # (C, H, W) of the images
    images: int  # of one sample
    batches: tuple[int, ...]  # batch sizes; at the first one the contenders run in every form
    repeats: int  # rounds
    bfloat16: bool  # also in bfloat16


PAIRS = dict(
    lenet=Pair("lenet5", "lenet5_half", (1, 28, 28), 10_240, tuple(sorted({DEFAULT_BATCH, 128, 256, 512}, key=lambda b: (b != DEFAULT_BATCH, b))), 5, False),
    alexnet=Pair("alexnet", "alexnet_half", (3, 32, 32), 1024, (128,), 3, True),
    wrn=Pair("wrn40_2", "wrn16_1", (3, 32, 32), 512, (128,), 3, True),
    resnet=Pair("resnet34", "resnet18", (3, 32, 32), 48, (16,), 1, True),
)


def stock(
    model: nn.Module,  # of `make_model`
) -> nn.Module:  # a copy with the same weights and the same function
    "The network of PyTorch's own layers only."
    model = copy.deepcopy(model)
    for name, m in model.named_children():
        if isinstance(m, ConvPool): m.fast = False
        if isinstance(m, PairNorm): setattr(model, name, nn.LocalResponseNorm(2))
    return model


def fast_differs(
    model: nn.Module,  # of `make_model`
) -> bool:
    "Whether the library's network has layers of its own."
    return any(isinstance(m, (ConvPool, PairNorm)) for m in model.modules())


def plain(
    model: nn.Module,  # of `make_model`: pixels in [0, 1]
) -> nn.Module:  # a copy for images that a transform has normalised
    "The network as it is written where normalising is the transforms' business."
    model = copy.deepcopy(model)
    if hasattr(model, "margin"): model.margin = nn.ConstantPad2d(model.margin.padding, -2.0)      # black, normalised
    model.normalize = nn.Identity()
    return model


@dataclass(frozen=True)
class Work:
    "What all contenders share."
    pair: Pair
    teachers: dict[str, Teacher]  # by network: "fast", "stock"
    transfer: TransferSet  # images and scores
    device: str
    workers: int  # processes of the peers' data loaders

    def student(
        self,
        network: str,  # "fast" or "stock"
    ) -> nn.Module:  # the same first weights every time
        "A student that has learnt nothing."
        model = make_model(self.pair.student, self.pair.shape, len(self.teachers["stock"].classes), seed=1)
        return (model if network == "fast" else stock(model)).to(self.device)


def make_work(
    pair: Pair,
    images: int,  # in the set
    target: str | None = None,  # whose teacher to take; None: random weights, which are as fast
    root=None,  # data root
    device: str = "cpu",
    workers: int = 0,
) -> Work:
    "Networks, noise images, and the teacher's scores of them."
    if target: net = train_teacher(load_target(target, root), root=root, show=False).module
    else: net = make_model(pair.teacher, pair.shape, 10, seed=0).eval()
    teachers = {kind: Teacher(m, 10, pair.shape, device=device) for kind, m in (("fast", net), ("stock", stock(net)))}
    pixels = make_source("gaussian", pair.shape).draw(images, generator("benchmark"))
    return Work(pair, teachers, label(pixels, teachers["fast"], "gaussian"), device, workers)


def first(
    work: Work,
    n: int,  # images
) -> TransferSet:
    "The first images of the set."
    return work.transfer.select(torch.arange(n))


def steps(n: int, batch_size: int) -> int: return -(-n // batch_size)


def normalised(
    images: Tensor,  # [n, C, H, W] uint8
) -> Tensor:
    "What the peers' transforms make of the images, for a whole batch."
    return (images.float() / 255 - 0.5) / 0.25
