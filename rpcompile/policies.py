"""Dispatch policies by name, side by side on one chain."""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from rpcompile.errors import InvalidArgument, RpcompileError
from rpcompile.passes.dispatch_1f1b import Dispatch1F1B
from rpcompile.passes.dispatch_gpipe import DispatchGPipe
from rpcompile.passes.dispatch_interleaved_1f1b import DispatchInterleaved1F1B
from rpcompile.passes.dispatch_looped_bfs import DispatchLoopedBFS
from rpcompile.passes.dispatch_round_robin import DispatchRoundRobin
from rpcompile.passes.partition_as_given import PartitionAsGiven
from rpcompile.passes.partition_by_rule import PartitionByRule
from rpcompile.passes.partition_pipeline import PartitionPipeline
from rpcompile.simulate import simulate, simulate_steady
from rpcompile.simulate_dispatch import simulate_dispatch
from rpcompile.variations import lay_out

if TYPE_CHECKING:
    from rpcompile.ir import Partition, Schedule, SegmentChain
    from rpcompile.plan import Plan
    from rpcompile.shared_links import SharedLinks
    from rpcompile.simulate import Timeline
    from rpcompile.simulate_dispatch import DispatchTimeline

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


def default_partition(chain: SegmentChain, policy: str, gpus: int, fused: bool = True) -> Partition:
    """The stages that a policy is used with: RoundPipe's rule, or pipelines with mirrored stages.

    Args:
        chain: The segments.
        policy: Name of the policy.
        gpus: Number of GPUs.
        fused: Whether a pipeline's last stage runs forward and backward at once.

    Raises:
        PartitionError: The chain does not divide so.
    """
    if policy == "round_robin":
        return PartitionByRule(gpus, balanced=True).run(chain)
    return PartitionPipeline(gpus, 1 if policy in ("gpipe", "1f1b") else None, fused).run(chain)


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


def under_policy(plan: Plan, policy: str) -> Plan:
    """A plan's segments, GPUs and microbatches with a policy's usual stages and its schedule; to export.

    The prediction stays the plan's own: `simulate_policy` makes the policy's.

    Raises:
        InvalidArgument: No such policy.
        PartitionError: The chain does not divide so.
    """
    check_policy(policy)
    stages = default_partition(plan.chain, policy, plan.gpus)
    schedule = schedule_policy(
        plan.chain,
        stages,
        policy,
        plan.gpus,
        plan.microbatches,
        plan.mode,
        plan.update_s_per_byte,
        plan.links,
    )
    return replace(plan, partition=stages, schedule=schedule)


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
    """Every policy with its usual stages on one chain; see `simulate_policy`."""
    found: list[PolicyResult] = []
    for policy in POLICIES:
        try:
            result = simulate_policy(
                policy, chain, gpus, microbatches, mode, links, update_s_per_byte, own=False
            )
        except RpcompileError as error:
            result = PolicyResult(policy, problem=str(error))
        found.append(result)
    return tuple(found)


def simulate_policy(
    policy: str,
    chain: SegmentChain,
    gpus: int,
    microbatches: int,
    mode: str = "sync",
    links: SharedLinks | None = None,
    update_s_per_byte: float = 0.0,
    *,
    partition: str | None = None,
    own: bool = True,
) -> PolicyResult:
    """A policy with its usual or given stages; in mode "async" or with updates the steady state.

    Raises:
        InvalidArgument: No such policy, or the stages cannot be read.
        PartitionError: The chain does not divide so, or the policy cannot run these stages.
    """
    check_policy(policy)
    given = None if partition is None else PartitionAsGiven(partition, fused=True).run(chain)
    stages = given or default_partition(chain, policy, gpus)
    schedule = schedule_policy(chain, stages, policy, gpus, microbatches, mode, update_s_per_byte, links)
    chained = mode == "async" or update_s_per_byte > 0
    timeline = simulate_steady(schedule, links) if chained else simulate(schedule, links=links)
    return result_of(policy, chain, timeline, own)


def simulate_compute(
    chain: SegmentChain,
    policy: str,
    gpus: int,
    microbatches: int,
    hop_s: float | None,
    semantics: str,
    *,
    partition: str | None = None,
) -> DispatchTimeline:
    """One synchronous iteration by compute and hops alone, as published bubbles are.

    As published, pipelines have no fused stage, and round robin runs a round of microbatches for each
    GPU one behind the other.

    Args:
        chain: The segments.
        policy: Name of the policy.
        gpus: Number of GPUs.
        microbatches: Number of microbatches.
        hop_s: Seconds from one GPU to the next; None: from the bytes.
        semantics: "strict" or "published"; see `simulate_dispatch`.
        partition: Stages other than the usual ones.

    Raises:
        InvalidArgument: No such policy or semantics, or the stages cannot be read.
        PartitionError: The chain does not divide so, or the policy cannot run these stages.
    """
    check_policy(policy)
    given = None if partition is None else PartitionAsGiven(partition).run(chain)
    stages = given or default_partition(chain, policy, gpus, fused=False)
    rounds = {"rounds": math.ceil(microbatches / gpus)} if policy == "round_robin" else {}
    dispatch = POLICIES[policy](gpus, microbatches, **rounds).run(stages)
    return simulate_dispatch(chain, stages, dispatch, hop_s=hop_s, semantics=semantics)
