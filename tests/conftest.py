"""What the tests share."""
import pytest
import torch

from kd_arbitrary.teachers.recipes import train_teacher
from kd_arbitrary.teachers.targets import load_target

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def root(tmp_path_factory):
    "A data root that holds a teacher of the digits."
    root = tmp_path_factory.mktemp("root")
    train_teacher(load_target("digits"), root=root, show=False)
    return root
