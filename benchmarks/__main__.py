"""The benchmark: one command, one record a pair.

    python -m benchmarks [--pair lenet alexnet wrn resnet] [--images N] [--repeats R] [--device cpu] [--threads 1]
"""
import argparse
import importlib.metadata
import json
import os
from datetime import datetime, timezone
from pathlib import Path

import torch

from benchmarks import micro as M
from benchmarks.contenders import PACKAGES, describe, installed, line_up, prepare
from benchmarks.measure import Updates, bound, median, rates, timed, unit
from benchmarks.memory import compare, keep_memory
from benchmarks.work import PAIRS, RATE, TEMPERATURE, VIEWS, fast_differs, make_work
from kd_arbitrary.storage import write_atomic
from kd_arbitrary.students.evaluate import machine, versions
from kd_arbitrary.teachers.networks import make_model

VERSION = 1
OUT = Path(__file__).resolve().parent.parent / "data" / "results" / "benchmarks"


def compete(work, contenders, images: int, repeats: int, say=print) -> list[dict]:
    "Round after round, every contender once; the first round, of one batch each, warms up and is thrown away."
    rows = [describe(c, images) for c in contenders]
    for r in range(repeats + 1):
        for c, row in zip(contenders, rows):
            if not row["installed"]: continue
            go = prepare(work, c, images if r else c.batch_size)
            with Updates() as updates: t = timed(go, work.device)
            if not r: continue
            if row["updates"] not in (None, updates.n): raise RuntimeError(f"{c} took {updates.n} steps, and {row['updates']} before")
            row["updates"] = updates.n
            row["runs"].append(t)
        if r: say(f"round {r} of {repeats}")
    return rows


def fair(rows: list[dict]) -> None:
    "Refuse a comparison of loops that did not take the same number of steps."
    for b in {r["batch_size"] for r in rows}:
        counts = {r["updates"] for r in rows if r["batch_size"] == b and r["loop"] != "asking once" and r["updates"] is not None}
        if len(counts) > 1: raise RuntimeError(f"at batch size {b} the loops took {sorted(counts)} steps; they must take the same number")


def packages() -> dict:
    "Versions of the peers; None where one is not installed."
    return {p: importlib.metadata.version(p) if installed(p) else None for p in PACKAGES}


def measure(name: str, args, say=print) -> dict:
    "The record of one pair."
    pair = PAIRS[name]
    images, repeats, batches = args.images or pair.images, args.repeats or pair.repeats, tuple(args.batch or pair.batches)
    target = {"none": None, None: "digits" if name == "lenet" else None}.get(args.target, args.target)
    work = make_work(pair, max(images, *batches), target, args.root, args.device, args.workers)
    networks = ("fast", "stock") if fast_differs(make_model(pair.student, pair.shape)) else ("stock",)
    load, rate = os.getloadavg() if hasattr(os, "getloadavg") else None, rates(args.device, 2 * repeats)
    rows = compete(work, line_up(networks, batches, pair.bfloat16), images, repeats, say)
    fair(rows)
    inner = dict(lenet=20).get(name, 1)
    notes = [] if args.skip_micro else M.micro(work, name, batches[0], repeats, inner)
    if args.compile: notes += M.compiled(work, batches[0], repeats)
    if name == "lenet" and args.balance: notes += M.balanced(work, args.balance, 1)
    if name == "lenet" and not args.skip_micro and args.device == "cpu": notes += compare(min(repeats, 3))
    settings = dict(pair=name, teacher=pair.teacher, student=pair.student, shape=list(pair.shape), teacher_of=target, images=images, repeats=repeats,
                    batches=list(batches), workers=args.workers, device=args.device, unit=unit(args.device), keep_memory=args.keep_memory,
                    temperature=TEMPERATURE, lr=RATE, views=VIEWS, optimiser="AdamW")
    return dict(record="kd_arbitrary benchmark", version=VERSION, pair=name, finished=datetime.now(timezone.utc).isoformat(timespec="seconds"),
                settings=settings, versions=versions() | packages(), machine=machine(), load=dict(before=load, after=os.getloadavg() if load else None),
                rates=rate, bound={str(b): bound(pair, rate, b) for b in batches}, contenders=rows, micro=notes)


def summary(record: dict) -> str:
    "The record for people."
    by = record["settings"]["unit"]
    out = [f"{record['pair']}: images per {'CPU-' if by == 'cpu' else ''}second, median of {record['settings']['repeats']} rounds"]
    for r in record["contenders"]:
        form = f"{r['batch_size']:>5} {r['regime']:7} {r['loop']:22} {r['network']:6}{' bf16' if r['bfloat16'] else ''}"
        out.append(f"{form:50}" + (f"{r['images'] / median(r['runs'], by):>12,.0f}{r['updates']:>6} steps" if r["runs"] else "  not installed"))
    for m in record["micro"]:
        out.append(m["name"] + ": " + ", ".join(f"{k} {1e6 * median(v, m.get('unit', by)) / m['items']:,.1f} us" for k, v in m["runs"].items()) + " an image")
    return "\n".join(out)


def main(argv=None) -> list[Path]:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", nargs="+", choices=PAIRS, default=list(PAIRS), help="teacher and student; all by default")
    parser.add_argument("--images", type=int, help="of one sample; by default what suits the pair")
    parser.add_argument("--repeats", type=int, help="rounds")
    parser.add_argument("--batch", type=int, nargs="+", help="batch sizes; every form of a contender runs at the first one")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--workers", type=int, default=0, help="processes of the peers' data loaders")
    parser.add_argument("--target", help="whose trained teacher to take: digits (LeNet's default; needs no file), mnist, fmnist, none (random weights)")
    parser.add_argument("--root", help="data root")
    parser.add_argument("--balance", type=int, default=60_000, help="noise images to balance; 0: leave it out")
    parser.add_argument("--compile", action="store_true", help="also torch.compile, which takes a minute")
    parser.add_argument("--keep-memory", action="store_true", help="tell glibc to keep freed memory, for all contenders alike")
    parser.add_argument("--skip-micro", action="store_true", help="only the loops")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the records")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    if args.keep_memory and not keep_memory(): parser.error("this system's C library cannot be told to keep memory; leave --keep-memory out")
    paths = []
    for name in args.pair:
        record = measure(name, args)
        stamp = record["finished"][:19].replace("-", "").replace(":", "")
        paths.append(write_atomic(args.out / f"{name}-{stamp}.json", json.dumps(record, indent=1) + "\n"))
        print(summary(record), f"\n{paths[-1]}\n", sep="\n")
    return paths


if __name__ == "__main__": main()
