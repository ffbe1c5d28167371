"""How teachers of photographs are best trained in short: recipes compared on ten superclasses of CIFAR-100, by training images that were held out.

    python -m benchmarks.recipes [--arch wrn16_1] [--images N] [--epochs E] [--seeds S]
"""
import argparse
import json
import tempfile
from datetime import datetime, timezone
from pathlib import Path
from statistics import fmean

import numpy as np
import torch

from kd_arbitrary.core import generator
from kd_arbitrary.storage import write_atomic
from kd_arbitrary.pictures.natural import labelled
from kd_arbitrary.students.evaluate import machine, versions
from kd_arbitrary.studies.execution import code_version
from kd_arbitrary.teachers.recipes import _train, load_model, recipe_of
from kd_arbitrary.teachers.targets import Target

OUT = Path(__file__).resolve().parent.parent / "data" / "results" / "tuning"
SUPERCLASSES = dict(fish=(1, 32, 67, 73, 91), flowers=(54, 62, 70, 82, 92), containers=(9, 10, 16, 28, 61), fruit=(0, 51, 53, 57, 83),
                    furniture=(5, 20, 25, 84, 94), insects=(6, 7, 14, 18, 24), trees=(47, 52, 56, 59, 96), people=(2, 11, 35, 46, 98),
                    landscapes=(23, 33, 49, 60, 71), reptiles=(27, 29, 44, 78, 93))  # name -> fine classes of CIFAR-100
ADAM, TURNED = dict(lr=2e-3, weight_decay=1e-2, optimiser="adamw"), dict(views="crop", flip="alternating")
WAYS = {"Adam, one cycle": ADAM, "Nesterov, triangle": {}, "the same, alternating flips": TURNED, "the same, labels smoothed": TURNED | dict(smoothing=0.1)}


def superclasses(root, images: int, held: int, seed: int = 0) -> Target:
    "Ten superclasses of CIFAR-100's training images as a target; its test images are some of them that were held out."
    train, _ = labelled("cifar100", root, False)
    fine, coarse = torch.as_tensor(train.targets), torch.full((100,), -1)
    for c, members in enumerate(SUPERCLASSES.values()): coarse[list(members)] = c
    there = (coarse[fine] >= 0).nonzero()[:, 0]
    there = there[torch.randperm(len(there), generator=generator(seed, "superclasses"))][: images + held]
    x, y = torch.from_numpy(np.ascontiguousarray(train.data.transpose(0, 3, 1, 2)))[there], coarse[fine[there]]
    return Target("cifar10", tuple(SUPERCLASSES), x[held:], y[held:], x[:held], y[:held])          # the name says whose recipe is meant


def tried(target: Target, arch: str, epochs: int, seed: int, changes: dict) -> dict:
    "Accuracy on what is held out, and seconds."
    recipe = recipe_of("cifar10", arch, **dict(seed=seed, epochs=epochs) | changes)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "teacher.safetensors"
        start = datetime.now(timezone.utc)
        _train(target, recipe, path, "cpu", False)
        card = load_model(path)[1]
    return dict(recipe=recipe, accuracy=card["test_accuracy"], seconds=(datetime.now(timezone.utc) - start).total_seconds())


def main(argv=None) -> Path:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.recipes", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="wrn16_1")
    parser.add_argument("--images", type=int, default=12_000, help="to train with")
    parser.add_argument("--held", type=int, default=5_000, help="to compare by")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--root", help="data root")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    target, rows = superclasses(args.root, args.images, args.held), []
    for name, changes in WAYS.items():
        runs = [tried(target, args.arch, args.epochs, seed, changes) for seed in range(args.seeds)]
        rows.append(dict(way=name, runs=runs, accuracy=fmean(r["accuracy"] for r in runs)))
        print(f"{name:30} {rows[-1]['accuracy']:.2%} {runs[0]['seconds']:.0f} s", flush=True)
    record = dict(tuning="recipes", arch=args.arch, images=args.images, held=args.held, epochs=args.epochs, seeds=args.seeds, rows=rows,
                  finished=datetime.now(timezone.utc).isoformat(timespec="seconds"), machine=machine(), versions=versions(), code=code_version())
    return write_atomic(args.out / "recipes.json", json.dumps(record, indent=1) + "\n")


if __name__ == "__main__": print(main())
