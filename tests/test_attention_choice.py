"""When attention outputs are offloaded: by bytes, seconds, idle links, and memory."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rpcompile.activations import activations
from rpcompile.attention_choice import offload, offload_these, saved_share
from rpcompile.errors import InvalidArgument, PartitionError
from rpcompile.ir import AttentionOutputs, GpuKind, SegmentChain
from rpcompile.passes.partition_stages import PartitionStages
from rpcompile.plan import Plan
from rpcompile.planner import ModelDescription, PlanOptions, plan_chain, plan_profile
from rpcompile.profile import Profile
from tests.chains import HARDWARE, chain

MODEL = ModelDescription("Toy", "f" * 64, "float32")


def attention(nbytes: int, forward_s: float = 1.0, **changes: Any) -> AttentionOutputs:
    return AttentionOutputs(("sdpa",), nbytes, forward_s, 5, 7, 7, **changes)


def toy(nbytes: int, layers: int = 6, **changes: Any) -> SegmentChain:
    """Layers of 2 s forward, half of it attention, and 3 s backward, on links of 10 bytes a second."""
    fields = {"attention": attention(nbytes), "parameters": (), **changes}
    found = chain(layers + 1, dict.fromkeys(range(layers), fields))
    return replace(found, hardware=replace(HARDWARE, h2d_bytes_per_s=10.0, d2h_bytes_per_s=10.0))


def planned(given: SegmentChain, asked: str = "auto", **options: Any) -> Plan:
    return plan_chain(
        given, PlanOptions(2, 4, attention=asked, solver_time_s=0.3, **{"effort": None, **options}), MODEL
    )


def offloaded(plan: Plan) -> list[int]:
    return [index for index, found in enumerate(plan.chain.segments) if found.offloads]


# --------------------------------------------------------------------- how many, and which


def test_outputs_that_save_most_for_their_bytes_go_first_and_are_spread_evenly() -> None:
    one, two = {"attention": attention(4)}, {"attention": attention(4, 3.0)}
    found = chain(9, {**dict.fromkeys((0, 2, 4, 6), one), **dict.fromkeys((1, 3, 5, 7), two)})
    marked = [[i for i, s in enumerate(offload(found, count).segments) if s.offloads] for count in range(9)]
    assert marked[0] == []
    assert marked[1] == [1]
    assert marked[2] == [1, 5]
    assert marked[4] == [1, 3, 5, 7]
    assert marked[6] == [0, 1, 3, 4, 5, 7]
    assert marked[8] == list(range(8))


def test_what_is_saved_at_most() -> None:
    # Seven segments of 2 s forward twice and 3 s backward; six save 1 s.
    assert saved_share(toy(1)) == 6 / (7 * 7)
    assert saved_share(chain(3)) == 0.0


# --------------------------------------------------------------------- the choice


def test_it_is_offloaded_where_links_are_idle() -> None:
    plan, without = planned(toy(1)), planned(toy(1), "recompute")
    assert offloaded(plan) == list(range(6))
    assert plan.prediction.iteration_s < without.prediction.iteration_s
    assert plan.prediction.host is not None
    assert plan.prediction.host.attention_bytes > 0
    assert re.fullmatch(
        r"With recompute an iteration is simulated at [\d.]+ s, with all outputs offloaded at [\d.]+ s\.",
        plan.attention,
    )
    plan.verify()


def test_it_is_recomputed_where_the_link_is_the_bound() -> None:
    """100 bytes take ten seconds, one way, and save one."""
    plan = planned(toy(100))
    assert offloaded(plan) == []
    assert "with all outputs offloaded at" in plan.attention
    forced = planned(toy(100), "offload")
    assert offloaded(forced) == list(range(6))
    assert forced.prediction.iteration_s > plan.prediction.iteration_s
    assert forced.attention == "attention='offload' was asked for."


def slower(given: SegmentChain, seconds: float) -> SegmentChain:
    """The chain with segments that are divided in more chunks, and take longer."""
    segments = (replace(s, tiles=s.tiles + 1, backward_s=s.backward_s + seconds) for s in given.segments)
    return replace(given, segments=tuple(segments))


@pytest.mark.parametrize(("seconds", "tiles"), [(-0.5, 2), (0.5, 1)])
def test_of_two_ways_to_divide_what_offloads_the_faster_is_taken(seconds: float, tiles: int) -> None:
    given = toy(1)
    options = PlanOptions(2, 4, solver_time_s=0.3, effort=None)
    plan = plan_chain(given, options, MODEL, offloading=lambda: slower(given, seconds))
    assert offloaded(plan) == list(range(6))
    assert {segment.tiles for segment in plan.chain.segments[:6]} == {tiles}
    assert plan.chain.segments[6].tiles == 1  # which does not offload
    what = "with all outputs offloaded"
    assert re.search(rf"{what} at [\d.]+ s, {what}, divided as before at [\d.]+ s", plan.attention)


def test_what_can_be_loaded_only_when_divided_for_it_is_offloaded() -> None:
    """As they are, backward stages that load need more than a GPU has: all would have to be fused."""
    hardware = replace(toy(1).hardware, usable_bytes=10**5)
    given = replace(toy(1, attention=replace(attention(1), peak_bytes=10**6)), hardware=hardware)

    def divided() -> SegmentChain:
        return replace(slower(toy(1), 0.0), hardware=hardware)

    options = PlanOptions(2, 4, solver_time_s=0.3, effort=None)
    assert offloaded(plan_chain(given, options, MODEL)) == []
    plan = plan_chain(given, options, MODEL, offloading=divided)
    assert offloaded(plan) == list(range(6))
    forced = plan_chain(given, replace(options, attention="offload"), MODEL, offloading=divided)
    assert {segment.tiles for segment in forced.chain.segments[:6]} == {2}


def test_on_different_gpus_the_seconds_are_those_of_what_was_taken() -> None:
    kinds = (GpuKind(HARDWARE, (2.0,) * 7, (3.0,) * 7), GpuKind(HARDWARE, (4.0,) * 7, (6.0,) * 7))
    given = replace(toy(1), kinds=kinds, kind_of=(0, 1))
    other = replace(slower(given, 1.0), kinds=tuple(replace(kind, backward_s=(9.0,) * 7) for kind in kinds))
    mixed = offload_these(given, {1, 4}, other)
    assert [segment.tiles for segment in mixed.segments] == [1, 2, 1, 1, 2, 1, 1]
    assert [segment.offloads for segment in mixed.segments] == [i in (1, 4) for i in range(7)]
    assert mixed.kinds[1].backward_s == (6.0, 9.0, 6.0, 6.0, 9.0, 6.0, 6.0)
    assert mixed.kinds[1].forward_s == (4.0,) * 7


def test_what_only_a_search_can_plan_is_recomputed(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_luck(*_: object) -> None:
        raise PartitionError("no luck")

    monkeypatch.setattr(PartitionStages, "run", no_luck)
    plan = planned(toy(1), effort="fast", max_traffic=0.3)  # stages of one segment take 0.5
    assert offloaded(plan) == []
    assert plan.attention == "No plan to compare others with was found without a search."


def test_as_many_are_offloaded_as_the_links_have_time_for() -> None:
    """A forward of 2 s a layer hides the copies of some of the layers, which take 3 s each."""
    options = PlanOptions(4, 8, solver_time_s=0.3, effort=None)
    plan = plan_chain(toy(30, layers=12), options, MODEL)
    assert 0 < len(offloaded(plan)) < 12
    assert re.search(
        r"with all outputs offloaded at [\d.]+ s, with \d of 12 outputs offloaded at", plan.attention
    )


def test_little_to_save_is_not_looked_into() -> None:
    plan = planned(toy(1, attention=attention(1, 0.001)))
    assert offloaded(plan) == []
    assert plan.attention == "Offloading could save no more than 0.0 % of the compute."
    assert planned(chain(4)).attention == ""


def test_the_host_is_a_limit() -> None:
    given = toy(1)
    free = planned(given)
    limit = free.prediction.host_peak_bytes - 1
    plan = planned(given, host_bytes=limit)
    assert offloaded(plan) == []
    assert re.search(r"offloaded the host needs 0\.0 GB of 0\.0 GB", plan.attention)
    with pytest.raises(PartitionError, match=r"the host needs .* use attention='recompute'"):
        planned(given, "offload", host_bytes=limit)


def test_replicas_gradients_must_fit_on_the_host(caplog: pytest.LogCaptureFixture) -> None:
    profile = Profile.load(Path(__file__).parents[1] / "benchmarks" / "profiles" / "qwen3-1.7b.json")
    shared = plan_profile(profile, PlanOptions(2, 4)).prediction.host
    assert shared is not None
    assert shared.partial_bytes > 0
    limit = shared.total_bytes - 1
    plain = plan_profile(profile, PlanOptions(2, 4, host_bytes=limit))
    assert plain.prediction.host is not None
    assert plain.prediction.host.partial_bytes == 0
    assert plain.prediction.host_peak_bytes <= limit
    assert not caplog.messages
    plan_profile(profile, PlanOptions(2, 4, effort=None, host_bytes=10**9))
    assert re.fullmatch(r"the host needs \d+\.\d GB of 1\.0 GB", caplog.messages[0])


def test_so_is_the_gpu() -> None:
    given = toy(10**4)
    given = replace(given, hardware=replace(given.hardware, usable_bytes=60))
    plan = planned(given)
    assert offloaded(plan) == []
    assert "with all outputs offloaded no plan fits in the GPUs' memory" in plan.attention
    with pytest.raises(PartitionError, match="memory"):
        planned(given, "offload")


def test_a_search_goes_on_from_what_was_chosen() -> None:
    plan = planned(toy(1), effort="fast")
    assert offloaded(plan) == list(range(6))
    assert "simulated at" in plan.attention


def test_refuses_to_offload_where_nothing_can_be() -> None:
    silent = replace(toy(4), segments=tuple(replace(s, attention=None) for s in toy(4).segments))
    with pytest.raises(
        InvalidArgument,
        match=r"attention='offload', but no segment has an attention output that can be kept: eager "
        r"attention has none, and of a profile only what it says itself is known .*; use attention='auto'$",
    ):
        planned(silent, "offload")
    masked = toy(0, attention=AttentionOutputs((), 0, 0.0, 5, 7, 7, refused=("it has a mask",)))
    with pytest.raises(InvalidArgument, match="can be kept: it has a mask; use attention='auto'"):
        planned(masked, "offload")
    assert planned(silent).attention == ""


def test_evaluation_offloads_nothing() -> None:
    plan = planned(toy(1), "offload", mode="forward")
    assert offloaded(plan) == []


# --------------------------------------------------------------------- what is said


def explained(plan: Plan) -> str:
    return "\n".join(activations(plan))


def with_nodes(given: SegmentChain) -> SegmentChain:
    """As a capture's: profiles have no nodes, and say nothing of attention."""
    segments = (replace(s, nodes=("sdpa",) if s.attention else ("mul",)) for s in given.segments)
    return replace(given, segments=tuple(segments), bindings={"sequence": 8})


def test_it_says_what_is_offloaded_and_why() -> None:
    plan = planned(with_nodes(toy(1)))
    text = explained(plan)
    recomputed = {index for stage in plan.partition.stages if stage.kind == "B" for index in stage.segments}
    count = len(recomputed & set(offloaded(plan)))
    names = f"{count} segments (layer0 … layer{count - 1})" if count > 1 else "layer0"
    assert f"The attention outputs of {names} go to the host in the forward and come back" in text
    assert f"{count} B a microbatch each way, {4 * count} B of host memory, and {4 * count:.2f} s of" in text
    assert f"{6 - count} segment" in text
    assert "more lie in the fused stage, which recomputes nothing." in text
    assert text.endswith(plan.attention)
    assert f"Memory     attention outputs of {count} of {count} recomputed segments offloaded" in str(plan)
    assert plan.explain().activations == tuple(activations(plan))
    assert "Nothing is divided into chunks of tokens" in text


def test_it_says_why_nothing_is() -> None:
    mask = "it has a mask, and CUDA's flash attention takes none"
    refused = toy(1, attention=AttentionOutputs((), 0, 0.0, 5, 7, 7, (mask,)))
    text = explained(planned(with_nodes(refused)))
    assert f"6 segments recompute attention in any case: {mask}." in text
    assert "Attention is recomputed for every backward." in text
    eager = explained(planned(with_nodes(chain(3))))
    assert "scaled_dot_product_attention is not in what is recomputed (eager attention writes" in eager
    assert explained(planned(chain(3))) == ""  # a profile's
    assert "attention='recompute' was asked for." in explained(planned(with_nodes(toy(1)), "recompute"))


def test_it_says_what_is_tiled() -> None:
    given = with_nodes(toy(1))
    segments = [
        replace(s, tiles=(4 if i in (1, 2) else 16 if i == 6 else 1)) for i, s in enumerate(given.segments)
    ]
    plan = planned(replace(given, segments=tuple(segments)), "recompute")
    assert (
        "in 2 segments (layer1 … layer2) runs in 4 chunks of tokens: so one of them needs 12 B"
        in explained(plan)
    )
    assert "in layer6 runs in 16 chunks" in explained(plan)
    assert "Memory     2 segments (layer1 … layer2) in 4 chunks of tokens · layer6 in 16 chunks" in str(plan)


def test_it_says_what_runs_in_groups_of_heads() -> None:
    given = with_nodes(toy(1))
    segments = (replace(s, head_groups=8 if i in (1, 2) else 1) for i, s in enumerate(given.segments))
    plan = planned(replace(given, segments=tuple(segments)), "recompute")
    line = (
        "The attention of 2 segments (layer1 … layer2) runs backward in 8 groups of heads, one after another."
    )
    assert line in explained(plan)
    assert "Memory     attention of 2 segments (layer1 … layer2) in 8 groups of heads" in str(plan)


def test_other_words_are_refused() -> None:
    message = "attention='always'; it must be 'auto', 'recompute', 'offload'"
    with pytest.raises(InvalidArgument, match=re.escape(message)):
        planned(toy(1), "always")
