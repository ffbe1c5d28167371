"""Put trained teachers beside the library, where everyone finds them: `python tools/publish.py FILE.safetensors ...`

Each file is one of `train_teacher`, below the data root in teachers/. Its card gets the fingerprint of the weights.
A published teacher is not replaced: records name it. With `--half` kernels and matrices are rounded to float16 first,
which halves the file; the teacher is the rounded network, and its accuracy is measured again.
"""
import argparse, sys
from pathlib import Path

from torch import Tensor, nn

from kd_arbitrary.students.evaluate import evaluate
from kd_arbitrary.teachers.recipes import PUBLISHED, load_model, save_model, teacher_name
from kd_arbitrary.teachers.targets import load_target
from kd_arbitrary.teachers.teacher import Teacher

LARGEST = 30 * 2**20  # bytes of all published teachers together


def kernels(model: nn.Module) -> list[Tensor]:
    "Kernels and matrices, not biases and norms."
    return [weight for weight in model.parameters() if weight.ndim > 1]


def rounded(model: nn.Module, card: dict) -> dict:
    "The card of a network whose kernels and matrices are rounded in place, as float32."
    for weight in kernels(model): weight.data = weight.data.half().float()
    target = load_target(card["target"])
    return card | dict(stored="float16", test_accuracy=evaluate(model, target.test_images, target.test_labels)["accuracy"])


def publish(path: Path, half: bool = False) -> Path:
    "Write one teacher, with its fingerprint on the card; the published file."
    model, card = load_model(path)
    name = teacher_name(card["target"], card["recipe"])
    if path.stem != name: sys.exit(f"{path} is not the teacher its card describes, {name}; give a file of train_teacher")
    if half: card = rounded(model, card)
    fingerprint = Teacher(model, tuple(card["classes"]), tuple(card["shape"])).fingerprint
    out = PUBLISHED / f"{name}.safetensors"
    if out.exists() and load_model(out)[1]["fingerprint"] != fingerprint: sys.exit(f"{out} is published with other weights; records name it, so it stays")
    if half:
        for weight in kernels(model): weight.data = weight.data.half()
    return save_model(out, model, card | dict(fingerprint=fingerprint))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--half", action="store_true", help="round kernels and matrices to float16")
    asked = parser.parse_args()
    for file in asked.files: print(publish(file, asked.half))
    size = sum(path.stat().st_size for path in PUBLISHED.iterdir())
    if size > LARGEST: sys.exit(f"the published teachers take {size / 2**20:.1f} MiB, more than {LARGEST / 2**20:.0f}; publish fewer")
