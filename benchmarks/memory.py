"""What it costs when the C library gives memory back to the system between steps, and fetches it again page by page.

    python -m benchmarks.memory kept        # one sample, in a process of its own, as JSON
"""
import ctypes
import json
import subprocess
import sys
from pathlib import Path


def keep_memory() -> bool:  # whether the C library is one that can be told
    "Tell glibc to keep freed memory in this process, large blocks too."
    try: mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError): return False
    large = mallopt(-3, 1 << 30) or mallopt(-3, 32 << 20)                     # M_MMAP_THRESHOLD; older ones allow less
    return bool(large and mallopt(-1, 2**31 - 1))                             # M_TRIM_THRESHOLD


def sample() -> dict[str, tuple[int, dict]]:  # name to (images a call, seconds a call)
    "The steps that allocate most."
    import torch
    torch.set_num_threads(1)
    from benchmarks.measure import interleaved
    from benchmarks.micro import train_step
    from benchmarks.work import PAIRS, make_work
    work, deep = make_work(PAIRS["lenet"], 4096), make_work(PAIRS["alexnet"], 128)
    calls = {"LeNet-5, inference of 2,048": (4096, lambda: work.teachers["fast"](work.transfer.images, 2048)),
             "LeNet-5-half, training step of 512": (512, train_step(work, work.student("fast"), 512)),
             "AlexNet-half, training step of 128, bfloat16": (128, train_step(deep, deep.student("fast"), 128, True, True))}
    runs = interleaved({k: go for k, (_, go) in calls.items()}, 1, 3)
    return {k: (n, runs[k][0]) for k, (n, _) in calls.items()}


def compare(repeats: int) -> list[dict]:  # entries of a record's `micro`
    "Both ways by turns, each in a new process, because a process cannot go back."
    if not sys.platform.startswith("linux"): return []
    out = {}
    for _ in range(repeats):
        for how in ("given back", "kept"):
            command = [sys.executable, "-m", "benchmarks.memory", how]
            said = subprocess.run(command, cwd=Path(__file__).parent.parent, stdout=subprocess.PIPE, text=True, check=True)
            for name, (n, t) in json.loads(said.stdout).items():
                out.setdefault(name, dict(name=f"freed memory: {name}", items=n, runs={}))["runs"].setdefault(how, []).append(t)
    return list(out.values())


if __name__ == "__main__":
    if sys.argv[1] == "kept" and not keep_memory(): sys.exit("this system's C library has no mallopt")
    print(json.dumps(sample()))
