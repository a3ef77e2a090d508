"""Ctrl-C anywhere in a training loop leaves a model that goes on."""

from __future__ import annotations

import _thread
import copy
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rpcompile.runtime.interrupts import uninterrupted
from tests import training


class AtCall:
    """Interrupts the main thread at one of the calls of rpcompile's functions that it makes, counted from 1.

    Signals are looked at where functions begin. (Not at every line: nothing can come between the last line
    of a `with` block and its end.)
    """

    def __init__(self, number: int) -> None:
        self.number, self.count = number, 0

    def __call__(self, frame: Any, *_: Any) -> None:
        if "/rpcompile/" in frame.f_code.co_filename:
            self.count += 1
            if self.count == self.number:
                _thread.interrupt_main()

    def run(self, work: Callable[[], object]) -> bool:
        """Whether `work` was interrupted."""
        sys.settrace(self)
        try:
            work()
        except KeyboardInterrupt:
            return True
        finally:
            sys.settrace(None)
        return False


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_an_interrupt_anywhere_leaves_a_model_that_goes_on(mode: str) -> None:
    pair = training.pair(mode=mode, timeout_s=10)
    start = copy.deepcopy(pair.model.state_dict())
    optimizer = torch.optim.SGD(pair.model.parameters(), 0.1, momentum=0.9)
    expected = training.plain_forward_backward(pair.plain, pair.batch)
    with pair.compiled as compiled:

        def iterate() -> None:
            for _ in range(2):
                compiled.forward_backward(**pair.batch)
                compiled.clip_grad_norm_(1.0)
                compiled.step(optimizer)
                optimizer.zero_grad()

        iterate()
        whole = AtCall(0)
        assert not whole.run(iterate)
        interrupted = 0
        for number in range(80):
            interrupted += AtCall(1 + number * whole.count // 80).run(iterate)
            compiled.wait()
            assert all(type(parameter) is torch.nn.Parameter for parameter in pair.model.parameters())
            pair.model.zero_grad()
            compiled.load_state_dict(start)
            assert torch.equal(compiled.forward_backward(**pair.batch), expected), number
            pair.assert_equal()
            pair.model.zero_grad()
        assert interrupted > 70


def test_an_interrupt_within_comes_at_the_end() -> None:
    before = signal.getsignal(signal.SIGINT)
    done: list[int] = []

    def work() -> None:
        with uninterrupted():
            with uninterrupted():
                _thread.interrupt_main()
                done.append(1)
            done.append(2)
        done.append(3)

    with pytest.raises(KeyboardInterrupt):
        work()
    assert done == [1, 2]
    assert signal.getsignal(signal.SIGINT) is before
    with pytest.raises(ValueError, match="of the block"), uninterrupted():
        raise ValueError("of the block")
    assert signal.getsignal(signal.SIGINT) is before


SOLVING = """
import os, signal, threading
from rpcompile.passes.partition_stages import PartitionStages
from tests.chains import chain

def interrupt():
    os.kill(os.getpid(), signal.SIGINT)

long = chain(60, {i: {"forward_s": 2.0 + i % 7, "backward_s": 3.0 + i % 5} for i in range(60)})
threading.Timer(2.0, interrupt).start()
try:
    PartitionStages(8, 16, time_limit_s=600.0).run(long)
except KeyboardInterrupt:
    print("while it solves")
PartitionStages(2, 2, time_limit_s=5.0).run(chain(3))
try:
    interrupt()
    threading.Event().wait(60)
except KeyboardInterrupt:
    print("and afterwards")
"""


def test_a_solver_leaves_interrupts_to_python() -> None:
    command, here = [sys.executable, "-c", SOLVING], Path(__file__).parents[1]
    done = subprocess.run(command, cwd=here, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stdout) == (0, "while it solves\nand afterwards\n"), done.stderr
