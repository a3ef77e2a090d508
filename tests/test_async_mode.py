"""`mode="async"`: forward i uses the weights after max(i - 1, 0) updates; nothing is lost."""

from __future__ import annotations

import copy
import random
import threading
import time
from typing import Any

import pytest
import torch
from torch import nn, optim

import rpcompile
from rpcompile.runtime.optimizer_subsets import SubsetStepper
from tests import models, training


class Simulated:
    """Exactly this staleness, in plain PyTorch: every version of the weights is kept."""

    def __init__(self, model: nn.Module, optimizer: optim.Optimizer, dtype: torch.dtype | None) -> None:
        self.model, self.optimizer, self.dtype = model, optimizer, dtype
        self.versions = [copy.deepcopy(model)]

    def forward_backward(self, version: int, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Gradients at one version, added to the newest weights' `.grad`."""
        old = copy.deepcopy(self.versions[version])
        old.zero_grad()
        if self.dtype is not None:
            old.to(self.dtype)
            batch = {k: v.to(self.dtype) if v.is_floating_point() else v for k, v in batch.items()}
        loss = training.plain_forward_backward(old, batch)
        for new, at in zip(self.model.parameters(), old.parameters(), strict=True):
            grad = at.grad.float()
            new.grad = grad if new.grad is None else new.grad + grad
        return loss

    def step(self, clip: float | None = None) -> None:
        if clip is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.versions.append(copy.deepcopy(self.model))


def make_pair(dtype: torch.dtype | None = None, name: str = "adamw") -> tuple[Any, ...]:
    case = models.build(models.mlp)
    kinds: dict[str, Any] = {
        "adamw": lambda p: optim.AdamW(p, lr=0.05, fused=True),
        "sgd": lambda p: optim.SGD(p, lr=0.5, momentum=0.9),
        "not separable": lambda p: NormScaled(p),
    }
    plain = copy.deepcopy(case.model)
    simulated = Simulated(plain, kinds[name](plain.parameters()), dtype)
    compiled = training.compile_case(case, "mlp", mode="async", compute_dtype=dtype)
    found = training.Pair(compiled, plain, case.batch)
    return found, kinds[name](compiled.parameters()), simulated


def same_weights(model: nn.Module, expected: nn.Module) -> bool:
    return all(map(torch.equal, model.parameters(), expected.parameters()))


@pytest.mark.parametrize(
    ("dtype", "name", "read"),
    [
        (None, "adamw", False),
        (None, "sgd", True),
        (None, "not separable", False),
        (torch.bfloat16, "adamw", False),
        (torch.bfloat16, "sgd", True),
    ],
)
def test_staleness_is_one_update_bit_for_bit_with_random_delays(
    dtype: torch.dtype | None, name: str, read: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair, optimizer, simulated = make_pair(dtype, name)
    with pair.compiled as compiled:
        training.delay_host(monkeypatch, seed=len(name))
        choices = random.Random(1)
        compiled._training.engine.before_instruction = lambda _: time.sleep(choices.choice((0, 0, 0, 0.001)))
        losses = []
        for iteration in range(6):
            batch = pair.batch_of(iteration)
            loss = compiled.forward_backward(**batch)
            losses.append(loss)
            assert torch.equal(loss, simulated.forward_backward(max(iteration - 1, 0), batch)), iteration
            if iteration % 2:
                compiled.clip_grad_norm_(0.3)
            compiled.step(optimizer)
            optimizer.zero_grad()
            simulated.step(0.3 if iteration % 2 else None)
            if read:  # waits, and changes nothing
                assert same_weights(pair.model, simulated.versions[-1])
        assert losses[0] != losses[1]
        assert same_weights(pair.model, simulated.versions[-1])


def test_the_iteration_does_not_wait_for_the_update_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    pair, optimizer, simulated = make_pair()
    over, original = threading.Event(), SubsetStepper.step

    def late(self: SubsetStepper, members: Any) -> None:
        assert over.wait(20), "the iteration waits for the update"
        original(self, members)

    with pair.compiled as compiled:
        compiled.forward_backward(**pair.batch)
        simulated.forward_backward(0, pair.batch)
        monkeypatch.setattr("rpcompile.runtime.updates.is_separable", lambda _: True)
        monkeypatch.setattr(SubsetStepper, "step", late)
        compiled.step(optimizer)
        optimizer.zero_grad()
        simulated.step()
        loss = compiled.forward_backward(**pair.batch)
        over.set()
        assert torch.equal(loss, simulated.forward_backward(0, pair.batch))
        assert same_weights(pair.model, simulated.versions[1])
        compiled.step(optimizer)
        simulated.step()
        assert same_weights(pair.model, simulated.versions[2])


def test_accumulated_calls_see_one_version(monkeypatch: pytest.MonkeyPatch) -> None:
    pair, optimizer, simulated = make_pair()
    training.delay_host(monkeypatch)
    with pair.compiled as compiled:
        for iteration in range(3):
            for part in range(2):
                batch = pair.batch_of(2 * iteration + part)
                expected = simulated.forward_backward(max(iteration - 1, 0), batch)
                assert torch.equal(compiled.forward_backward(**batch), expected)
            compiled.step(optimizer)
            optimizer.zero_grad()
            simulated.step()
        assert same_weights(pair.model, simulated.versions[-1])


@pytest.mark.parametrize("edit", ["load_state_dict", "in place"])
def test_loaded_weights_are_used_at_once(edit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pair, optimizer, simulated = make_pair()
    training.delay_host(monkeypatch)
    start = copy.deepcopy(pair.model.state_dict())
    with pair.compiled as compiled:
        for iteration in range(2):
            compiled.forward_backward(**pair.batch)
            simulated.forward_backward(max(iteration - 1, 0), pair.batch)
            compiled.step(optimizer)
            optimizer.zero_grad()
            simulated.step()
        for model in (pair.model, simulated.model):
            if edit == "load_state_dict":
                model.load_state_dict(start)
            else:
                with torch.no_grad():
                    model.layers[2].weight.mul_(0.5)
        simulated.versions.append(copy.deepcopy(simulated.model))
        expected = simulated.forward_backward(-1, pair.batch)
        assert torch.equal(compiled.forward_backward(**pair.batch), expected)
        compiled.step(optimizer)
        simulated.step()
        assert same_weights(pair.model, simulated.versions[-1])


def test_evaluation_uses_all_updates_and_leaves_the_staleness(monkeypatch: pytest.MonkeyPatch) -> None:
    pair, optimizer, simulated = make_pair(torch.bfloat16)
    training.delay_host(monkeypatch)
    with pair.compiled as compiled:
        for iteration in range(3):
            loss = compiled.forward_backward(**pair.batch)
            assert torch.equal(loss, simulated.forward_backward(max(iteration - 1, 0), pair.batch))
            compiled.step(optimizer)
            optimizer.zero_grad()
            simulated.step()
            newest = copy.deepcopy(simulated.versions[-1]).bfloat16()
            parts = [
                newest(
                    *(v.chunk(4)[i].bfloat16() if v.is_floating_point() else v.chunk(4)[i] for v in values)
                )
                for values in [tuple(pair.batch.values())]
                for i in range(4)
            ]
            assert torch.equal(compiled(**pair.batch), torch.stack(parts).mean())


def test_plan_and_mode_go_together() -> None:
    case = models.build(models.mlp)
    with training.compile_case(case, "mlp", mode="async") as compiled:
        assert isinstance(compiled, rpcompile.Compiled)
        compiled.plan.verify()


class NormScaled(optim.Optimizer):
    """Divides by the norm of all gradients."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        parameters = self.param_groups[0]["params"]
        norm = torch.stack([p.grad.norm() for p in parameters]).norm()
        for p in parameters:
            p.sub_(0.1 * p.grad / norm)
