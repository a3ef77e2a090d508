"""Random module graphs: staged execution, cut anywhere, equals eager PyTorch bit for bit, or is refused."""

from __future__ import annotations

import copy
import random
from dataclasses import dataclass

import pytest
import torch
from hypothesis import HealthCheck, assume, event, given, settings
from hypothesis import strategies as st
from torch import nn

from rpcompile.errors import UnsupportedModel
from rpcompile.passes.find_cuts import FindCuts
from tests import random_models, reference, staged
from tests.models import Case
from tests.random_models import Step

REFUSALS = ("in place", "depends on the buffer 'count'", "depends on the buffer 'average'")


@dataclass(frozen=True)
class AnyCuts(FindCuts):
    """Up to six of all legal cuts, instead of those worth considering."""

    seed: int = 0

    def _choose(self, graph: object) -> list[int]:
        legal = sorted(graph._crossing)  # type: ignore[attr-defined]
        return sorted(random.Random(self.seed).sample(legal, min(6, len(legal))))


def check(program: tuple[Step, ...], kept: int, seed: int) -> None:
    """Every partition equals eager, or the capture is refused for a reason that is known."""
    case = random_models.case(program, kept)
    try:
        loss = reference.forward_backward(copy.deepcopy(case.model), case.batch, 4, random=True)
    except RuntimeError:
        assume(False)
        return
    assume(loss.isfinite())
    refused = ""
    try:
        staged.check_parity(case, partitions=2, find_cuts=AnyCuts(seed=seed))
    except UnsupportedModel as error:
        refused = str(error)
    event(refused.partition("(")[0] or "equal")
    assert not refused or any(reason in refused for reason in REFUSALS), refused


slow = [HealthCheck.too_slow, HealthCheck.filter_too_much]


@settings(max_examples=15, deadline=None, suppress_health_check=slow)
@given(program=random_models.steps(), kept=st.integers(1, 4), seed=st.integers(0, 99))
def test_staged_execution_equals_eager(program: tuple[Step, ...], kept: int, seed: int) -> None:
    check(program, kept, seed)


LINEAR = Step("linear")
EVERY = {
    "average kept without gradients": (Step("buffers", n=1), LINEAR),
    "buffer assigned": (Step("buffers", n=2), LINEAR),
    "buffer changed through a slice": (Step("buffers", n=3), Step("buffers", n=0), LINEAR),
    "dropout without gradients": (LINEAR, Step("cut_off", n=1), LINEAR),
    "changed in place without gradients": (LINEAR, Step("cut_off", n=2), LINEAR),
    "gradients inside of no gradients": (LINEAR, Step("cut_off", n=3), LINEAR),
    "view made before its base takes up a gradient": (LINEAR, Step("filled", n=1), LINEAR, LINEAR),
    "base filled without gradients": (LINEAR, Step("filled", n=0), LINEAR, LINEAR),
    "written through a view": (LINEAR, Step("changed_through_view", n=3), LINEAR),
    "layers called again": (LINEAR, LINEAR, Step("transposed_weight"), LINEAR),
    "frozen layer": (Step("linear", n=1), Step("linear", a=2, n=1), LINEAR),
    "results of which one is used": (LINEAR, Step("several", n=1), Step("several", n=3), LINEAR),
    "statistics": (LINEAR, Step("norm", n=0), LINEAR, Step("norm", n=0), LINEAR),
}


@pytest.mark.parametrize("name", EVERY)
def test_program(name: str) -> None:
    case = random_models.case(EVERY[name], 2)
    for seed in range(2):
        staged.check_parity(case, partitions=3, find_cuts=AnyCuts(seed=seed))


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (
            (Step("buffers", n=4), LINEAR),
            r"loss depends on the buffer 'count', which its forward changes \(aten\.add_\.Tensor"
            r" in forward\): recomputed in the backward, it would be another one\. Change the buffer outside",
        ),
        (
            (Step("changed_in_place", a=1, n=0), LINEAR),
            r"^RandomModel changes 'x' in place \(aten\.relu_\.default in forward\); assign a new tensor",
        ),
    ],
)
def test_what_would_be_a_wrong_number_is_refused(program: tuple[Step, ...], message: str) -> None:
    case = random_models.case(program, 2)
    with pytest.raises(UnsupportedModel, match=message):
        staged.capture(case.model, case.batch)


def test_a_buffer_that_is_assigned_another_shape_is_refused() -> None:
    class Grows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)
            self.inner.register_buffer("seen", torch.zeros(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.inner(x)
            self.inner.seen = y.detach().sum()
            return y.sum()

    message = (
        r"Grows assigns float32 of shape \(\) to its buffer 'inner\.seen', which was float32 of shape \(4,\)"
    )
    with pytest.raises(UnsupportedModel, match=message):
        staged.capture(Grows(), {"x": torch.zeros(8, 4)})


class WritesThroughView(nn.Module):
    """Draws random numbers into a part of a tensor; nothing uses what the operator itself returns."""

    def __init__(self, into_mask: bool) -> None:
        super().__init__()
        self.into_mask = into_mask
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden, mask = self.a(x), torch.ones(8)
        if self.into_mask:
            mask[:4].bernoulli_(0.5)
        else:
            hidden[:, :4].normal_()
        return self.b(hidden * mask).square().mean()


@pytest.mark.parametrize("into_mask", [True, False])
def test_random_numbers_written_through_a_view_are_drawn(into_mask: bool) -> None:
    batch = {"x": torch.randn(8, 8, generator=torch.Generator().manual_seed(0))}
    captured = staged.check_parity(Case(WritesThroughView(into_mask).train(), batch), partitions=3)
    assert len(captured.random) == 1


class Regions(nn.Module):
    """A region without autocast that draws random numbers, and changes a tensor or a buffer outside."""

    def __init__(self, keeps_average: bool) -> None:
        super().__init__()
        self.keeps_average = keeps_average
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.register_buffer("average", torch.zeros(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.a(x)
        scale = torch.ones(8)
        with torch.autocast("cpu", enabled=False):
            kept = nn.functional.dropout(hidden.float(), 0.5)
            if self.keeps_average:
                self.average.lerp_(kept.detach().mean(0), 0.1)
            scale.mul_(2)
        return self.b(kept * scale).float().square().mean()


def autocast() -> torch.autocast:
    return torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False)


def test_region_under_autocast_is_random_and_changes_what_it_is_given() -> None:
    batch = {"x": torch.randn(8, 8, generator=torch.Generator().manual_seed(0))}
    case = Case(Regions(False).train(), batch)
    captured = staged.check_parity(case, partitions=3, context=autocast, find_cuts=AnyCuts(seed=0))
    assert len(captured.random) == 1
    # A region is one operator, which reads what it changes.
    message = r"depends on the buffer 'average', which its forward changes \(wrap_with_autocast in forward\)"
    with autocast(), pytest.raises(UnsupportedModel, match=message):
        staged.capture(Regions(True).train(), batch)
