"""The loops. Each `prepare` makes everything a loop needs and returns the call that is timed: one pass over n images."""
import copy
import importlib.util
import logging
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset, RandomSampler, default_collate
from torchvision import transforms as T

from benchmarks.work import RATE, TEMPERATURE, VIEWS, Work, first, plain, steps
from kd_arbitrary.core import to_float
from kd_arbitrary.pictures.views import mixup
from kd_arbitrary.students.distill import distill
from kd_arbitrary.students.losses import kl
from kd_arbitrary.transfer.sets import label


@dataclass(frozen=True)
class Contender:
    "One loop in one form."
    loop: str  # who runs the loop
    regime: str  # "cached": images as they are; "views": altered in every step
    network: str  # "fast" (the library's layers) or "stock" (PyTorch's own)
    batch_size: int
    bfloat16: bool = False


def ours(work: Work, c: Contender, n: int) -> Callable:
    "The library: scores cached, or views that are re-labelled."
    ts, student = first(work, n), work.student(c.network)
    return lambda: distill(work.teachers[c.network], student, ts, epochs=1, batch_size=c.batch_size, lr=RATE, temperature=TEMPERATURE, holdout=0,
                           views="none" if c.regime == "cached" else VIEWS, bfloat16=c.bfloat16, device=work.device, show=False)


def asking(work: Work, c: Contender, n: int) -> Callable:
    "What cached scores cost, once: the teacher asked about every image."
    return lambda: label(work.transfer.images[:n], work.teachers[c.network])


def alone(work: Work, c: Contender, n: int, labels: bool = False) -> Callable:
    "The student's arithmetic and nothing else: the same batch again and again."
    ts, student = first(work, c.batch_size), work.student(c.network)
    x, scores = to_float(ts.images).to(work.device), ts.scores.to(work.device)
    goal = scores.argmax(1)
    if c.bfloat16: student.to(memory_format=torch.channels_last)
    optimiser = torch.optim.AdamW(student.parameters(), lr=RATE, fused=True)
    def go():
        for _ in range(steps(n, c.batch_size)):
            with torch.autocast(torch.device(work.device).type, torch.bfloat16, enabled=c.bfloat16):
                out = student(x)
                loss = F.cross_entropy(out, goal) if labels else kl(out, scores, "logits", TEMPERATURE)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
    return go


def alone_labels(work: Work, c: Contender, n: int) -> Callable:
    "The same with labels and cross-entropy."
    return alone(work, c, n, labels=True)


class Pictures(Dataset):
    "Images as torchvision's data sets keep and give them: one array, a picture and a label at a time."

    def __init__(self, images, transform):
        self.data, self.transform = images.permute(0, 2, 3, 1).squeeze(-1).contiguous().numpy(), transform

    def __len__(self): return len(self.data)

    def __getitem__(self, i): return self.transform(Image.fromarray(self.data[i])), 0


def mixed(batch):
    "A batch blended with itself, as torchvision's guide does it: in the loader's collate function."
    x, *rest = default_collate(batch)
    return mixup(x, torch.default_generator), *rest


def pictures(work: Work, c: Contender, n: int) -> Dataset:
    "The images with the transforms a user writes."
    channels = work.pair.shape[0]
    views = [T.RandomAffine(15, (0.1, 0.1), (0.85, 1.15), 8.5, interpolation=T.InterpolationMode.BILINEAR)] if c.regime == "views" else []
    return Pictures(work.transfer.images[:n], T.Compose([*views, T.ToTensor(), T.Normalize((0.5,) * channels, (0.25,) * channels)]))


def peers_networks(work: Work, c: Contender) -> tuple[nn.Module, nn.Module]:
    "Teacher and student for normalised images."
    teacher, student = (plain(m) for m in (work.teachers[c.network].module, work.student(c.network)))
    for m in (teacher, student):
        m.num_classes, m.in_chans = 10, work.pair.shape[0]                               # what timm looks for
        m.pretrained_cfg = dict(mean=(0.5,) * m.in_chans, std=(0.25,) * m.in_chans)
    return teacher.eval().requires_grad_(False), student.train()


def loader(work: Work, c: Contender, n: int) -> DataLoader:
    "Shuffled batches."
    collate = mixed if c.regime == "views" else None
    return DataLoader(pictures(work, c, n), c.batch_size, shuffle=True, num_workers=work.workers, collate_fn=collate)


def tutorial(work: Work, c: Contender, n: int) -> Callable:
    "The loop of PyTorch's knowledge distillation tutorial, without its label term."
    teacher, student = peers_networks(work, c)
    batches, optimiser = loader(work, c, n), torch.optim.AdamW(student.parameters(), lr=RATE)
    def go():
        running = 0.0
        for inputs, _ in batches:
            inputs = inputs.to(work.device)
            optimiser.zero_grad()
            with torch.autocast(torch.device(work.device).type, torch.bfloat16, enabled=c.bfloat16):
                with torch.no_grad(): says = teacher(inputs)
                logits = student(inputs)
            soft, log_prob = F.softmax(says.float() / TEMPERATURE, -1), F.log_softmax(logits.float() / TEMPERATURE, -1)
            loss = torch.sum(soft * (soft.log() - log_prob)) / len(inputs) * TEMPERATURE**2
            loss.backward()
            optimiser.step()
            running += loss.item()
    return go


def timm_task(work: Work, c: Contender, n: int) -> Callable:
    "timm's logit distillation task in a plain loop."
    from timm.task import LogitDistillationTask
    teacher, student = peers_networks(work, c)
    task = LogitDistillationTask(student, teacher, nn.CrossEntropyLoss(), distill_loss_weight=1.0, task_loss_weight=0.0, temperature=TEMPERATURE,
                                 device=torch.device(work.device), verbose=False).to(work.device).train()
    batches, optimiser = loader(work, c, n), torch.optim.AdamW(student.parameters(), lr=RATE)
    def go():
        for x, y in batches:
            with torch.autocast(torch.device(work.device).type, torch.bfloat16, enabled=c.bfloat16):
                loss = task(x.to(work.device), y.to(work.device))["loss"]
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    return go


def box_config(work: Work, c: Contender) -> dict:
    "What stands in the YAML file of a torchdistill user."
    here = dict(requires_grad=True, forward_proc="forward_batch_only", sequential=[], frozen_modules=[])
    term = dict(student_module_path=".", student_module_io="output", teacher_module_path=".", teacher_module_io="output",
                temperature=TEMPERATURE, alpha=0.0, reduction="batchmean")
    return dict(
        num_epochs=1, log_freq=1000,
        train_data_loader=dict(dataset_id="set/train", sampler=dict(class_or_func=RandomSampler, kwargs={}),
                               collate_fn="mixed" if c.regime == "views" else None, kwargs=dict(batch_size=c.batch_size, num_workers=work.workers)),
        teacher=here | dict(requires_grad=False), student=here,
        optimizer=dict(key="AdamW", kwargs=dict(lr=RATE)),
        criterion=dict(key="WeightedSumLoss", kwargs=dict(sub_terms=dict(kd=dict(criterion=dict(key="KDLoss", kwargs=term), weight=TEMPERATURE**2)))))


def box(work: Work, c: Contender, n: int) -> Callable:
    "torchdistill's distillation box, driven as its examples drive it."
    from torchdistill.core.distillation import get_distillation_box
    from torchdistill.datasets.registry import COLLATE_FUNC_DICT, register_collate_func
    from torchdistill.misc.log import MetricLogger, SmoothedValue
    logging.getLogger("torchdistill").setLevel(logging.ERROR)
    if "mixed" not in COLLATE_FUNC_DICT: register_collate_func(mixed)
    teacher, student = peers_networks(work, c)
    device = torch.device(work.device)
    it = get_distillation_box(teacher.to(device), student, {"set/train": pictures(work, c, n)}, copy.deepcopy(box_config(work, c)), device, None, False, 1)
    def go():
        log = MetricLogger(delimiter="  ")
        log.add_meter("lr", SmoothedValue(window_size=1, fmt="{value}"))
        it.pre_epoch_process(epoch=0)
        for batch, targets, extra in log.log_every(it.train_data_loader, 1000, "Epoch: [0]"):
            loss = it.forward_process(batch.to(device), targets.to(device), extra)
            it.post_forward_process(loss=loss)
            log.update(loss=loss.item(), lr=it.optimizer.param_groups[0]["lr"])
        it.post_epoch_process()
    return go


OURS = "kd_arbitrary"
LOOPS = {OURS: ours, "student alone": alone, "student alone, labels": alone_labels, "asking once": asking,
         "torchdistill": box, "timm": timm_task, "PyTorch tutorial": tutorial}
PEERS = ("torchdistill", "timm", "PyTorch tutorial")
PACKAGES = {"torchdistill": "torchdistill", "timm": "timm"}      # what must be installed


def installed(loop: str) -> bool:
    "Whether the package of that loop is there."
    return loop not in PACKAGES or importlib.util.find_spec(PACKAGES[loop]) is not None


def line_up(
    networks: tuple[str, ...],  # "fast" and "stock", or only "stock"
    batches: tuple[int, ...],  # every form at the first one, stock peers at the others
    bfloat16: bool,  # also in bfloat16
) -> list[Contender]:
    "Who competes, in the order of a round."
    best, out = networks[0], []
    for b in batches:
        full = b == batches[0]
        for regime in ("cached", "views"):
            out += [Contender(OURS, regime, k, b) for k in (networks if full else (best,))]
            out += [Contender(p, regime, k, b) for p in PEERS for k in (networks if full else ("stock",))]
            if bfloat16: out += [Contender(p, regime, best if p == OURS else "stock", b, True) for p in (OURS, "timm", "PyTorch tutorial")]
        out += [Contender(loop, "cached", best, b) for loop in ("student alone", "student alone, labels")]
        if full: out += [Contender("student alone", "cached", "stock", b)] * (best != "stock") + [Contender("asking once", "cached", k, b) for k in networks]
        if bfloat16: out.append(Contender("student alone", "cached", best, b, True))
    return out


def prepare(work: Work, c: Contender, n: int) -> Callable:
    "The call to time."
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return LOOPS[c.loop](work, c, n)


def describe(c: Contender, n: int) -> dict:
    "A contender as it stands in the record."
    return asdict(c) | dict(images=n, installed=installed(c.loop), updates=None, runs=[])
