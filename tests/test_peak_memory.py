"""Predicted memory of stages against what the allocator reports while they really run."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn

from rpcompile.device_kernels import Kernels
from rpcompile.ir import Partition, Stage, StageKind
from rpcompile.passes._segment_memory import SegmentMemories
from rpcompile.passes.bind_chain import BindChain
from rpcompile.passes.choose_tiles import ChooseTiles
from rpcompile.passes.estimate_costs import EstimateCosts
from rpcompile.passes.find_stage_memory import FindStageMemory
from rpcompile.stage_bytes import Workspaces
from tests import families, memory_cases, staged
from tests.measured_memory import Measured, hardware, without_onednn
from tests.small_captures import BATCH, Function, capture_of

F, B, FB = StageKind.F, StageKind.B, StageKind.FB


@functools.cache
def measured(name: str) -> Measured:
    case = memory_cases.FAMILIES[name]()
    with without_onednn():
        return Measured(case, staged.capture(case.model, case.batch, 1))


def errors(found: Measured, stage: Stage) -> tuple[float, float]:
    """Of all that the stage has on its device: of what is predicted, and of the bound that chose it."""
    given = found.given_bytes(stage)
    with without_onednn():
        taken = found.measured_bytes(stage) + given
        return (found.predicted_bytes(stage) + given) / taken - 1, (
            found.bound_bytes(stage) + given
        ) / taken - 1


@pytest.mark.parametrize("name", memory_cases.FAMILIES)
def test_stages_of_one_segment_a_few_and_many(name: str) -> None:
    found = measured(name)
    for stage in memory_cases.stages(found.chain):
        error, bound = errors(found, stage)
        assert abs(error) <= 0.03, stage
        assert bound >= -0.01, stage


def test_a_boundary_inside_a_forward_stage_is_held_to_its_end() -> None:
    found = measured("Llama")
    stages = (Stage(0, F, 0, 4), Stage(1, FB, 5, 5), Stage(2, B, 3, 4), Stage(3, B, 0, 2))
    planned = found.found(*stages)[0].workspace_bytes
    alone = found.found(stages[0])[0].workspace_bytes
    assert planned is not None
    assert alone is not None
    kept = found.chain.segments[2].boundary_bytes
    # Both have a buffer from the beginning on; while the peak lasts, one of them is not there yet.
    assert alone - kept <= planned <= alone


def test_values_that_only_pass_by_a_forward_stage_take_no_memory_of_its_own() -> None:
    module = Function(lambda x, a, b: ((x * a) * (x.sin() * b).exp()).sum(), (8,), (8,))
    capture = capture_of(module, {"x": torch.randn(4, 8)}, BATCH, ("mul", "mul_1"))
    chain = BindChain({"batch": 4}, hardware("cpu")).run(EstimateCosts().run(capture))
    assert [len(segment.boundary) for segment in chain.segments] == [1, 2, 0]
    partition = Partition((Stage(0, F, 1, 1),), 0, 0.0, 0.0, "GIVEN", 0.0, "")
    (stage,) = FindStageMemory(capture, chain).run(partition).stages
    # It makes the sine and a product, 128 bytes each; its buffers hold the product and what passes.
    assert stage.workspace_bytes == 128 + 128 - (128 + 128)
    assert Workspaces(chain).of(stage) >= 0 == stage.workspace_bytes


@pytest.mark.parametrize(("tiles", "groups"), [(1, 1), (4, 2)])
def test_all_of_a_measurement_happens_on_its_device(tiles: int, groups: int) -> None:
    """On tensors without data, which mix with those of the CPU no more than those of a GPU do."""
    case = memory_cases.FAMILIES["Llama"]()
    captured = staged.capture(case.model, case.batch, 1)
    found = Measured(case, captured, "meta", tiles=tiles, head_groups=groups)
    for stage in memory_cases.stages(found.chain):
        assert found.predicted_bytes(stage) > 0
        assert found.measured_bytes(stage) <= 64  # a number or two, which are the CPU's on a GPU, too


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["Llama", "LoRA on Qwen3"])
def test_against_the_allocator_of_a_gpu(name: str) -> None:
    case = memory_cases.FAMILIES[name]()
    case.model.to(torch.bfloat16)
    found = Measured(case, staged.capture(case.model, case.batch, 1), "cuda")
    last = len(found.chain.segments) - 1
    for stage in (Stage(0, F, 0, last - 1), Stage(0, B, 1, last - 1), Stage(0, FB, last, last)):
        assert abs(errors(found, stage)[0]) <= 0.05, stage


@pytest.mark.parametrize(("tiles", "groups"), [(1, 1), (3, 2)])
def test_a_gpu_is_under_autocast_too(tiles: int, groups: int) -> None:
    """What autograd keeps is half as wide, and as much as on the CPU, but for what an allocator rounds up."""
    item = families.family("bfloat16 autocast")
    assert item.tiny is not None
    case = item.tiny()
    with item.context():
        costed = EstimateCosts().run(staged.capture(case.model, case.batch, 1))
    sizes = {"batch": 8, "sequence": 64}
    on_cpu, on_gpu = (
        ChooseTiles(costed, tiles, groups).run(BindChain(sizes, hardware(device)).run(costed))
        for device in ("cpu", "cuda")
    )
    for mine, theirs in zip(on_gpu.segments, on_cpu.segments, strict=True):
        assert mine.saved_bytes == pytest.approx(theirs.saved_bytes, rel=0.05, abs=4096)


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
