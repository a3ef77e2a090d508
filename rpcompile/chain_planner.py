"""From a chain of priced segments to a plan: stages, schedule, prediction and proof.

It needs no model, and so it loads no torch: plans from profiles are there in seconds.
"""

from __future__ import annotations

import logging
import math
import platform
import time
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from rpcompile.attention_choice import Means, check_attention, choose_attention, over
from rpcompile.collection import collection_paused
from rpcompile.errors import InvalidArgument, PartitionError, PlanFileError
from rpcompile.host_memory import host_memory, item_bytes
from rpcompile.mixed_gpus import Box, with_speeds
from rpcompile.plan import Plan, Prediction
from rpcompile.progress import announce, progress_bar
from rpcompile.scheduling import (
    Found,
    PlanOptions,
    find_schedule,
    on_its_stages,
    traffic_of,
    with_exact_memory,
)
from rpcompile.variations import dispatch_of, laid_out_as
from rpcompile.verify import verify_schedule

if TYPE_CHECKING:
    from collections.abc import Callable

    from tqdm import tqdm

    from rpcompile.ir import Capture, SegmentChain
    from rpcompile.profile import Profile

_LIMITS = {
    "max_traffic": float,
    "fused_segments": int,
    "host_bytes": int,
}  # options that a plan's provenance has
QUICK_S = 1.0  # of the partition solver, where plans are only compared
_log = logging.getLogger("rpcompile")


@dataclass(frozen=True)
class ModelDescription:
    """Name, fingerprint and main dtype of what a plan is for."""

    name: str
    fingerprint: str
    dtype: str


def plan_profile(
    profile: Profile,
    options: PlanOptions,
    name: str = "profile",
    progress: bool | None = None,
    box: Box | None = None,
) -> Plan:
    """A plan from somebody's measurement, without the model.

    Args:
        profile: What the segments cost; `rpcompile/profile.py` describes the file.
        options: What to plan for.
        name: What to call the model.
        progress: Show a progress bar; default: if standard error is a terminal.
        box: The GPUs, with their speeds beside the one that the profile is of; None: all are that one.

    Returns:
        A plan that can be printed, simulated, verified and saved, but not run: it has no graph.

    Raises:
        InvalidArgument: A speed is missing.
        PartitionError: Nothing fits.
    """
    chain = profile.to_chain()
    chain = chain if box is None else with_speeds(chain, box)
    with progress_bar(progress) as bar:
        return plan_chain(chain, options, ModelDescription(name, "", "given"), bar)


@collection_paused()
def plan_chain(
    chain: SegmentChain,
    options: PlanOptions,
    model: ModelDescription,
    bar: tqdm[Any] | None = None,
    capture: Capture | None = None,
    offloading: Callable[[], SegmentChain] | None = None,
) -> Plan:
    """Partition, schedule, simulation and proof of one chain.

    Args:
        chain: The segments, priced.
        options: What to plan for.
        model: What the plan says about the model.
        bar: Is advanced by one for each pass.
        capture: The graph, if it is known: the memory of the stages chosen is then found by running them on
            tensors without data, and not only bounded.
        offloading: Makes the chain divided for segments that offload attention outputs (`bind` with
            `offloading=True`); None: they are divided as the others are.

    Raises:
        InvalidArgument: An option is out of range.
        PartitionError: Nothing fits.
    """
    started = time.perf_counter()
    check_attention(options.attention)
    chain, found, why = _with_attention(chain, options, model.dtype, bar, capture, offloading)
    announce(bar, "verify")
    verify_schedule(found.schedule, chain, found.partition)
    prediction = _prediction(chain, found, model.dtype)
    excess = over(prediction.host_peak_bytes, options.host_bytes)
    if excess and any(segment.offloads for segment in chain.segments):
        raise PartitionError(f"with attention outputs offloaded the host {excess}; use attention='recompute'")
    if excess:
        _log.warning("the host %s", excess)
    _log.info("planned %s in %.2f s", model.name, time.perf_counter() - started)
    return Plan(
        model_name=model.name,
        fingerprint=model.fingerprint,
        dtype=model.dtype,
        gpus=options.gpus,
        microbatches=options.microbatches,
        mode=options.mode,
        chain=chain,
        partition=found.partition,
        schedule=found.schedule,
        prediction=prediction,
        provenance=_provenance(options),
        attention=why,
        links=options.links,
        update_s_per_byte=options.update_s_per_byte,
    )


def _with_attention(
    chain: SegmentChain,
    options: PlanOptions,
    dtype: str,
    bar: tqdm[Any] | None,
    capture: Capture | None,
    offloading: Callable[[], SegmentChain] | None,
) -> tuple[SegmentChain, Found, str]:
    """The chain with its attention outputs offloaded or not, its plan, and why."""
    # One plan of each is enough to compare; only the chain that is chosen is searched on.
    seconds = min(QUICK_S, options.solver_time_s)
    quick = replace(options, effort=None, fused_segments=None, solver_time_s=seconds)
    means = Means(
        lambda trial: find_schedule(trial, quick, bar, capture),
        lambda trial, found, bound_s: on_its_stages(trial, found, quick, bound_s, capture),
        lambda trial, schedule: over(host_memory(trial, schedule, dtype).total_bytes, options.host_bytes),
    )
    asked = "recompute" if options.mode == "forward" else options.attention
    choice = choose_attention(chain, asked, means, offloading)
    found = choice.found
    if options.effort is None:
        found = found or find_schedule(choice.chain, options, bar, capture)
    else:
        found = _searched(choice.chain, found, means, options, bar, capture)
    if capture is not None:
        announce(bar, "find-stage-memory")
        found = with_exact_memory(choice.chain, found, options, capture)
    return choice.chain, found, choice.why


def _searched(
    chain: SegmentChain,
    plain: Found | None,
    means: Means,
    options: PlanOptions,
    bar: tqdm[Any] | None,
    capture: Capture | None,
) -> Found:
    """What the search finds; or one job a stage where that is as fast, or all that there is room for.

    Raises:
        PartitionError: Nothing fits.
    """
    try:
        found = find_schedule(chain, options, bar, capture)
    except PartitionError:  # no search fits, where stages in turn may
        if plain is None:
            raise
        return plain
    if means.problem(chain, found.schedule) is None:
        return found if plain is None else min(found, plain, key=lambda item: item.iteration_s)
    # Replicas' gradients are more than the host has room for.
    try:
        return plain or find_schedule(chain, replace(options, effort=None), bar, capture)
    except PartitionError:
        return found


def laid_out_again(plan: Plan) -> Plan:
    """A plan with a new schedule and prediction for its chain: same stages, jobs and order; not verified.

    Raises:
        ScheduleError, PartitionError: The plan contradicts itself.
    """
    schedule = laid_out_as(plan, dispatch_of(plan.schedule))
    again = replace(plan, schedule=schedule)
    steady = again.simulate_steady() if plan.chained else None
    timed = Found(plan.partition, schedule, again.simulate(), steady)
    return replace(again, prediction=_prediction(plan.chain, timed, plan.dtype))


def _prediction(chain: SegmentChain, found: Found, dtype: str) -> Prediction:
    schedule, timeline, steady = found.schedule, found.timeline, found.steady
    tokens = schedule.microbatches * chain.bindings.get("batch", 1) * chain.bindings.get("sequence", 1)
    host = host_memory(chain, schedule, dtype)
    return Prediction(
        iteration_s=found.iteration_s,
        tokens_per_s=tokens / found.iteration_s if "sequence" in chain.bindings else None,
        bubble=timeline.bubble if steady is None else steady.steady_bubble,
        gpu_peak_bytes=(steady or timeline).gpu_peak_bytes,
        host_peak_bytes=host.total_bytes,
        host=host,
        traffic=traffic_of(chain, schedule, timeline),
        alone_s=None if steady is None else timeline.makespan_s,
    )


def update_s_per_byte(optimizer_ns: float | None, dtype: str) -> float:
    """What `PlanOptions` is told of an optimizer that takes so long for a trainable parameter.

    Args:
        optimizer_ns: Nanoseconds for a parameter; None for no updates.
        dtype: Of most parameters, and so of gradients; of another than torch's, 16 bits are assumed.

    Raises:
        InvalidArgument: It is not above 0 and finite.
    """
    if optimizer_ns is None:
        return 0.0
    if not 0 < optimizer_ns < math.inf:
        raise InvalidArgument(f"optimizer_ns={optimizer_ns}; it must be finite and above 0, or None")
    return optimizer_ns * 1e-9 / item_bytes(dtype, 2)


def limits_of(plan: Plan) -> dict[str, Any]:
    """What the planner was told to keep to, as `PlanOptions`; nothing for plans that do not say.

    Raises:
        PlanFileError: The file says something that is no number.
    """
    try:
        return {
            name: kind(plan.provenance[name]) for name, kind in _LIMITS.items() if name in plan.provenance
        }
    except ValueError as error:
        raise PlanFileError(f"the plan's provenance is damaged: {error}") from error


def _provenance(options: PlanOptions) -> dict[str, str]:
    from rpcompile import __version__

    limits = {name: getattr(options, name) for name in _LIMITS}
    return {
        **{name: str(limit) for name, limit in limits.items() if limit is not None},
        "rpcompile": __version__,
        "torch": version("torch"),
        "python": platform.python_version(),
        "solver_seed": str(options.seed),
    }
