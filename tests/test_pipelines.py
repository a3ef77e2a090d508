"""Partitions and dispatches of pipelines, and of RoundPipe's rule: what they make and what they refuse."""

from __future__ import annotations

import re
import subprocess
import sys
from itertools import combinations, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rpcompile.errors import InvalidArgument, PartitionError
from rpcompile.ir import Partition
from rpcompile.passes.dispatch_1f1b import Dispatch1F1B
from rpcompile.passes.dispatch_gpipe import DispatchGPipe
from rpcompile.passes.dispatch_interleaved_1f1b import DispatchInterleaved1F1B
from rpcompile.passes.dispatch_looped_bfs import DispatchLoopedBFS
from rpcompile.passes.dispatch_round_robin import DispatchRoundRobin
from rpcompile.passes.insert_event_waits import InsertEventWaits
from rpcompile.passes.insert_transfers import InsertTransfers
from rpcompile.passes.lay_out_dispatch import LayOutDispatch
from rpcompile.passes.partition_as_given import PartitionAsGiven
from rpcompile.passes.partition_by_rule import PartitionByRule
from rpcompile.passes.partition_pipeline import PartitionPipeline
from rpcompile.simulate import simulate
from rpcompile.verify import verify_schedule
from tests.chains import chain, partition


def text(stages: Partition) -> str:
    return " ".join(f"{s.kind}{s.first}-{s.last}" for s in stages.stages)


@pytest.mark.parametrize(
    ("policy", "chunks"),
    [
        (DispatchGPipe, 1),
        (Dispatch1F1B, 1),
        (DispatchInterleaved1F1B, 1),
        (DispatchInterleaved1F1B, 2),
        (DispatchLoopedBFS, 2),
    ],
)
def test_pipelines_go_through_the_same_line_as_our_own_schedules(policy, chunks):
    layers = chain(7)
    stages = PartitionPipeline(2, chunks, fused=True).run(layers)
    schedule = LayOutDispatch(layers, stages).run(policy(2, 4).run(stages))
    schedule = InsertEventWaits().run(InsertTransfers(layers).run(schedule))
    verify_schedule(schedule, layers, stages)
    timeline = simulate(schedule)
    assert timeline.busy_s[0, "compute"] + timeline.busy_s[1, "compute"] == pytest.approx(
        4 * (7 * 5 + 2 * stages.stages[2 * chunks - 1].first)
    )


def test_a_heavy_head_takes_the_place_of_layers():
    # The head weighs as much as 2 of the other segments: 9 in 4 stages are 3 at most.
    heavy = chain(8, {7: {"forward_s": 6.0, "backward_s": 8.0}})
    assert text(PartitionPipeline(4).run(heavy)) == "F0-1 F2-3 F4-5 F6-7 B6-7 B4-5 B2-3 B0-1"
    heavier = chain(8, {7: {"forward_s": 12.0, "backward_s": 16.0}})
    assert text(PartitionPipeline(4, fused=True).run(heavier)) == "F0-1 F2-3 F4-6 FB7-7 B4-6 B2-3 B0-1"


def test_partitions_as_given_by_hand():
    assert text(PartitionAsGiven("3,3").run(chain(7))) == "F0-2 F3-6 B3-6 B0-2"
    assert text(PartitionAsGiven("4|2,2,2").run(chain(7))) == "F0-3 FB4-6 B2-3 B0-1"
    assert text(PartitionAsGiven("3,3|0,2,4").run(chain(7))) == "F0-2 F3-5 FB6-6 B4-5 B0-3"
    assert text(PartitionAsGiven("3,2|1,2,3").run(chain(7))) == "F0-2 F3-4 FB5-6 B3-4 B0-2"
    # With the head counted, and as a schedule that is to run has it.
    assert text(PartitionAsGiven("3,4").run(chain(7))) == "F0-2 F3-6 B3-6 B0-2"
    assert text(PartitionAsGiven("3,3|1,2,4").run(chain(7))) == "F0-2 F3-5 FB6-6 B4-5 B0-3"
    assert text(PartitionAsGiven("3,4", fused=True).run(chain(7))) == "F0-2 FB3-6 B0-2"
    assert text(PartitionAsGiven("3,0").run(chain(4))) == "F0-2 F3-3 B3-3 B0-2"
    frozen = chain(4, {0: {"needs_backward": False}})
    assert text(PartitionAsGiven("2|1,1").run(frozen)) == "F0-1 FB2-3 B1-1"


def test_the_rule_by_hand():
    # F 2 s, B 5 s, head 5 s: T is 5, or 5.5 at most; forward stages of 2 segments, filled from the end.
    assert text(PartitionByRule(2).run(chain(4))) == "F0-0 F1-2 FB3-3 B2-2 B1-1 B0-0"
    assert text(PartitionByRule(2, balanced=True).run(chain(4))) == "F0-0 F1-2 FB3-3 B2-2 B1-1 B0-0"
    # With slack up to 10 s, 4 stages of at most 10 cost less than 9 of 5.
    assert text(PartitionByRule(2, slack=2.0).run(chain(6))) == "F0-3 FB4-5 B2-3 B0-1"
    frozen = chain(4, {0: {"needs_backward": False, "backward_s": 0.0}})
    assert text(PartitionByRule(2).run(frozen)) == "F0-0 F1-2 FB3-3 B2-2 B1-1"


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=5),
    st.integers(1, 6),
    st.sampled_from([1.0, 1.1, 1.5, 3.0]),
)
def test_the_rule_finds_the_least_cost_of_all_partitions(times, gpus, slack):
    layers = chain(
        len(times), {i: {"forward_s": float(f), "backward_s": float(b)} for i, (f, b) in enumerate(times)}
    )
    found = PartitionByRule(gpus, slack).run(layers)
    forward, both = [f for f, _ in times], [f + b for f, b in times]
    heaviest, count = max(both), len(times)

    def heaviest_stage(cuts: tuple[int, ...], row: list[int], end: int) -> float:
        bounds = (0, *cuts, end)
        return max((sum(row[a:b]) for a, b in pairwise(bounds)), default=0)

    costs: list[float] = []
    for tail in range(count):
        ways = [
            [cuts for size in range(max(1, tail)) for cuts in combinations(range(1, tail), size)]
            for _ in range(2)
        ]
        for up in ways[0]:
            for down in ways[1]:
                limit = max(
                    heaviest,
                    sum(both[tail:]),
                    heaviest_stage(up, forward, tail),
                    heaviest_stage(down, both, tail),
                )
                stages = 1 + (len(up) + len(down) + 2 if tail else 0)
                if limit <= slack * heaviest:
                    costs.append(max(stages, gpus) * limit)
    assert found.objective_s == pytest.approx(min(costs))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: PartitionAsGiven("3,x").run(chain(3)),
            InvalidArgument,
            "partition '3,x' is no list of counts; write e.g. 3,3,4,2 for a pipeline, or 7,7,7,7|0,3,3,3",
        ),
        (
            lambda: PartitionAsGiven("1,3").run(chain(3)),
            PartitionError,
            "the forward and fused stages of '1,3' have 4 segments; besides the last one, the chain has 2",
        ),
        (
            lambda: PartitionAsGiven("1|1,2").run(chain(3)),
            PartitionError,
            "the fused and backward stages of '1|1,2' have 3 segments; besides the last one, the chain has 2",
        ),
        (
            lambda: PartitionAsGiven("2,0|0,2").run(chain(3)),
            PartitionError,
            "stage 1 (F) of '2,0|0,2' has no segment",
        ),
        (lambda: PartitionPipeline(0).run(chain(3)), InvalidArgument, "gpus=0 must be at least 1"),
        (
            lambda: PartitionPipeline(4).run(chain(3)),
            PartitionError,
            "3 segments do not fill 4 stages; use fewer GPUs or chunks, or smaller segments",
        ),
        (
            lambda: PartitionPipeline(2).run(chain(4, {0: {"needs_backward": False}})),
            PartitionError,
            "segment 1 is the first with a backward; a pipeline's backward stages mirror its forward stages",
        ),
        (
            lambda: DispatchGPipe(2, 2).run(partition("F0-1", "FB2-2", "B1-1", "B0-0")),
            PartitionError,
            "gpipe needs backward stages that mirror the forward stages, for each GPU keeps its stages",
        ),
        (
            lambda: Dispatch1F1B(2, 2).run(PartitionPipeline(2, 2).run(chain(5))),
            PartitionError,
            "1f1b on 2 GPUs needs 2 forward stages, the partition has 4; use partition-pipeline",
        ),
        (
            lambda: DispatchLoopedBFS(3, 2).run(PartitionPipeline(2, 2).run(chain(5))),
            PartitionError,
            "looped_bfs on 3 GPUs needs a multiple of 3 forward stages, the partition has 4",
        ),
        (
            lambda: DispatchInterleaved1F1B(2, 0).run(PartitionPipeline(2).run(chain(5))),
            InvalidArgument,
            "microbatches=0 must be at least 1",
        ),
        (
            lambda: DispatchRoundRobin(2, 2, 3).run(partition("FB0-0")),
            InvalidArgument,
            "rounds is 3; choose 1 to 2, the microbatches",
        ),
        (
            lambda: PartitionByRule(2, 0.5).run(chain(3)),
            InvalidArgument,
            "slack=0.5 must be at least 1",
        ),
    ],
)
def test_refuses(make, error, message):
    with pytest.raises(error, match=f"^{re.escape(message)}"):
        make()


def test_compute_alone_is_simulated_without_loading_numba():
    program = "import sys, rpcompile.simulate_dispatch\nprint('numba' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
