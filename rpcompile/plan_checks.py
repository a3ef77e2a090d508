"""What must hold of a plan that was read from a file, so that later code need not ask."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import msgspec

if TYPE_CHECKING:
    from rpcompile.plan import Plan

LONGEST_S = 1e9  # thirty years
MOST_BYTES = 1 << 62


def plan_problem(plan: Plan) -> str | None:
    """The first reference or number in a plan that cannot be; None if all can.

    Takes time and memory in proportion to the file, whatever numbers stand in it.
    """
    return _sizes(plan) or _small_numbers(plan) or _kinds(plan) or _references(plan) or _actions(plan)


def _sizes(plan: Plan) -> str | None:
    schedule = plan.schedule
    if plan.gpus < 1 or plan.microbatches < 1 or not plan.chain.segments or not plan.partition.stages:
        return "it has no GPUs, microbatches, segments or stages"
    if (schedule.gpus, schedule.microbatches) != (plan.gpus, plan.microbatches):
        return "its schedule is for another number of GPUs or microbatches"
    if len(plan.prediction.gpu_peak_bytes) != plan.gpus:
        return f"it predicts the peaks of {len(plan.prediction.gpu_peak_bytes)} GPUs, not {plan.gpus}"
    count = sum(len(queue.actions) for queue in schedule.queues)
    if plan.microbatches > count:
        return f"it has {plan.microbatches} microbatches and only {count} actions"
    return None


def _small_numbers(plan: Plan) -> str | None:
    """Numbers outside the schedule; `_actions` looks at those inside."""
    if not _finite(
        msgspec.to_builtins(replace(plan, schedule=replace(plan.schedule, queues=(), buffers={})))
    ):
        return "it holds a number that is not finite or too large"
    for hardware in (plan.chain.hardware, *(kind.hardware for kind in plan.chain.kinds)):
        for name in ("flops_per_s", "memory_bytes_per_s", "h2d_bytes_per_s", "d2h_bytes_per_s"):
            if getattr(hardware, name) <= 0:
                return f"hardware.{name} is {getattr(hardware, name)}; it must be above 0"
        if hardware.usable_bytes < 0 or hardware.memory_bytes < 0:
            return "its hardware has negative memory"
    for segment in plan.chain.segments:
        if segment.forward_s < 0 or segment.backward_s < 0 or segment.weight_bytes < 0:
            return f"segment {segment.name!r} takes negative time or bytes"
    if plan.prediction.iteration_s < 0 or min(plan.prediction.gpu_peak_bytes) < 0:
        return "it predicts a negative time or size"
    return None


def _kinds(plan: Plan) -> str | None:
    """GPUs that are not alike, and how iterations follow one another."""
    chain, schedule, count = plan.chain, plan.schedule, len(plan.chain.segments)
    if len(chain.kind_of) != (plan.gpus if chain.kinds else 0):
        return f"it says of {len(chain.kind_of)} GPUs of {plan.gpus} what kind they are"
    if any(not 0 <= kind < len(chain.kinds) for kind in chain.kind_of):
        return f"it names a kind of GPU that is none of {len(chain.kinds)}"
    for kind in chain.kinds:
        if (len(kind.forward_s), len(kind.backward_s)) != (count, count):
            return f"it does not have the seconds of {count} segments on {kind.hardware.name}"
        if min(*kind.forward_s, *kind.backward_s) < 0:
            return f"a segment takes negative time on {kind.hardware.name}"
    if plan.mode != schedule.mode:
        return f"its mode is {plan.mode!r} and its schedule's {schedule.mode!r}"
    if not 0 <= schedule.rotate < plan.gpus:
        return f"its iterations are shifted by {schedule.rotate} of {plan.gpus} GPUs"
    return None


def _references(plan: Plan) -> str | None:
    segments, stages, jobs = plan.chain.segments, plan.partition.stages, plan.schedule.jobs
    for index, stage in enumerate(stages):
        if stage.index != index or not 0 <= stage.first <= stage.last < len(segments):
            return f"stage {stage.index} at place {index} has segments {stage.first}..{stage.last}"
    for index, job in enumerate(jobs):
        if job.index != index or not 0 <= job.stage < len(stages) or not 0 <= job.gpu < plan.gpus:
            return f"job {job.index} at place {index} names stage {job.stage} and GPU {job.gpu}"
        for microbatch in job.microbatches:
            if not 0 <= microbatch < plan.microbatches:
                return f"job {job.index} names microbatch {microbatch} of {plan.microbatches}"
    for tied in plan.chain.tied:
        if any(not 0 <= segment < len(segments) for segment in tied.segments):
            return f"tied weight {tied.name!r} names a segment that does not exist"
    return None


def _actions(plan: Plan) -> str | None:
    schedule, jobs = plan.schedule, plan.schedule.jobs
    for buffer, nbytes in schedule.buffers.items():
        if not 0 <= nbytes <= MOST_BYTES:
            return f"buffer {buffer} has {nbytes} bytes"
    names = set[str]()
    for queue in schedule.queues:
        if not 0 <= queue.gpu < plan.gpus:
            return f"a queue is of GPU {queue.gpu}, and there are {plan.gpus}"
        for action in queue.actions:
            if (
                not 0 <= action.seconds <= LONGEST_S
                or not 0 <= action.nbytes <= MOST_BYTES
                or not -MOST_BYTES <= action.workspace_bytes <= MOST_BYTES
            ):
                return (
                    f"action {action.id} takes {action.seconds} s, {action.nbytes} bytes and "
                    f"{action.workspace_bytes} bytes of workspace; no time or move may be negative, and no "
                    f"time over {LONGEST_S:.0e} s"
                )
            if not 0 <= action.job < len(jobs) or action.stage != jobs[action.job].stage:
                return f"action {action.id} names job {action.job} and stage {action.stage}"
            names.update(action.reads, action.writes, action.frees)
    unknown = names.difference(schedule.buffers)
    if unknown:
        named = (a for a in schedule.actions() if unknown & {*a.reads, *a.writes, *a.frees})
        action = next(named)
        return f"action {action.id} names the unknown buffer {min(unknown)!r}"
    return None


def _finite(value: Any) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, int):
        return abs(value) <= MOST_BYTES
    if isinstance(value, dict):
        return all(_finite(item) for item in cast("dict[str, Any]", value).values())
    return (
        all(_finite(item) for item in cast("list[Any]", value)) if isinstance(value, list | tuple) else True
    )
