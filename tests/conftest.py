"""Makes the scripts importable, keeps tests on one torch thread, and undoes what a run sets for its whole process."""

import gc
import signal
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
torch.set_num_threads(1)
STOPS = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
for number in (signal.SIGINT, signal.SIGHUP):  # nohup and shells' background jobs ignore them, and runs would, too
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, signal.SIG_DFL if number == signal.SIGHUP else signal.default_int_handler)


def pytest_collection_finish():
    gc.collect()
    gc.freeze()  # what is imported by now is not searched again: garbage collections are quick


@pytest.fixture(autouse=True)
def restore():
    """A script run as __main__ in this process leaves its own signal handlers behind."""
    handlers = {number: signal.getsignal(number) for number in STOPS}
    yield
    torch.set_float32_matmul_precision("highest")
    for number, handler in handlers.items():
        signal.signal(number, handler)
