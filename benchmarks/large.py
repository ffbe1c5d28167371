"""How memory grows with the set: sets of ten thousand to a million images, balanced into a file and distilled from it.

    python -m benchmarks.large                              # one record in data/results/benchmarks/
    python -m benchmarks.large --images 10000 --in-memory   # for comparison: the whole set held in memory

Each size is measured in a fresh process. What counts is its *anonymous* memory, which the system cannot take away; pages of mapped
files are counted apart, because the system drops them when it needs the room.
"""
import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from datetime import datetime, timezone
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SHAPE = (1, 28, 28)


def held() -> dict[str, float]:  # MiB
    "What this process holds: memory of its own, and pages of files."
    rows = dict(row.split(":", 1) for row in Path("/proc/self/status").read_text().splitlines())
    return {name: int(rows[key].split()[0]) / 1024 for name, key in dict(anonymous="RssAnon", files="RssFile").items()}


class Peak(threading.Thread):
    "The largest amounts held while the block runs, looked at every few milliseconds."
    def __init__(self): super().__init__(daemon=True); self.at, self.over = held(), threading.Event()

    def look(self): self.at = {k: max(v, self.at[k]) for k, v in held().items()}

    def run(self):
        while not self.over.wait(0.005): self.look()

    def __enter__(self): self.before, self.start_at = held(), time.perf_counter(); self.start(); return self

    def __exit__(self, *_):
        self.look(); self.over.set(); self.join()
        self.seconds = time.perf_counter() - self.start_at

    def row(self) -> dict: return dict(seconds=round(self.seconds, 2), before_mb=round(self.before["anonymous"], 1),
                                       peak_mb=round(self.at["anonymous"], 1), peak_files_mb=round(self.at["files"], 1))


def sample(n: int, strategy: str, root: Path | None, folder: Path | None) -> dict:
    "One size: seconds and peak of balancing and of one epoch of distilling from cached scores."
    import torch
    torch.set_num_threads(1)
    from kd_arbitrary.transfer.balance import balance, memory_needed
    from kd_arbitrary.teachers.targets import load_target
    from kd_arbitrary.students.distill import distill
    from kd_arbitrary.teachers.networks import make_model
    from kd_arbitrary.pictures.sources import make_source
    from kd_arbitrary.teachers.recipes import train_teacher
    teacher, student = train_teacher(load_target("digits"), root=root, show=False), make_model("lenet5_half", SHAPE, 10, 1)
    source, how = make_source("gaussian", SHAPE), dict(epochs=1, views="none", show=False)
    job = lambda n, path: balance(source, teacher, n, strategy, empty="keep", show=False, path=path)[0]
    distill(teacher, student, job(2048, None), **how)                                        # what libraries allocate once
    path = folder and folder / "set.safetensors"
    needed = memory_needed(n, teacher, student, strategy=strategy, mapped=path is not None)
    with Peak() as making: ts = job(n, path)
    with Peak() as teaching: taught = distill(teacher, student, ts, **how)
    size = sum(t.numel() * t.element_size() for t in (ts.images, ts.scores, ts.origin))
    rows = dict(balance=making.row() | dict(report=ts.info["report"]), distill=teaching.row() | dict(updates=taught.updates))
    for stage, row in rows.items(): row["estimate_mb"] = round(needed[stage] / 2**20, 1)
    return dict(images=n, strategy=strategy, in_memory=path is None, set_mb=round(size / 2**20, 1), **rows)


def fresh(n: int, strategy: str, args) -> dict:
    "A sample, in a process of its own, with a folder of its own that is gone afterwards."
    with tempfile.TemporaryDirectory(dir=args.temp) as folder:
        where = "" if args.in_memory else folder
        said = subprocess.run([sys.executable, "-m", "benchmarks.large", "--sample", str(n), strategy, str(args.root or ""), where],
                              cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(said.stdout)


def line(row: dict) -> str:
    "A sample as a line of text."
    told = [f"{stage} {r['seconds']:.1f} s, {r['before_mb']:.0f} -> {r['peak_mb']:.0f} MiB (estimate +{r['estimate_mb']:.0f})"
            for stage, r in row.items() if isinstance(r, dict)]
    return f"{row['images']:>9,} {row['strategy']:<5} set {row['set_mb']:.0f} MiB: " + "; ".join(told)


def main() -> Path:
    "Measure all sizes and write the record."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, nargs="+", default=[10**4, 10**5, 10**6])
    parser.add_argument("--strategy", nargs="+", default=["none", "fill"])
    parser.add_argument("--in-memory", action="store_true", help="hold the sets in memory, for comparison")
    parser.add_argument("--root", type=Path, help="data root with the teacher")
    parser.add_argument("--temp", help="where the temporary folder with the sets is made; needs three times the largest set")
    parser.add_argument("--out", type=Path, default=ROOT / "data/results/benchmarks")
    args = parser.parse_args()
    from kd_arbitrary.storage import write_atomic
    from kd_arbitrary.students.evaluate import machine, versions
    rows = []
    for n in args.images:
        for strategy in args.strategy:
            rows.append(fresh(n, strategy, args))
            print(line(rows[-1]), flush=True)
    now = datetime.now(timezone.utc)
    record = dict(benchmark="memory", finished=now.isoformat(timespec="seconds"), rows=rows, machine=machine() | dict(threads=1), versions=versions())
    name = f"memory-{'held-' if args.in_memory else ''}{now:%Y%m%dT%H%M%S}.json"
    return write_atomic(args.out / name, json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--sample"]:
        n, strategy, root, folder = sys.argv[2:]
        print(json.dumps(sample(int(n), strategy, Path(root) if root else None, Path(folder) if folder else None)))
    else: print(main())
