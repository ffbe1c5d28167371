"""What a teacher sees in every source: how evenly it spreads the images over its classes, how sure it is, how fast they are drawn.

    python -m benchmarks.sources [--target cifar10] [--sample N] [--sources TEXT ...]
"""
import argparse
import json
import time
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path

import torch

from kd_arbitrary.core import generator
from kd_arbitrary.storage import write_atomic
from kd_arbitrary.pictures.noise import SOURCES
from kd_arbitrary.pictures.sources import Source, make_source
from kd_arbitrary.students.evaluate import machine, versions
from kd_arbitrary.studies.grids import COLOURED, EVERYTHING, TINY
from kd_arbitrary.studies.execution import code_version, original
from kd_arbitrary.studies.tables import source_kind
from kd_arbitrary.teachers.frozen import quick
from kd_arbitrary.teachers.recipes import train_teacher
from kd_arbitrary.teachers.targets import load_target
from kd_arbitrary.teachers.teacher import Teacher
from kd_arbitrary.transfer.diagnosis import diagnose

OUT = Path(__file__).resolve().parent.parent / "data" / "results" / "benchmarks"
DRAWN = [name for kind in ("noise", "synthetic") for name in SOURCES.where(kind=kind)]  # they need no file
REAL = {"cifar10": ("cifar100_unrelated", TINY), "cifar100": (TINY,)}  # photographs of other things
KEPT = ("counts", "entropy", "confidence", "effective_rank")  # of a diagnosis


def pace(source: Source, n: int = 1024) -> float:
    "Images drawn in a second of processor time."
    source.draw(256, generator(0, "warm"))
    start = time.process_time()
    source.draw(n, generator(0, "pace"))
    return n / (time.process_time() - start)


def look(source: Source, teacher: Teacher, sample: int, kind: str | None = None, note: str = "") -> dict:
    "One row of the record."
    found = asdict(diagnose(source, teacher, sample=sample))
    rarest = min(found["counts"]) / found["sample"]
    return dict(source=source.text + note, kind=kind or source_kind(source.text), sample=found["sample"], rarest=rarest, images_per_second=pace(source),
                **{k: found[k] for k in KEPT})


def measure(args, say=print) -> dict:
    "The record."
    target = load_target(args.target, args.root)
    who = train_teacher(target, args.arch, root=args.root, show=False)
    texts = args.sources or [*DRAWN, COLOURED, EVERYTHING, *REAL.get(args.target, ())]
    rows = []
    with quick(who, True) as teacher:
        for text in texts: rows.append(look(make_source(text, target.shape, args.root), teacher, args.sample)); say(rows[-1])
        rows.append(look(original(target), teacher, args.sample, "original"))
    if args.batch_statistics:
        shaken = Teacher(who.module, target.classes, target.shape, bn="batch")
        rows.append(look(make_source("gaussian", target.shape), shaken, args.sample, note=", batch statistics"))
    told = dict(arch=who.card["arch"], accuracy=who.card["test_accuracy"], fingerprint=who.fingerprint, classes=list(target.classes))
    return dict(benchmark="sources", target=args.target, teacher=told, rows=rows, finished=datetime.now(timezone.utc).isoformat(timespec="seconds"),
                machine=machine(), versions=versions(), code=code_version())


def main(argv=None) -> Path:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sources", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="cifar10", help="whose teacher looks")
    parser.add_argument("--arch", help="network of the teacher; by default the target's recipe says")
    parser.add_argument("--sample", type=int, default=4000, help="images of each source")
    parser.add_argument("--sources", nargs="+", help="by default all that need no file, two mixtures, and unrelated photographs")
    parser.add_argument("--no-batch-statistics", dest="batch_statistics", action="store_false", help="leave out noise seen with the statistics of the batch")
    parser.add_argument("--root", help="data root")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the record")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    record = measure(args)
    stamp = record["finished"][:19].replace("-", "").replace(":", "")
    return write_atomic(args.out / f"sources-{args.target}-{stamp}.json", json.dumps(record, indent=1) + "\n")


if __name__ == "__main__": print(main())
