"""Predicted memory of stages against what the allocator reports while they really run."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn

from rpcompile.device_kernels import Kernels
from rpcompile.ir import Stage, StageKind
from rpcompile.passes._segment_memory import SegmentMemories
from rpcompile.passes.bind_chain import BindChain
from rpcompile.passes.estimate_costs import EstimateCosts
from tests import memory_cases, staged
from tests.measured_memory import Measured, without_onednn
from tests.small_captures import BATCH, Function, capture_of

F, B, FB = StageKind.F, StageKind.B, StageKind.FB
TEXT = ("Llama", "GPT-2", "BERT, padded", "LoRA on Qwen3")


@functools.cache
def measured(name: str) -> Measured:
    case = memory_cases.FAMILIES[name]()
    with without_onednn():
        return Measured(case, staged.capture(case.model, case.batch, 1))


def error(found: Measured, stage: Stage) -> float:
    """Of all that the stage has on its device."""
    given = found.given_bytes(stage)
    with without_onednn():
        return (found.predicted_bytes(stage) + given) / (found.measured_bytes(stage) + given) - 1


@pytest.mark.parametrize("name", memory_cases.FAMILIES)
def test_training_stages_of_several_segments(name: str) -> None:
    found = measured(name)
    n, first = len(found.chain.segments), found.chain.first_backward
    stages = [Stage(0, B, first, n // 2), Stage(0, B, n // 2, n - 2)]
    stages += [Stage(0, FB, n - 1, n - 1), Stage(0, FB, n // 2, n - 1)]
    # Cuts that are several tensors wide, and tensors that are dropped early, make it an upper bound.
    highest = 0.03 if name in TEXT else 0.05
    for stage in stages:
        assert -0.01 <= error(found, stage) <= highest, stage


@pytest.mark.parametrize("name", TEXT)
def test_forward_stages_of_several_segments(name: str) -> None:
    found = measured(name)
    n = len(found.chain.segments)
    for stage in (Stage(0, F, 0, n // 2), Stage(0, F, n // 2, n - 2)):
        assert abs(error(found, stage)) <= 0.03, stage


@pytest.mark.parametrize("name", ["Llama", "ResNet, BatchNorm"])
def test_every_segment_alone(name: str) -> None:
    found = measured(name)
    last = len(found.chain.segments) - 1
    for index, segment in enumerate(found.chain.segments):
        kinds = [F, *([FB if index == last else B] if segment.needs_backward else [])]
        for kind in kinds:
            assert abs(error(found, Stage(0, kind, index, index))) <= 0.03, (segment.name, kind)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["Llama", "LoRA on Qwen3"])
def test_against_the_allocator_of_a_gpu(name: str) -> None:
    case = memory_cases.FAMILIES[name]()
    case.model.to(torch.bfloat16)
    found = Measured(case, staged.capture(case.model, case.batch, 1), "cuda")
    last = len(found.chain.segments) - 1
    for stage in (Stage(0, F, 0, last - 1), Stage(0, B, 1, last - 1), Stage(0, FB, last, last)):
        assert abs(error(found, stage)) <= 0.05, stage


# ------------------------------------------------------------------------------ by hand


def memories(module: nn.Module, x: torch.Tensor, cuts: tuple[str, ...] = ()) -> SegmentMemories:
    return SegmentMemories(capture_of(module, {"x": x}, BATCH, cuts), {"batch": 4}, Kernels("cpu"))


def test_a_product_keeps_its_inputs_and_makes_gradients() -> None:
    """Tensors of 4 x 8 float32 take 128 bytes."""
    found = memories(Function(lambda x, w: (x * w).exp().sum(), (8,)), torch.randn(4, 8)).segment(0)
    assert found.saved_bytes == 128  # exp keeps its result; the product keeps x, which is the caller's
    # Backward, in place of exp's result: exp's gradient, its product with x, and the sum of that for w.
    assert found.peak_bytes == 128 + 128 + 32 - 128
    assert found.forward_peak_bytes == 256  # the product and exp


def test_in_place_and_views_take_nothing() -> None:
    plain = memories(Function(lambda x, w: (x * w).relu().sum(), (8,)), torch.randn(4, 8)).segment(0)
    placed = memories(
        Function(lambda x, w: torch.relu_(x * w).view(-1).sum(), (8,)), torch.randn(4, 8)
    ).segment(0)
    assert (plain.forward_peak_bytes, placed.forward_peak_bytes) == (256, 132)
    assert plain.saved_bytes == placed.saved_bytes == 128


def test_gradients_of_several_uses_are_added_in_place() -> None:
    thrice = memories(
        Function(lambda x, w: (y := x * w, (y * 2).sum() + (y * 3).sum() + (y * 4).sum())[1], (8,)),
        torch.randn(4, 8),
    ).segment(0)
    # The gradient, its product with x, and the sum of that for w. While gradients are added up there is
    # the one so far and the next one; a sum of its own would be a third, 384 bytes in all.
    assert thrice.peak_bytes == 128 + 128 + 32


def test_equal_segments_run_once_and_a_value_is_held_once() -> None:
    module = Function(lambda x, a, b: ((x * a).exp() * b).exp().sum(), (8,), (8,))
    found = memories(module, torch.randn(4, 8), ("exp",))
    first, second = found.segment(0), found.segment(1)
    # The second product holds what exp of the first holds anyway.
    assert (first.saved_bytes, second.saved_bytes, second.saved_input_bytes) == (128, 128, 0)
    module = Function(lambda x, a, b, c: ((x * a) * b).mul(c).sum(), (8,), (8,), (8,))
    found = memories(module, torch.randn(4, 8), ("mul", "mul_1"))
    first, second, third = (found.segment(index) for index in range(3))
    assert (first.saved_bytes, second.saved_input_bytes, third.saved_input_bytes) == (0, 128, 128)
    assert len(found._known) == 3  # x needs no gradient, and the last one has the sum


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_callers_that_evaluate_get_the_same_figures(mode) -> None:
    found = measured("Llama")
    costed = EstimateCosts().run(found.captured)
    with mode():
        chain = BindChain(dict(found.captured.example_sizes), found.chain.hardware).run(costed)
    assert chain.segments == found.chain.segments
