"""Makes the scripts importable, keeps tests on one torch thread, and undoes what a run sets for its whole process."""

import signal
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
torch.set_num_threads(1)
for number in (signal.SIGINT, signal.SIGHUP):  # nohup and shells' background jobs ignore them, and runs would, too
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, signal.SIG_DFL if number == signal.SIGHUP else signal.default_int_handler)


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes more than 15 s on a busy machine")


@pytest.fixture(autouse=True)
def restore_matmul_precision():
    yield
    torch.set_float32_matmul_precision("highest")
