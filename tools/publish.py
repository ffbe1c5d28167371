"""Put trained teachers beside the library, where everyone finds them: `python tools/publish.py FILE.safetensors ...`

Each file is one of `train_teacher`, below the data root in teachers/. Its card gets the fingerprint of the weights.
A published teacher is not replaced: records name it.
"""
import argparse, sys
from pathlib import Path

from kd_arbitrary.teachers.recipes import PUBLISHED, load_model, save_model, teacher_name
from kd_arbitrary.teachers.teacher import Teacher

LARGEST = 30 * 2**20  # bytes of all published teachers together


def publish(path: Path) -> Path:
    "Write one teacher, with its fingerprint on the card; the published file."
    model, card = load_model(path)
    name = teacher_name(card["target"], card["recipe"])
    if path.stem != name: sys.exit(f"{path} is not the teacher its card describes, {name}; give a file of train_teacher")
    fingerprint = Teacher(model, tuple(card["classes"]), tuple(card["shape"])).fingerprint
    out = PUBLISHED / f"{name}.safetensors"
    if out.exists() and load_model(out)[1]["fingerprint"] != fingerprint: sys.exit(f"{out} is published with other weights; records name it, so it stays")
    return save_model(out, model, card | dict(fingerprint=fingerprint))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    for file in parser.parse_args().files: print(publish(file))
    size = sum(path.stat().st_size for path in PUBLISHED.iterdir())
    if size > LARGEST: sys.exit(f"the published teachers take {size / 2**20:.1f} MiB, more than {LARGEST / 2**20:.0f}; publish fewer")
