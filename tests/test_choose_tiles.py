"""Which segments are tiled, what that does to their memory, and training with it."""

from __future__ import annotations

import copy
import math
import re
from dataclasses import replace

import pytest
import torch

import rpcompile
from rpcompile.attention_choice import offload
from rpcompile.device_kernels import Kernels
from rpcompile.errors import InvalidArgument, PartitionError, StageTooLarge
from rpcompile.fit import naming_the_longest, next_size
from rpcompile.ir import SegmentChain, Stage, StageKind
from rpcompile.passes.bind_chain import BindChain
from rpcompile.passes.capture_graph import ExampleInputs
from rpcompile.passes.choose_tiles import ChooseTiles, _Chooser
from rpcompile.passes.price_attention import PriceAttention
from rpcompile.planner import CapturedModel, PlanOptions, capture_model
from tests import memory_cases, models, reference, staged
from tests.measured_memory import Measured

F, B, FB = StageKind.F, StageKind.B, StageKind.FB
SIZES = {"batch": 1, "sequence": 2048}


@pytest.fixture(scope="module")
def captured() -> CapturedModel:
    case = models.make("qwen3-tied")
    case.model.to(torch.bfloat16)  # attention that takes memory in proportion to the sequence
    return capture_model(case.model, ExampleInputs.of(case.batch))


def bound(captured: CapturedModel, usable_bytes: int, sizes: dict[str, int] | None = None) -> SegmentChain:
    hardware = replace(models.SLOW_GPU, memory_bytes=1 << 40, usable_bytes=usable_bytes)
    return BindChain(sizes or SIZES, hardware).run(captured.costed)


def tiles_of(chain: SegmentChain) -> list[int]:
    return [segment.tiles for segment in chain.segments]


def needs(chain: SegmentChain) -> list[int]:
    return [segment.saved_bytes + segment.peak_bytes for segment in chain.segments]


def test_what_fits_is_left_alone(captured: CapturedModel) -> None:
    chain = bound(captured, 1 << 40)
    assert ChooseTiles(captured.costed).run(chain) == chain
    assert ChooseTiles(captured.costed, 1, 1).run(bound(captured, 1 << 20)) == bound(captured, 1 << 20)


def test_a_loss_is_tiled_before_anything_else(captured: CapturedModel) -> None:
    usable = 8 * (needs(bound(captured, 1 << 40))[-1] - 1)
    chain = bound(captured, usable)  # each segment fits, but the loss not in an eighth of it
    tiled = ChooseTiles(captured.costed).run(chain)
    assert tiles_of(tiled)[:-1] == [1] * (len(chain.segments) - 1)
    assert tiles_of(tiled)[-1] > 1
    assert needs(tiled)[-1] <= usable / 8 < needs(chain)[-1]
    only_loss = ChooseTiles(captured.costed, "loss").run(bound(captured, usable // 4))
    assert tiles_of(only_loss)[:-1] == [1] * (len(chain.segments) - 1)
    assert tiles_of(only_loss)[-1] > 1


@pytest.mark.parametrize(("batch", "sequence"), [(1, 2048), (8, 256)])
def test_a_loss_that_no_chunks_bring_down_to_its_share_is_tiled_as_far_as_it_goes(
    captured: CapturedModel, batch: int, sequence: int
) -> None:
    sizes, most = {"batch": batch, "sequence": sequence}, 8  # chunks of at least 256 tokens of all rows
    whole = bound(captured, 1 << 40, sizes)
    usable = int(8 * needs(whole)[-1] / (most + 1))
    tiled = ChooseTiles(captured.costed).run(bound(captured, usable, sizes))
    assert tiles_of(tiled)[-1] == most
    assert usable / 8 < needs(tiled)[-1] < usable / 4


@pytest.mark.parametrize("share", [0.7, 0.8, 0.9, 1.0, 1.1])
def test_what_is_chosen_is_the_cheapest_of_all_that_fit(captured: CapturedModel, share: float) -> None:
    """Against every number of chunks and groups there is."""
    chain = bound(captured, int(share * max(needs(bound(captured, 1 << 40)))))
    chosen = ChooseTiles(captured.costed).run(chain)
    chooser = _Chooser(ChooseTiles(captured.costed), chain, Kernels("cuda"))
    forced = [ChooseTiles(captured.costed, t, g).run(chain) for t in (1, 2, 4, 8) for g in (1, 2)]
    for index in (1, 2, 6):  # attention, two MLPs
        fitting = [c.segments[index] for c in forced if needs(c)[index] <= chooser._goal(index)]
        found = chosen.segments[index]
        if fitting:
            best = min(fitting, key=lambda s: (s.forward_s + s.backward_s, s.head_groups))
            assert (found.tiles, found.head_groups) == (best.tiles, best.head_groups)
        else:
            assert needs(chosen)[index] <= 1.1 * min(needs(c)[index] for c in forced)


def test_groups_of_heads_come_before_chunks() -> None:
    """They cost no time: where they are enough, nothing runs twice."""
    case = models.make("qwen3-tied")
    case.model.to(torch.bfloat16)
    captured = capture_model(case.model, ExampleInputs.of(case.batch))
    chain = bound(captured, 1 << 40)
    whole, grouped = chain.segments[1], ChooseTiles(captured.costed, 1, 2).run(chain).segments[1]
    assert grouped.saved_bytes + grouped.peak_bytes < whole.saved_bytes + whole.peak_bytes
    assert (grouped.forward_s, grouped.backward_s) == (whole.forward_s, whole.backward_s)


def test_chunks_are_priced_by_the_weights_that_they_read_and_the_gradients_that_they_add(
    captured: CapturedModel,
) -> None:
    """Where only bytes cost time, a byte a second."""
    hardware = replace(
        models.SLOW_GPU, usable_bytes=1 << 40, flops_per_s=1e30, memory_bytes_per_s=1.0, efficiency={}
    )
    chain = BindChain(SIZES, hardware).run(captured.costed)
    mlp, chunks = chain.segments[2], 4
    tiled = ChooseTiles(captured.costed, chunks).run(chain).segments[2]
    weights = mlp.weight_bytes  # bfloat16
    assert tiled.forward_s - mlp.forward_s == (chunks - 1) * weights
    # For a chunk's gradients: weights are read, their gradients written; then added in float32.
    adding = chunks * (1 + 2 * 2) * weights
    assert tiled.backward_s - mlp.backward_s == (chunks - 1) * 2 * weights + adding


def test_a_segment_that_offloads_fits_with_its_copies(captured: CapturedModel) -> None:
    """Where it fits as it is without them, and not with them, it is divided; only then."""
    roomy = replace(models.SLOW_GPU, memory_bytes=1 << 40, usable_bytes=1 << 40)
    free = captured.bind(roomy, SIZES, offloading=True)
    assert free == captured.bind(roomy, SIZES)
    attention = free.segments[1].attention
    assert attention is not None
    loads = attention.saved_bytes + attention.peak_bytes
    # Of a byte more that a GPU has, a segment has 0.95.
    usable = (1 << 30) + math.ceil((max(needs(free)[:-1]) - _goal(captured, 1 << 30)) / 0.95)
    assert _goal(captured, usable) >= max(needs(free)[:-1])
    goal = _goal(captured, usable, offloads=True)
    assert goal < loads
    tight = replace(roomy, usable_bytes=usable)
    apart, kept = captured.bind(tight, SIZES), captured.bind(tight, SIZES, offloading=True)
    divided = [(s.tiles, s.head_groups) for s in (apart.segments[1], kept.segments[1])]
    assert divided[0] == (1, 1) != divided[1]
    offloaded = kept.segments[1].attention
    assert offloaded is not None
    assert offloaded.saved_bytes + offloaded.peak_bytes <= goal
    # Nothing is offloaded by it, and what has no attention is as it was.
    assert not any(segment.offloads for segment in kept.segments)
    assert kept.segments[2] == apart.segments[2]
    assert kept.segments[-1] == apart.segments[-1]


def _goal(captured: CapturedModel, usable_bytes: int, offloads: bool = False) -> float:
    """What the need of the first attention may be."""
    chain = PriceAttention(captured.costed).run(bound(captured, usable_bytes))
    chain = offload(chain) if offloads else chain
    return _Chooser(ChooseTiles(captured.costed), chain, Kernels("cuda"))._goal(1)


@pytest.mark.parametrize("tiles", [0, -3, "many"])
def test_refuses_other_numbers(captured: CapturedModel, tiles: object) -> None:
    with pytest.raises(
        InvalidArgument, match=f"tiles={tiles!r}; it must be 'auto', 'loss' or a number of chunks"
    ):
        ChooseTiles(captured.costed, tiles).run(bound(captured, 1 << 40))  # type: ignore[arg-type]


@pytest.mark.parametrize("groups", [0, "all"])
def test_refuses_other_groups(captured: CapturedModel, groups: object) -> None:
    with pytest.raises(
        InvalidArgument, match=f"head_groups={groups!r}; it must be 'auto' or a number of groups from 1 on"
    ):
        ChooseTiles(captured.costed, 1, groups).run(bound(captured, 1 << 40))  # type: ignore[arg-type]


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


def test_a_sequence_that_can_never_fit_names_what_it_takes_and_the_longest_that_does(
    captured: CapturedModel,
) -> None:
    hardware = replace(models.SLOW_GPU, memory_bytes=1 << 40, usable_bytes=4_000_000)
    sizes, options = {"batch": 1, "sequence": 1 << 13}, PlanOptions(2, 4)
    with (
        pytest.raises(StageTooLarge) as error,
        naming_the_longest(captured, hardware, sizes, gpus=2, microbatches=4),
    ):
        captured.plan(captured.bind(hardware, sizes), options, progress=False)
    text = str(error.value)
    assert "for weights and gradients," in text
    assert "for activations and" in text
    match = re.search(r"The longest that fits is sequence=([\d,]+)\.$", text)
    assert match
    longest = int(match[1].replace(",", ""))

    captured.plan(captured.bind(hardware, {**sizes, "sequence": longest}), options, progress=False)
    longer = captured.bind(hardware, {**sizes, "sequence": next_size(longest)})
    with pytest.raises(PartitionError):
        captured.plan(longer, options, progress=False)


def test_of_what_does_not_fit_that_is_named_which_takes_most(captured: CapturedModel) -> None:
    """It is what decides on the longest sequence; an MLP, which comes before it, does not."""
    hardware = replace(models.SLOW_GPU, memory_bytes=1 << 40, usable_bytes=4_000_000)
    chain = captured.bind(hardware, {"batch": 1, "sequence": 1 << 16}, tiles=1)
    heavy = replace(chain.segments[3], saved_bytes=1 << 30)
    chain = replace(chain, segments=(*chain.segments[:3], heavy, *chain.segments[4:]))
    assert hardware.usable_bytes < needs(chain)[2] < needs(chain)[3]
    with pytest.raises(StageTooLarge, match=rf"^{re.escape(heavy.name)} needs 1\.1 GB"):
        captured.plan(chain, PlanOptions(2, 4), progress=False)


def test_what_fails_for_another_reason_names_no_sequence(captured: CapturedModel) -> None:
    hardware = replace(models.SLOW_GPU, memory_bytes=1 << 40, usable_bytes=1 << 40)
    with (
        pytest.raises(PartitionError, match=r"^something else$"),
        naming_the_longest(captured, hardware, SIZES, gpus=2, microbatches=4),
    ):
        raise PartitionError("something else")


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
