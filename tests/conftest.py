"""What the tests share."""
import pytest
import torch

from kd_arbitrary.data import load_target
from kd_arbitrary.teacher import train_teacher

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def root(tmp_path_factory):
    "A data root that holds a teacher of the digits."
    root = tmp_path_factory.mktemp("root")
    train_teacher(load_target("digits"), root=root, show=False)
    return root
