"""A process that ends while something is in flight ends as if nothing were."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BUSY = """
import time
import torch
from rpcompile.runtime.host_queue import HostQueue
from rpcompile.runtime.streams import Iteration, StreamThread

def work():
    matrix, end = torch.randn(200, 200), time.monotonic() + 0.3
    while time.monotonic() < end:
        matrix = torch.nn.functional.normalize(matrix @ matrix)
"""
UPDATES = """
queues = [HostQueue("rpcompile-host") for _ in range(4)]
weights = [torch.zeros(()) for _ in queues]
for queue, weight in zip(queues, weights):
    for _ in range(2):
        queue.put((0,), lambda weight=weight: (work(), weight.add_(1)))
"""
ITERATIONS = """
iteration = Iteration({})
threads = [StreamThread(f"rpcompile-gpu{gpu}", (gpu, "compute")) for gpu in range(5)]
for thread in threads[1:]:
    thread.put(iteration, "0F0", work)
    thread.put(iteration, "0F1", lambda: print("begun after the end"))
threads[0].put(iteration, "wait 0F1@0", lambda: iteration.wait("0F1@0"))
"""


@pytest.mark.parametrize("ending", ["", "raise SystemExit(3)"])
@pytest.mark.parametrize("what", [UPDATES, ITERATIONS])
def test_the_process_ends_with_its_own_status(what: str, ending: str) -> None:
    command = [sys.executable, "-c", BUSY + what + ending]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (3 if ending else 0, "", "")


def test_updates_in_flight_are_over_when_handlers_registered_earlier_run() -> None:
    handler = "import atexit\natexit.register(lambda: print([int(weight) for weight in weights]))\n"
    command = [sys.executable, "-c", handler + BUSY + UPDATES]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "[2, 2, 2, 2]\n")
