"""Which segments are tiled, what that does to their memory, and training with it."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

import rpcompile
from rpcompile.errors import InvalidArgument
from rpcompile.ir import SegmentChain, Stage, StageKind
from rpcompile.passes.bind_chain import BindChain
from rpcompile.passes.capture_graph import ExampleInputs
from rpcompile.passes.choose_tiles import ChooseTiles
from rpcompile.planner import CapturedModel, capture_model
from tests import memory_cases, models, reference, staged
from tests.measured_memory import Measured

F, B, FB = StageKind.F, StageKind.B, StageKind.FB
SIZES = {"batch": 1, "sequence": 2048}


@pytest.fixture(scope="module")
def captured() -> CapturedModel:
    case = models.make("qwen3-tied")
    case.model.to(torch.bfloat16)  # attention that takes memory in proportion to the sequence
    return capture_model(case.model, ExampleInputs.of(case.batch))


def bound(captured: CapturedModel, usable_bytes: int) -> SegmentChain:
    hardware = replace(models.SLOW_GPU, memory_bytes=1 << 40, usable_bytes=usable_bytes)
    return BindChain(SIZES, hardware).run(captured.costed)


def tiles_of(chain: SegmentChain) -> list[int]:
    return [segment.tiles for segment in chain.segments]


def needs(chain: SegmentChain) -> list[int]:
    return [segment.saved_bytes + segment.peak_bytes for segment in chain.segments]


def test_what_fits_is_left_alone(captured: CapturedModel) -> None:
    chain = bound(captured, 1 << 40)
    assert ChooseTiles(captured.costed).run(chain) == chain
    assert ChooseTiles(captured.costed, 1).run(bound(captured, 1 << 20)) == bound(captured, 1 << 20)


def test_a_loss_is_tiled_before_anything_else(captured: CapturedModel) -> None:
    usable = 8 * needs(bound(captured, 1 << 40))[-1]
    chain = bound(captured, usable)  # each segment fits, but the loss not in an eighth of it
    tiled = ChooseTiles(captured.costed).run(chain)
    assert tiles_of(tiled)[:-1] == [1] * (len(chain.segments) - 1)
    assert tiles_of(tiled)[-1] > 1
    assert tiled.segments[-1].backward_s == chain.segments[-1].backward_s
    assert needs(tiled)[-1] <= 0.9 * usable / 8 < needs(chain)[-1]


def test_segments_that_do_not_fit_get_as_few_chunks_as_do(captured: CapturedModel) -> None:
    chain = bound(captured, max(needs(bound(captured, 1 << 40))))
    tiled = ChooseTiles(captured.costed).run(chain)
    assert all(tiles > 1 for tiles in tiles_of(tiled)[1:])
    assert tiles_of(tiled)[0] == 1  # the embedding has nothing that would pay
    assert all(after < before for after, before in zip(needs(tiled)[1:], needs(chain)[1:], strict=True))
    for before, after in zip(chain.segments[1:], tiled.segments[1:], strict=True):
        # Attention's projections run twice; an MLP that ends its stage runs once.
        twice = before.name.endswith("self_attn")
        assert after.backward_s > before.backward_s if twice else after.backward_s == before.backward_s
    only_loss = ChooseTiles(captured.costed, "loss").run(chain)
    assert tiles_of(only_loss)[:-1] == [1] * (len(chain.segments) - 1)
    assert tiles_of(only_loss)[-1] == tiles_of(tiled)[-1]


@pytest.mark.parametrize("tiles", [0, -3, "many"])
def test_refuses_other_numbers(captured: CapturedModel, tiles: object) -> None:
    with pytest.raises(
        InvalidArgument, match=f"tiles={tiles!r}; it must be 'auto', 'loss' or a number of chunks"
    ):
        ChooseTiles(captured.costed, tiles).run(bound(captured, 1 << 40))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["Llama", "LoRA on Qwen3"])
def test_predicted_memory_of_tiled_stages_is_what_the_allocator_gives_out(name: str) -> None:
    case = memory_cases.FAMILIES[name]()
    found = Measured(case, staged.capture(case.model, case.batch, 1), tiles=4)
    whole = Measured(case, found.captured)
    last = len(found.chain.segments) - 1
    stages = [Stage(0, B, 1, 1), Stage(0, B, 2, 2), Stage(0, B, 1, last - 1), Stage(0, FB, last, last)]
    for stage in stages:
        given = found.given_bytes(stage)
        measured = found.measured_bytes(stage)
        assert abs((found.predicted_bytes(stage) + given) / (measured + given) - 1) <= 0.03, stage
        # LoRA's dropout stands between short regions, whose edges take as much as they save.
        assert name != "Llama" or measured < whole.measured_bytes(stage), stage


def test_training_with_tiles_equals_plain_pytorch_but_for_rounding() -> None:
    case = models.make("qwen3-tied")
    plain = copy.deepcopy(case.model)
    expected = reference.forward_backward(plain, case.batch, 4, random=False)
    with rpcompile.compile(
        case.model,
        2,
        example_inputs=case.batch,
        microbatches=4,
        gpu=models.SLOW_GPU,
        tiles=3,
        solver_time_s=0.5,
    ) as compiled:
        assert {segment.tiles for segment in compiled.plan.chain.segments[1:]} == {3}
        loss = compiled.forward_backward(**case.batch)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    for mine, theirs in zip(case.model.parameters(), plain.parameters(), strict=True):
        assert mine.grad is not None
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=2e-5, atol=2e-7)


def test_a_model_without_a_sequence_compiles_as_before() -> None:
    case = models.make("unet-batchnorm")
    captured = capture_model(case.model, ExampleInputs.of(case.batch))
    chain = BindChain(dict(captured.capture.example_sizes), models.SLOW_GPU).run(captured.costed)
    assert ChooseTiles(captured.costed, 8).run(chain) == chain
