"""How fast pictures are decoded into their file, and what that holds in memory.

    python -m benchmarks.files [--pictures 100000] [--size 32] [--folder DIR]     # JSON; a bound that is passed is exit status 1
"""
import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

BOUND = 128  # MiB beyond what the process held before: 64 that stay in memory at first, 16 that are written at a time, names, decoders


def status(name: str) -> float:
    "A line of what Linux says of this process, in MiB."
    return int(Path("/proc/self/status").read_text().split(f"{name}:")[1].split()[0]) / 1024


def make(folder: Path, n: int, size: int) -> None:
    "JPEG files of smooth noise, a thousand a folder."
    rng = np.random.default_rng(0)
    for i in range(n):
        if i % 1000 == 0: (folder / f"{i // 1000:03d}").mkdir(parents=True, exist_ok=True)
        small = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        small.resize((size, size), Image.Resampling.BICUBIC).save(folder / f"{i // 1000:03d}/{i}.jpg")


def measure(folder: Path, size: int) -> dict:
    "Seconds and memory of the first look and of the second."
    from kd_arbitrary.pictures.files import read_pictures
    from kd_arbitrary.students.evaluate import machine
    out = dict(machine=machine(), size=size)
    for look in ("first", "second"):
        Path("/proc/self/clear_refs").write_text("5")
        before, start = status("VmRSS"), time.perf_counter()
        images = read_pictures(folder / "in", (3, size, size), folder, show=False).images
        out[look] = dict(seconds=round(time.perf_counter() - start, 2), peak_mb=round(status("VmHWM") - before, 1))
        out |= dict(pictures=len(images), pixels_mb=round(images.numel() / 2**20, 1))
        del images
    return out


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=100_000)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--folder", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as d:
        make(Path(d) / "in", args.pictures, args.size)
        found = measure(Path(d), args.size)
    print(json.dumps(found))
    sys.exit(found["first"]["peak_mb"] > BOUND)
