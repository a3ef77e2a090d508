"""Dispatch policies by name, side by side on one chain."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rpcompile.errors import InvalidArgument, RpcompileError
from rpcompile.ir import Partition, Stage, StageKind
from rpcompile.passes.dispatch_1f1b import Dispatch1F1B
from rpcompile.passes.dispatch_gpipe import DispatchGPipe
from rpcompile.passes.dispatch_interleaved_1f1b import DispatchInterleaved1F1B
from rpcompile.passes.dispatch_looped_bfs import DispatchLoopedBFS
from rpcompile.passes.dispatch_round_robin import DispatchRoundRobin
from rpcompile.passes.partition_by_rule import PartitionByRule
from rpcompile.passes.partition_pipeline import PartitionPipeline
from rpcompile.simulate import simulate, simulate_steady
from rpcompile.variations import lay_out

if TYPE_CHECKING:
    from rpcompile.ir import Schedule, SegmentChain
    from rpcompile.plan import Plan
    from rpcompile.shared_links import SharedLinks
    from rpcompile.simulate import Timeline

POLICIES = {
    "round_robin": DispatchRoundRobin,
    "gpipe": DispatchGPipe,
    "1f1b": Dispatch1F1B,
    "interleaved_1f1b": DispatchInterleaved1F1B,
    "looped_bfs": DispatchLoopedBFS,
}


@dataclass(frozen=True)
class PolicyResult:
    """One policy's simulated iteration.

    Attributes:
        policy: Its name.
        iteration_s: Makespan, or period of the steady state.
        bubble: Idle share of the GPUs' compute time.
        gpu_peak_bytes: Peak of each GPU.
        host_peak_bytes: Peak of the host.
        upload_bytes: Bytes to the GPUs.
        fits: Whether every peak is within what a plan may use.
        own: Whether it is the plan that others are compared with.
        problem: Why the policy cannot run this; then there are no figures.
    """

    policy: str
    iteration_s: float = 0.0
    bubble: float = 0.0
    gpu_peak_bytes: tuple[int, ...] = ()
    host_peak_bytes: int = 0
    upload_bytes: int = 0
    fits: bool = False
    own: bool = False
    problem: str | None = None


def check_policy(policy: str) -> None:
    """Refuses a name that is none.

    Raises:
        InvalidArgument: With near names.
    """
    if policy not in POLICIES:
        near = difflib.get_close_matches(policy, POLICIES, n=1)
        hint = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(POLICIES)}"
        raise InvalidArgument(f"policy {policy!r} is unknown; {hint}")


def default_partition(chain: SegmentChain, policy: str, gpus: int) -> Partition:
    """The stages that a policy is used with: RoundPipe's rule, or pipelines with mirrored stages.

    Raises:
        PartitionError: The chain does not divide so.
    """
    if policy == "round_robin":
        return PartitionByRule(gpus, balanced=True).run(chain)
    return PartitionPipeline(gpus, 1 if policy in ("gpipe", "1f1b") else None, fused=True).run(chain)


def parse_partition(text: str, chain: SegmentChain) -> Partition:
    """Stages from their numbers of segments: forward ones, `|`, the fused tail and backward ones.

    `7,7,7,7|0,3,3` has four forward stages, a fused stage with none of the segments that the forward
    stages cover (0) and the rest of the chain, then backward stages from the end. Without `|`, the last
    stage is fused and backward stages mirror the others, as pipelines need.

    Raises:
        InvalidArgument: The text has another form, or its numbers do not add up to the chain.
    """
    forward_text, _, backward_text = text.partition("|")
    forward, backward = _counts(forward_text, text), _counts(backward_text, text) if backward_text else None
    segments = len(chain.segments)
    if backward is None:
        stages = _mirrored(forward, segments, text)
    else:
        stages = _apart(forward, backward, chain, text)
    found = tuple(Stage(index, kind, first, last) for index, (kind, first, last) in enumerate(stages))
    return Partition(found, chain.hardware.usable_bytes, 0.0, 0.0, "FEASIBLE", 0.0, "by hand")


def schedule_policy(
    chain: SegmentChain,
    partition: Partition,
    policy: str,
    gpus: int,
    microbatches: int,
    mode: str = "sync",
    update_s_per_byte: float = 0.0,
    links: SharedLinks | None = None,
) -> Schedule:
    """A policy's schedule with transfers and events, and updates as `lay_out` adds them.

    Raises:
        InvalidArgument: No such policy, or the chain is priced for another number of different GPUs.
        PartitionError: The policy cannot run these stages.
    """
    check_policy(policy)
    if chain.kinds and len(chain.kind_of) != gpus:
        raise InvalidArgument(
            f"gpus={gpus}, but the segments are priced for {len(chain.kind_of)} GPUs that are not alike; "
            "leave gpus out"
        )
    dispatch = POLICIES[policy](gpus, microbatches).run(partition)
    return lay_out(chain, partition, dispatch, mode, update_s_per_byte, links)


def result_of(policy: str, chain: SegmentChain, timeline: Timeline, own: bool) -> PolicyResult:
    """The figures of one simulation; of the steady state, where several iterations were simulated."""
    iterations, peaks = len(timeline.iteration_end_s), timeline.gpu_peak_bytes
    return PolicyResult(
        policy,
        timeline.makespan_s if iterations == 1 else timeline.period_s,
        timeline.bubble if iterations == 1 else timeline.steady_bubble,
        peaks,
        timeline.host_peak_bytes,
        timeline.upload_bytes // iterations,
        fits=all(peak <= chain.hardware_of(gpu).usable_bytes for gpu, peak in enumerate(peaks)),
        own=own,
    )


def compare_policies(plan: Plan) -> tuple[PolicyResult, ...]:
    """A plan beside every policy with its usual stages, on the plan's segments, GPUs and microbatches.

    Host memory and links are as in the plan; pipelines, too, upload weights from the host. Only for plans
    that train.
    """
    if plan.mode == "forward":
        return ()
    timeline = plan.simulate_steady() if plan.chained else plan.simulate()
    own = result_of(f"this plan ({plan.schedule.policy})", plan.chain, timeline, own=True)
    others = compare_chain(
        plan.chain, plan.gpus, plan.microbatches, plan.mode, plan.links, plan.update_s_per_byte
    )
    return own, *others


def compare_chain(
    chain: SegmentChain,
    gpus: int,
    microbatches: int,
    mode: str = "sync",
    links: SharedLinks | None = None,
    update_s_per_byte: float = 0.0,
) -> tuple[PolicyResult, ...]:
    """Every policy with its usual stages on one chain; in mode "async" or with updates the steady state."""
    chained = mode == "async" or update_s_per_byte > 0
    found: list[PolicyResult] = []
    for policy in POLICIES:
        try:
            partition = default_partition(chain, policy, gpus)
            schedule = schedule_policy(
                chain, partition, policy, gpus, microbatches, mode, update_s_per_byte, links
            )
            timeline = simulate_steady(schedule, links) if chained else simulate(schedule, links=links)
        except RpcompileError as error:
            found.append(PolicyResult(policy, problem=str(error)))
            continue
        found.append(result_of(policy, chain, timeline, own=False))
    return tuple(found)


# ------------------------------------------------------------------- partitions by hand


def _counts(text: str, whole: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise InvalidArgument(
            f"partition {whole!r}: {text!r} is no list of numbers; write e.g. 7,7,7,7|0,3,3,3"
        ) from error


def _mirrored(forward: list[int], segments: int, text: str) -> list[tuple[StageKind, int, int]]:
    if sum(forward) == segments - 1:  # counted without the head, as published partitions are
        forward = [*forward[:-1], forward[-1] + 1]
    up = _runs(forward, segments, text)
    return [
        *((StageKind.F, *run) for run in up[:-1]),
        (StageKind.FB, *up[-1]),
        *((StageKind.B, *run) for run in reversed(up[:-1])),
    ]


def _apart(
    forward: list[int], backward: list[int], chain: SegmentChain, text: str
) -> list[tuple[StageKind, int, int]]:
    segments, tail = len(chain.segments), sum(forward)
    if tail + backward[0] not in (segments, segments - 1) or backward[0] < 0:
        raise InvalidArgument(
            f"partition {text!r}: the forward stages have {tail} segments and the fused one "
            f"{backward[0]} more; together with the head they must be the chain's {segments}"
        )
    needed = tail - chain.first_backward
    if sum(backward[1:]) != needed:
        raise InvalidArgument(
            f"partition {text!r}: the backward stages have {sum(backward[1:])} segments; "
            f"{needed} need a backward"
        )
    down = _runs(backward[:0:-1], needed, text)
    offset = chain.first_backward
    return [
        *((StageKind.F, *run) for run in _runs(forward, tail, text)),
        (StageKind.FB, tail, segments - 1),
        *((StageKind.B, first + offset, last + offset) for first, last in reversed(down)),
    ]


def _runs(counts: list[int], segments: int, text: str) -> list[tuple[int, int]]:
    if any(count < 1 for count in counts) or sum(counts) != segments:
        raise InvalidArgument(
            f"partition {text!r}: {','.join(map(str, counts))} must be numbers from 1 that add up "
            f"to {segments}"
        )
    runs: list[tuple[int, int]] = []
    for count in counts:
        first = runs[-1][1] + 1 if runs else 0
        runs.append((first, first + count - 1))
    return runs
