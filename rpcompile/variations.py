"""A plan with one thing changed: laid out again and simulated, to find out what would help."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

from rpcompile.ir import COMPUTE_OPS, Dispatch, Op, Stream
from rpcompile.passes.dispatch_round_robin import DispatchRoundRobin
from rpcompile.passes.insert_event_waits import InsertEventWaits
from rpcompile.passes.insert_transfers import InsertTransfers
from rpcompile.passes.insert_updates import InsertUpdates
from rpcompile.passes.lay_out_dispatch import LayOutDispatch
from rpcompile.shared_links import SharedLinks

if TYPE_CHECKING:
    from rpcompile.ir import Hardware, Partition, Schedule, SegmentChain
    from rpcompile.plan import Plan


def dispatch_of(schedule: Schedule) -> Dispatch:
    """The dispatch that a schedule was laid out from."""
    order: list[tuple[tuple[int, int], ...]] = [()] * schedule.gpus
    for queue in schedule.queues:
        if queue.stream is Stream.COMPUTE:
            order[queue.gpu] = tuple(
                (action.job, action.microbatch)
                for action in queue.actions
                if action.op in COMPUTE_OPS and action.op is not Op.RECOMPUTE
                if action.microbatch is not None
            )
    return Dispatch(
        schedule.policy,
        schedule.gpus,
        schedule.microbatches,
        schedule.jobs,
        tuple(order),
        recompute_ahead=True,
        rotate=schedule.rotate,
    )


def lay_out(
    chain: SegmentChain,
    partition: Partition,
    dispatch: Dispatch,
    mode: str,
    update_s_per_byte: float = 0.0,
    links: SharedLinks | None = None,
) -> Schedule:
    """The schedule of a dispatch, with transfers, sums of gradients, updates and events.

    Args:
        chain: The segments.
        partition: The stages.
        dispatch: Jobs and their order.
        mode: "sync", "async" or "forward".
        update_s_per_byte: Of the host's optimizer, for a byte of gradient; 0 leaves updates out.
        links: What they say of the host's memory is what sums of gradients and norms take.

    Raises:
        ScheduleError: The dispatch does not fit the partition.
    """
    schedule = InsertTransfers(chain).run(LayOutDispatch(chain, partition, mode).run(dispatch))
    stepped = update_s_per_byte > 0
    updates = InsertUpdates(
        chain,
        update_s_per_byte,
        parameter_bytes=1,
        host_bytes_per_s=host_rate(links),
        clip=stepped,
        updates=stepped,
    )
    return InsertEventWaits().run(updates.run(schedule))


def host_rate(links: SharedLinks | None) -> float:
    """Bytes per second of the host's memory; where nothing is said of it, the usual one."""
    said = None if links is None else links.host_bytes_per_s
    return said or SharedLinks().host_bytes_per_s or math.inf


def laid_out_as(
    plan: Plan, dispatch: Dispatch, chain: SegmentChain | None = None, partition: Partition | None = None
) -> Schedule:
    """A dispatch laid out as the plan's was."""
    return lay_out(
        chain or plan.chain,
        partition or plan.partition,
        dispatch,
        plan.mode,
        plan.update_s_per_byte,
        plan.links,
    )


def with_microbatches(plan: Plan, more: int) -> Schedule:
    """The same stages, GPUs and order with `more` microbatches of the same size.

    New microbatch M + i is run wherever microbatch i mod M is, by the same jobs, right behind it.
    """
    dispatch = dispatch_of(plan.schedule)
    old = dispatch.microbatches
    twins: dict[int, list[int]] = {}
    for new in range(old, old + more):
        twins.setdefault((new - old) % old, []).append(new)

    def with_twins(microbatch: int) -> list[int]:
        return [microbatch, *twins.get(microbatch, [])]

    jobs = tuple(
        replace(job, microbatches=tuple(twin for m in job.microbatches for twin in with_twins(m)))
        for job in dispatch.jobs
    )
    order = tuple(
        tuple((job, twin) for job, microbatch in queue for twin in with_twins(microbatch))
        for queue in dispatch.order
    )
    grown = replace(dispatch, microbatches=old + more, jobs=jobs, order=order)
    return laid_out_as(plan, grown)


def with_faster_links(plan: Plan, factor: float) -> Schedule:
    """The same stages, GPUs and order over links of `factor` times the rate; compute stays as it is."""

    def faster(hardware: Hardware) -> Hardware:
        up, down = hardware.h2d_bytes_per_s, hardware.d2h_bytes_per_s
        return replace(hardware, h2d_bytes_per_s=factor * up, d2h_bytes_per_s=factor * down)

    kinds = tuple(replace(kind, hardware=faster(kind.hardware)) for kind in plan.chain.kinds)
    chain = replace(plan.chain, hardware=faster(plan.chain.hardware), kinds=kinds)
    return laid_out_as(plan, dispatch_of(plan.schedule), chain)


def with_stages(plan: Plan, partition: Partition) -> Schedule:
    """Other stages, dispatched round robin."""
    dispatch = DispatchRoundRobin(plan.gpus, plan.microbatches).run(partition)
    return laid_out_as(plan, dispatch, partition=partition)
