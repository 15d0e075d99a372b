"""Makes the scripts importable, keeps tests on one torch thread, and undoes what a run sets for its whole process."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
torch.set_num_threads(1)


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes more than 15 s on a busy machine")


@pytest.fixture(autouse=True)
def restore_matmul_precision():
    yield
    torch.set_float32_matmul_precision("highest")
