"""Whether attention outputs are offloaded or recomputed: both are planned, and the faster is kept.

Offloading saves the attention's forward in every recompute and costs two copies. Both grow with the tokens of
a microbatch, the first with their square, so there is a length from which on it pays; and where a link is
what bounds the iteration, it does not. That is left to the simulator: the plan with every output offloaded,
and one with as many as the links have time for beside the compute, compete with the plan that recomputes
them all. Each runs on the better of its own stages and the other's. Where segments that offload would be
divided into other chunks of tokens or groups of heads to fit, they are; the division for recompute is tried,
too, on the stages that were found.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar

from rpcompile.errors import InvalidArgument, PartitionError
from rpcompile.ir import StageKind, Stream

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Sequence

    from rpcompile.ir import Partition, Schedule, SegmentChain
    from rpcompile.scheduling import Found

_T = TypeVar("_T")
NAMED = ("auto", "recompute", "offload")
AS_IS = "as is"  # as the chain's segments say
WORTH = 0.02  # of the compute, or of the iteration: what offloading has to save; searches differ by 1 %


@dataclass(frozen=True)
class AttentionChoice:
    """The chain with its offloading decided, its plan if one was made for that, and why, in a sentence."""

    chain: SegmentChain
    found: Found | None
    why: str


def check_attention(asked: str) -> None:
    """Refuses what is none of the choices.

    Raises:
        InvalidArgument: Naming them.
    """
    if asked not in (*NAMED, AS_IS):
        raise InvalidArgument(f"attention={asked!r}; it must be {', '.join(map(repr, NAMED))}")


@dataclass(frozen=True)
class Means:
    """How chains are planned.

    Attributes:
        plan: The plan of a chain. Raises PartitionError if nothing fits.
        again: A plan's stages and order for a chain that it is not of, or None if that does not fit; the last
            argument is a lower bound on what any stages take, in seconds.
        problem: Why the host cannot hold what a schedule leaves there; None if it can.
    """

    plan: Callable[[SegmentChain], Found]
    again: Callable[[SegmentChain, Found, float], Found | None]
    problem: Callable[[SegmentChain, Schedule], str | None]


def choose_attention(
    chain: SegmentChain, asked: str, means: Means, divided: Callable[[], SegmentChain] | None = None
) -> AttentionChoice:
    """Decides for which segments attention outputs are offloaded.

    Args:
        chain: With `Segment.attention` where there is something to decide.
        divided: The chain with tokens and heads divided for segments that offload; None: as in `chain`.
        asked: "auto"; "recompute" for none; "offload" for all that can be; "as is".
        means: Is only used where there is something to compare.

    Raises:
        InvalidArgument: "offload" where nothing can be.
    """
    if asked == AS_IS:
        return AttentionChoice(chain, None, "")
    every = len(_candidates(chain))
    none = AttentionChoice(offload(chain, 0), None, "")
    if not every and asked == "offload":
        refused = dict.fromkeys(r for s in chain.segments if s.attention for r in s.attention.refused)
        why = "; ".join(refused) or (
            "eager attention has none, and of a profile only what it says itself is known "
            "(`rpcompile profile` writes it)"
        )
        raise InvalidArgument(
            f"attention='offload', but no segment has an attention output that can be kept: {why}; use "
            "attention='auto'"
        )
    if not every:
        return none
    if asked == "recompute":
        return replace(none, why="attention='recompute' was asked for.")
    if asked == "offload":
        chain = divided() if divided else chain
        return AttentionChoice(offload(chain), None, "attention='offload' was asked for.")
    share = saved_share(chain)
    if share < WORTH:
        return replace(none, why=f"Offloading could save no more than {100 * share:.1f} % of the compute.")
    return _fastest(chain, divided() if divided else chain, every, means)


def offload(
    chain: SegmentChain, count: int | None = None, divided: SegmentChain | None = None
) -> SegmentChain:
    """The chain with the outputs of `count` segments offloaded, those that save most for their bytes.

    Of segments that are alike, every so many is taken, so that the copies are spread over the iteration.

    Args:
        chain: The segments that recompute.
        count: How many offload; None: all that can.
        divided: The chain that those are of; None for the same.
    """
    candidates = _candidates(chain)
    count = len(candidates) if count is None else count
    worth = {index: _seconds_a_byte(chain, index) for index in candidates}
    chosen: set[int] = set()
    for value in sorted(set(worth.values()), reverse=True):
        alike = [index for index in candidates if worth[index] == value]
        taken = min(count - len(chosen), len(alike))
        chosen |= {alike[place * len(alike) // taken] for place in range(taken)}
    return offload_these(chain, chosen, divided)


def offload_these(
    chain: SegmentChain, chosen: Collection[int], divided: SegmentChain | None = None
) -> SegmentChain:
    """The chain with the outputs of these segments offloaded, which are taken from `divided`."""
    other = divided or chain

    def pick(mine: Sequence[_T], theirs: Sequence[_T]) -> tuple[_T, ...]:
        pairs = enumerate(zip(mine, theirs, strict=True))
        return tuple(b if index in chosen else a for index, (a, b) in pairs)

    segments = enumerate(pick(chain.segments, other.segments))
    kinds = (
        replace(a, forward_s=pick(a.forward_s, b.forward_s), backward_s=pick(a.backward_s, b.backward_s))
        for a, b in zip(chain.kinds, other.kinds, strict=True)
    )
    return replace(
        chain,
        segments=tuple(replace(segment, offloads=index in chosen) for index, segment in segments),
        kinds=tuple(kinds),
    )


def saved_share(chain: SegmentChain) -> float:
    """The part of forward, recompute and backward that offloading everything saves at most."""
    segments = chain.segments
    first = chain.first_backward
    total = sum(s.forward_s for s in segments) + sum(s.forward_s + s.backward_s for s in segments[first:])
    saved = sum(segment.attention.forward_s for segment in segments if segment.attention)
    return saved / total if total else 0.0


def _candidates(chain: SegmentChain) -> list[int]:
    return [i for i, segment in enumerate(chain.segments) if segment.attention and segment.attention.nbytes]


def _seconds_a_byte(chain: SegmentChain, index: int) -> float:
    attention = chain.segments[index].attention
    assert attention is not None
    return attention.forward_s / attention.nbytes


def _fastest(chain: SegmentChain, divided: SegmentChain, every: int, means: Means) -> AttentionChoice:
    """Tries all, and as many as the links have time for; the sentence says what became of each."""
    none = offload(chain, 0)
    try:
        recomputed = means.plan(none)
    except PartitionError:
        # A search may still find one; what is that tight has no room for copies.
        return AttentionChoice(none, None, "No plan to compare others with was found without a search.")
    best: AttentionChoice | None = None
    said: list[str] = []
    for count in dict.fromkeys((every, _fits_in_slack(chain, recomputed.partition, recomputed.schedule))):
        if not count or best is not None:
            continue
        trial = offload(chain, count, divided)
        recomputed, planned = _compared(none, recomputed, trial, means)
        tried = [(trial, planned, "")]
        if divided.segments != chain.segments:
            found = [found for found in (planned, recomputed) if found]
            tried.append((*_on_their_stages(offload(chain, count), found, means), ", divided as before"))
        fitting: list[tuple[SegmentChain, Found]] = []
        for trial, planned, how in tried:
            what = f"with {'all' if count == every else f'{count} of {every}'} outputs offloaded{how}"
            if planned is None:
                said.append(f"{what} no plan fits in the GPUs' memory")
            elif problem := means.problem(trial, planned.schedule):
                said.append(f"{what} the host {problem}")
            else:
                said.append(f"{what} at {planned.iteration_s:.4g} s")
                fitting.append((trial, planned))
        if fitting:
            trial, planned = min(fitting, key=lambda pair: pair[1].iteration_s)
            if planned.iteration_s < (1 - WORTH) * recomputed.iteration_s:
                best = AttentionChoice(trial, planned, "")
    recompute_s = recomputed.iteration_s
    why = ", ".join([f"With recompute an iteration is simulated at {recompute_s:.4g} s", *said]) + "."
    return replace(best or AttentionChoice(none, recomputed, ""), why=why)


def _compared(
    none: SegmentChain, recomputed: Found, trial: SegmentChain, means: Means
) -> tuple[Found, Found | None]:
    """The better plan of each chain. Either's stages are tried for both: solvers are luckier at times."""
    own: Found | None = None
    with suppress(PartitionError):
        own = means.plan(trial)
    shared = means.again(trial, recomputed, 0.0 if own is None else own.partition.bound_s)
    other = None if own is None else means.again(none, own, recomputed.partition.bound_s)
    faster = min(filter(None, (own, shared)), key=_seconds, default=None)
    return min(filter(None, (recomputed, other)), key=_seconds), faster


def _on_their_stages(
    chain: SegmentChain, plans: Iterable[Found], means: Means
) -> tuple[SegmentChain, Found | None]:
    """The chain, and its best plan on the stages of others."""
    found = (means.again(chain, plan, 0.0) for plan in plans)
    return chain, min(filter(None, found), key=_seconds, default=None)


def _seconds(found: Found) -> float:
    return found.iteration_s


def _fits_in_slack(chain: SegmentChain, partition: Partition, schedule: Schedule) -> int:
    """How many segments' outputs the links have time for while the stages that copy them compute."""
    hardware, stages = chain.hardware, partition.stages
    ways = (
        (StageKind.F, Stream.D2H, hardware.d2h_bytes_per_s),
        (StageKind.B, Stream.H2D, hardware.h2d_bytes_per_s),
    )
    candidates = _candidates(chain)
    share = 1.0
    for kind, stream, rate in ways:
        mine = {index for stage in stages if stage.kind is kind for index in stage.segments}
        nbytes = sum(a.nbytes for i in candidates if i in mine and (a := chain.segments[i].attention))
        seconds = {Stream.COMPUTE: 0.0, stream: 0.0}
        for action in schedule.actions():
            if stages[action.stage].kind is kind and action.stream in seconds:
                seconds[action.stream] += action.seconds
        idle_bytes = (seconds[Stream.COMPUTE] - seconds[stream]) * rate
        if nbytes:
            share = min(share, idle_bytes / (schedule.microbatches * nbytes))
    return max(0, int(share * len(candidates)))


def over(needed: int, limit: int | None) -> str | None:
    """How far the host's memory is exceeded, in words; None if it is not."""
    if limit is None or needed <= limit:
        return None
    return f"needs {needed / 1e9:.1f} GB of {limit / 1e9:.1f} GB"
