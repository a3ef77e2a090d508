"""A compiled model beside a plain one, put through the same calls."""

from __future__ import annotations

import copy
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

import rpcompile
from rpcompile.plan import Plan
from rpcompile.runtime.host_queue import HostQueue
from tests import models, reference

MICROBATCHES = 4
_plans: dict[tuple[str, str, str], Plan] = {}


def compile_case(case: models.Case, key: str, **options: Any) -> rpcompile.Compiled:
    """Compiles for two GPUs; cases of one key share a plan."""
    known = key, str(options.get("compute_dtype")), options.get("mode", "sync")
    compiled = rpcompile.compile(
        case.model,
        example_inputs=case.batch,
        gpus=2,
        microbatches=MICROBATCHES,
        solver_time_s=0.3,
        effort=None,
        gpu=models.SLOW_GPU,
        plan=_plans.get(known),
        **options,
    )
    _plans[known] = compiled.plan
    return compiled


@dataclass
class Pair:
    """The compiled model, and a plain one with the same weights."""

    compiled: rpcompile.Compiled
    plain: torch.nn.Module
    batch: dict[str, torch.Tensor]

    @property
    def model(self) -> torch.nn.Module:
        return self.compiled.model

    def batch_of(self, step: int) -> dict[str, torch.Tensor]:
        """Another order of rows in each step."""
        rows = torch.randperm(models.BATCH, generator=torch.Generator().manual_seed(step))
        return {name: value[rows] for name, value in self.batch.items()}

    def forward_backward(self, step: int) -> None:
        batch = self.batch_of(step)
        loss = self.compiled.forward_backward(**batch)
        assert torch.equal(loss, plain_forward_backward(self.plain, batch))

    def assert_equal(self) -> None:
        for (name, mine), theirs in zip(self.model.named_parameters(), self.plain.parameters(), strict=True):
            assert torch.equal(mine, theirs), name
            assert (mine.grad is None) == (theirs.grad is None), name
            assert mine.grad is None or torch.equal(mine.grad, theirs.grad), name


def plain_forward_backward(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The reference loop, a call's gradients being summed before they are added to `.grad`."""
    earlier = [parameter.grad for parameter in model.parameters()]
    for parameter in model.parameters():
        parameter.grad = None
    loss = reference.forward_backward(model, batch, MICROBATCHES, random=False)
    for parameter, grad in zip(model.parameters(), earlier, strict=True):
        if grad is not None:
            parameter.grad = grad if parameter.grad is None else grad.add_(parameter.grad)
    return loss


def pair(key: str = "mlp", make: Callable[[], models.Case] = models.mlp, **options: Any) -> Pair:
    case = models.build(make)
    plain = copy.deepcopy(case.model)
    return Pair(compile_case(case, key, **options), plain, case.batch)


def delay_host(monkeypatch: pytest.MonkeyPatch, seed: int = 0, longest_s: float = 0.02) -> None:
    """Every task of host queues begins late, by a random time."""
    put, choices = HostQueue.put, random.Random(seed)

    def late(self: HostQueue, priority: tuple[int, int], task: Callable[[], None]) -> object:
        pause_s = choices.choice((0, longest_s / 4, longest_s))

        def delayed() -> None:
            time.sleep(pause_s)
            task()

        return put(self, priority, delayed)

    monkeypatch.setattr(HostQueue, "put", late)
