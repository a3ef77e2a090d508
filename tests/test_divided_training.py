"""Chunks of tokens, groups of heads and offloaded attention together, through the whole runtime."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

import rpcompile
from rpcompile.ir import StageKind
from rpcompile.runtime.compiled_stages import CompiledStages
from tests import family_tiny, models, reference

# Chunks add in another order than plain PyTorch: float32 rounding of sums of some hundred terms.
ROUNDING = {"rtol": 1e-5, "atol": 1e-6}
COMPILER = shutil.which("c++") or shutil.which("g++")
NEEDS_COMPILER = pytest.mark.skipif(not COMPILER, reason="needs a C++ compiler")


def _cases() -> Iterator[object]:
    """Families with and without offloading, and through backends of torch.compile; most of those are slow."""
    for family in ("qwen3-tied", "qwen3-lora", "qwen3-moe"):
        yield from ((family, attention, None) for attention in ("recompute", "offload"))
        marks = [] if family == "qwen3-moe" else [pytest.mark.slow]
        yield pytest.param(family, "offload", "aot_eager", marks=marks)
    yield pytest.param("qwen3-tied", "offload", "inductor", marks=[pytest.mark.slow, NEEDS_COMPILER])


@pytest.mark.parametrize(("family", "attention", "backend"), _cases())
def test_divided_training_equals_plain_pytorch(
    family: str, attention: str, backend: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also with `compile_stages=True`; a region in chunks then runs between two compiled graphs."""
    monkeypatch.setattr(CompiledStages.__init__, "__defaults__", (backend,))
    case = models.build(family_tiny.moe) if family == "qwen3-moe" else models.make(family)
    plain = copy.deepcopy(case.model)
    with rpcompile.compile(
        case.model,
        3,
        example_inputs=case.batch,
        microbatches=4,
        gpu=replace(models.SLOW_GPU, name="cpu"),  # whose attention kernels run here
        tiles=2,
        head_groups=2,
        attention=attention,
        compile_stages=backend is not None,
        effort=None,
        solver_time_s=0.3,
    ) as compiled:
        plan = compiled.plan
        assert any(segment.tiles > 1 for segment in plan.chain.segments)
        assert any(segment.head_groups > 1 for segment in plan.chain.segments)
        assert any(stage.kind is StageKind.B for stage in plan.partition.stages)
        offloaded = any(name.startswith("host:kept.") for name in plan.schedule.buffers)
        assert offloaded == (attention == "offload")
        (runners,) = compiled._training.engine._runners.values()
        assert all((runner._compiled is not None) == (backend is not None) for runner in runners)
        torch.manual_seed(5)
        loss = compiled.forward_backward(**case.batch)
    torch.manual_seed(5)
    expected = reference.forward_backward(plain, case.batch, 4, random=True)
    torch.testing.assert_close(loss, expected, **ROUNDING)
    for (name, mine), theirs in zip(case.model.named_parameters(), plain.parameters(), strict=True):
        assert (mine.grad is None) == (theirs.grad is None), name
        if mine.grad is not None:
            torch.testing.assert_close(mine.grad, theirs.grad, **ROUNDING)
