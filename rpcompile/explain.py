"""A plan in words: why it is cut as it is, what each stage waits for, and what would help next.

Every number is from the plan, from its simulation, or from simulating it with one thing changed.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from rpcompile import variations
from rpcompile.activations import activations
from rpcompile.attention_choice import AS_IS
from rpcompile.errors import RpcompileError
from rpcompile.idle import COPY, DOWNLOAD, OTHER_STAGE, OTHER_UPLOAD, PHRASES, UPLOAD, Gap, gaps
from rpcompile.ir import Stage, StageKind
from rpcompile.plan_summary import compute_s
from rpcompile.simulate import simulate, simulate_steady
from rpcompile.stage_bytes import upload_unit_bytes
from rpcompile.units import seconds, size

if TYPE_CHECKING:
    from rpcompile.ir import Schedule
    from rpcompile.plan import Plan

MOST_MORE = 16  # microbatches that are tried
MOST_STAGES = 3  # whose upload is looked into
SOLVER_S = 1.0
WORTH = 0.01  # a change of the time per microbatch that is worth a sentence
_SMALLEST = 1e-9  # share of the GPUs' time that counts as idle
HIDDEN = 0.01  # what may be left of a wait that counts as hidden


@dataclass(frozen=True)
class StageNote:
    """One stage: what it is, what it waited for, and that in a sentence.

    Attributes:
        index: Of the stage.
        kind: "F", "B" or "FB".
        compute_s: Of one microbatch.
        waits_s: Seconds that its GPUs idled before its microbatches, by cause (see `rpcompile.idle`).
        bound_by: "compute", or the cause that it waited longest for if that is longer than it computed.
        hidden_by: How many more microbatches hide its upload; None if it was not asked or none do.
        text: A sentence.
    """

    index: int
    kind: str
    compute_s: float
    waits_s: dict[str, float]
    bound_by: str
    hidden_by: int | None
    text: str


@dataclass(frozen=True)
class Variation:
    """The plan with one thing changed, simulated.

    Attributes:
        what: E.g. "links twice as fast".
        iteration_s: Of the changed plan.
        microbatches: Of the changed plan.
        change: Of the time per microbatch: -0.1 is 10 % less.
        fits: Whether its simulated GPU peak is within what a plan may use.
    """

    what: str
    iteration_s: float
    microbatches: int
    change: float
    fits: bool

    def __str__(self) -> str:
        less = "less" if self.change < 0 else "more"
        memory = "" if self.fits else "; but it does not fit in the GPU's memory"
        return f"{self.what}: {100 * abs(self.change):.1f} % {less} time per microbatch{memory}"


@dataclass(frozen=True)
class Explanation:
    """What `explain` found; printing it gives all of it.

    Attributes:
        cut: Why these stages, in sentences.
        activations: What is divided into chunks of tokens, and whether attention outputs are kept, and why.
        idle: Where the GPUs' idle time goes, in sentences.
        stages: A note on each stage.
        variations: What was tried, the most helpful first.
        advice: What would help next, in sentences.
    """

    cut: tuple[str, ...]
    activations: tuple[str, ...]
    idle: tuple[str, ...]
    stages: tuple[StageNote, ...]
    variations: tuple[Variation, ...]
    advice: tuple[str, ...]

    @property
    def tried(self) -> tuple[str, ...]:
        """What was tried and is not advised, in sentences."""
        return tuple(line for line in map(str, self.variations) if line not in self.advice)

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "source": "simulated"}

    def __str__(self) -> str:
        parts = {
            "Why these stages": self.cut,
            "Activations": self.activations,
            "Where the idle time goes (simulated)": self.idle,
            "Stage by stage": tuple(note.text for note in self.stages),
            "What would help (simulated)": self.advice,
            "What else was tried (simulated)": self.tried,
        }
        return "\n".join(
            f"{title}\n" + "".join(f"  - {line}\n" for line in lines)
            for title, lines in parts.items()
            if lines
        )


def explain(plan: Plan, replan: bool = True) -> Explanation:
    """Explains a plan.

    Args:
        plan: The plan.
        replan: Also plan for one GPU more and for twice as many, which takes the solver seconds.
    """
    asked = _Question(plan)
    tried = sorted(asked.variations(replan), key=lambda found: found.change)
    return Explanation(
        cut=tuple(_cut(plan)),
        activations=tuple(activations(plan)),
        idle=tuple(_idle(plan, asked.run)),
        stages=tuple(asked.notes),
        variations=tuple(tried),
        advice=tuple(_advice(tried, asked.notes)),
    )


# ------------------------------------------------------------------- why these stages


def _cut(plan: Plan) -> list[str]:
    by_kind = {kind: [s for s in plan.partition.stages if s.kind is kind] for kind in StageKind}
    lines: list[str] = []
    for kind, what in ((StageKind.F, "forward"), (StageKind.B, "backward (with recompute)")):
        stages = by_kind[kind]
        if stages:
            times = [compute_s(plan, stage) for stage in stages]
            count = "1 stage" if len(stages) == 1 else f"{len(stages)} stages"
            lines.append(f"The {what} is cut into {count} of {_range(times)} a microbatch.")
    for stage in by_kind[StageKind.FB]:
        saved = plan.microbatches * sum(plan.chain.segments[i].forward_s for i in stage.segments)
        lines.append(
            f"Stage {stage.index} ({_segments(plan, stage)}) runs forward and backward at once: no "
            f"recompute, which saves {seconds(saved)} of GPU time an iteration."
        )
    lines.append(_balance(plan))
    lines.append(_limit(plan))
    return lines


def _balance(plan: Plan) -> str:
    loads = [0.0] * plan.gpus
    for job in plan.schedule.jobs:
        stage = plan.partition.stages[job.stage]
        loads[job.gpu] += len(job.microbatches) * compute_s(plan, stage, job.gpu)
    mean = sum(loads) / plan.gpus
    if plan.schedule.rotate:
        return (
            f"Each iteration is shifted by {plan.schedule.rotate} GPUs against the one before: over some "
            f"iterations every GPU computes {seconds(mean)} an iteration."
        )
    heaviest = max(range(plan.gpus), key=loads.__getitem__)
    over = 100 * (loads[heaviest] / mean - 1) if mean else 0.0
    if over < 0.05:
        return f"All {plan.gpus} GPUs compute {seconds(mean)} an iteration: the load is even."
    return (
        f"GPU {heaviest} computes longest: {seconds(loads[heaviest])} an iteration, {over:.1f} % over the "
        f"mean of {seconds(mean)}; an iteration cannot be shorter than that."
    )


def _limit(plan: Plan) -> str:
    peaks = plan.prediction.gpu_peak_bytes
    limits = [plan.chain.hardware_of(gpu).usable_bytes for gpu in range(plan.gpus)]
    share, peak, limit = max(
        (100 * peak / limit if limit else math.inf, peak, limit)
        for peak, limit in zip(peaks, limits, strict=True)
    )
    memory = "memory may bind the cuts" if share > 90 else "memory does not bind the cuts"
    partition = plan.partition
    proof = (
        f"{partition.solver} proved that no partition is faster under its model"
        if partition.status == "OPTIMAL"
        else f"of those that {partition.solver} considered none takes {100 * partition.gap:.1f} % less under "
        "its model"
    )
    return f"The fullest GPU holds {size(peak)} of {size(limit)} ({share:.0f} %): {memory}; {proof}."


# ------------------------------------------------------------------- where the idle time goes


def _idle(plan: Plan, run: _Run) -> list[str]:
    whole = plan.gpus * run.iteration_s
    total = sum(gap.seconds for gap in run.gaps) / run.iterations
    steady = " in the steady state" if plan.chained else ""
    if total <= _SMALLEST * whole:
        return [f"No GPU is ever idle{steady}."]
    causes: dict[str, float] = defaultdict(float)
    for gap in run.gaps:
        for cause, value in gap.causes.items():
            causes[cause] += value / run.iterations
    lines = [
        f"GPUs are idle for {100 * total / whole:.1f} % of {plan.gpus} x {seconds(run.iteration_s)}{steady}:"
    ]
    for cause, value in sorted(causes.items(), key=lambda item: -item[1]):
        lines.append(f"{100 * value / whole:.1f} % {PHRASES[cause]} ({seconds(value)} over all GPUs)")
    return lines


# ------------------------------------------------------------------- stages and what helps


class _Run:
    """The simulation of a plan's schedule or of a variation: one iteration, or the steady state of many."""

    def __init__(self, plan: Plan, schedule: Schedule) -> None:
        self._schedule = schedule
        if plan.chained:
            self.timeline = simulate_steady(schedule, plan.links)
            self.iteration_s = self.timeline.period_s
        else:
            self.timeline = simulate(schedule, links=plan.links)
            self.iteration_s = self.timeline.makespan_s
        # In the middle of many iterations, as many as begin on every GPU once.
        ends_s = self.timeline.iteration_end_s
        turn = schedule.gpus // math.gcd(schedule.rotate, schedule.gpus)
        self.iterations = min(turn, len(ends_s) // 2) or 1
        first = (len(ends_s) - self.iterations) // 2
        self._window = (ends_s[first - 1] if first else 0.0, ends_s[first - 1 + self.iterations])

    @cached_property
    def gaps(self) -> tuple[Gap, ...]:
        """Of `iterations` iterations."""
        return gaps(self._schedule, self.timeline, self._window)

    @cached_property
    def waits(self) -> dict[int, dict[str, float]]:
        """By stage, the seconds of an iteration that its GPUs idle before its microbatches, by cause."""
        found: dict[int, dict[str, float]] = defaultdict(lambda: defaultdict(float))
        for gap in self.gaps:
            if gap.stage is not None:
                for cause, value in gap.causes.items():
                    found[gap.stage][cause] += value / self.iterations
        return found


class _Question:
    """A plan and the simulations of its variations, each made once."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.run = _Run(plan, plan.schedule)
        self._more: dict[int, _Run] = {}

    @cached_property
    def notes(self) -> list[StageNote]:
        waits = self.run.waits
        uploads = {stage: causes[UPLOAD] for stage, causes in waits.items() if causes.get(UPLOAD, 0.0) > 0}
        longest = sorted(uploads, key=lambda stage: -uploads[stage])[:MOST_STAGES]
        return [self._note(stage, waits[stage.index], longest) for stage in self.plan.partition.stages]

    def _note(self, stage: Stage, waits: dict[str, float], longest: list[int]) -> StageNote:
        each_s = compute_s(self.plan, stage)
        work_s = each_s * self.plan.microbatches
        cause = max(waits, key=lambda name: waits[name], default=None)
        bound_by = cause if cause is not None and waits[cause] > work_s else "compute"
        what = f"{stage.kind.value}, {_segments(self.plan, stage)}"
        text = f"Stage {stage.index} ({what}) computes {seconds(work_s)}"
        said = [
            f"{seconds(value)} for {reason}"
            for name, reason in (
                (UPLOAD, "its upload"),
                (OTHER_UPLOAD, "uploads of stages before"),
                (COPY, "its activations"),
                (OTHER_STAGE, "the stage before"),
                (DOWNLOAD, "downloads to make room"),
            )
            if (value := waits.get(name, 0.0)) > 1e-9
        ]
        text += f" and waits {', '.join(said)}" if said else " and waits for nothing"
        more = self._hides(stage.index, waits[UPLOAD]) if stage.index in longest else None
        if more is not None:
            text += f"; {more} more {'microbatch hides' if more == 1 else 'microbatches hide'} the upload"
        elif stage.index in longest:
            text += f"; {MOST_MORE} more microbatches would not hide the upload"
        return StageNote(stage.index, stage.kind.value, each_s, dict(waits), bound_by, more, text + ".")

    def _hides(self, stage: int, wait_s: float) -> int | None:
        """How many more microbatches hide the upload of a stage; None if `MOST_MORE` do not."""

        def hidden(more: int) -> bool:
            return self.with_more(more).waits[stage][UPLOAD] <= HIDDEN * wait_s

        if not hidden(MOST_MORE):
            return None
        low, high = 0, MOST_MORE
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if hidden(middle) else (middle, high)
        return high

    def with_more(self, more: int) -> _Run:
        """The simulation with more microbatches."""
        if more not in self._more:
            self._more[more] = _Run(self.plan, variations.with_microbatches(self.plan, more))
        return self._more[more]

    def variations(self, replan: bool) -> list[Variation]:
        plan = self.plan
        count = 2 * plan.microbatches
        found = [
            self._variation(f"twice the microbatches ({count})", self.with_more(plan.microbatches), count),
            self._tried("links twice as fast", variations.with_faster_links(plan, 2.0)),
        ]
        found += [self._tried(what, schedule) for what, schedule in self._other_stages()]
        if replan:
            found += self._replanned(plan.gpus + 1)
            found += self._replanned(2 * plan.gpus)
        return found

    def _other_stages(self) -> list[tuple[str, Schedule]]:
        """One stage fewer and one more, where the dispatch is plainly round robin."""
        plan = self.plan
        jobs = plan.schedule.jobs
        plain = (
            plan.mode != "async"
            and not plan.chain.kinds
            and [(job.stage, job.gpu) for job in jobs]
            == [(stage.index, stage.index % plan.gpus) for stage in plan.partition.stages]
        )
        if not plain:
            return []
        found: list[tuple[str, Schedule]] = []
        for what, stages in (("one stage fewer", _merged(plan)), ("one stage more", _split(plan))):
            if stages is not None:
                partition = replace(plan.partition, stages=stages)
                found.append((what, variations.with_stages(plan, partition)))
        return found

    def _replanned(self, gpus: int) -> list[Variation]:
        from rpcompile.chain_planner import ModelDescription, PlanOptions, limits_of, plan_chain

        plan = self.plan
        options = PlanOptions(
            gpus,
            plan.microbatches,
            plan.mode,
            solver_time_s=SOLVER_S,
            effort="fast" if plan.schedule.policy == "searched" else None,
            links=plan.links,
            attention=AS_IS,
            update_s_per_byte=plan.update_s_per_byte,
        )
        # What is added to different GPUs are the first of them once more.
        kind_of = (
            tuple(plan.chain.kind_of[gpu % plan.gpus] for gpu in range(gpus)) if plan.chain.kinds else ()
        )
        try:
            limits = limits_of(plan) if options.effort else {}
            if "max_traffic" in limits:  # the same bytes, whose unit depends on the number of GPUs
                old, new = (
                    upload_unit_bytes(plan.chain, count, plan.microbatches) for count in (plan.gpus, gpus)
                )
                limits["max_traffic"] *= old / new
            other = plan_chain(
                replace(plan.chain, kind_of=kind_of),
                replace(options, **limits),
                ModelDescription(plan.model_name, plan.fingerprint, plan.dtype),
            )
        except RpcompileError:  # e.g. more GPUs than segments: there is nothing to say
            return []
        added = (
            f" (one {plan.chain.hardware_of(0).name} more)"
            if plan.chain.kinds and gpus == plan.gpus + 1
            else ""
        )
        most = " with as many uploads" if "max_traffic" in limits else ""
        what = f"{gpus} GPUs in place of {plan.gpus}{added}{most}"
        return [self._variation(what, _Run(other, other.schedule), plan.microbatches)]

    def _tried(self, what: str, schedule: Schedule) -> Variation:
        return self._variation(what, _Run(self.plan, schedule), schedule.microbatches)

    def _variation(self, what: str, run: _Run, microbatches: int) -> Variation:
        own = self.run.iteration_s / self.plan.microbatches
        change = run.iteration_s / microbatches / own - 1 if own else 0.0
        chain, gpus = self.plan.chain, self.plan.gpus
        fits = all(
            peak <= chain.hardware_of(gpu % gpus).usable_bytes
            for gpu, peak in enumerate(run.timeline.gpu_peak_bytes)
        )
        return Variation(what, run.iteration_s, microbatches, change, fits)


def _merged(plan: Plan) -> tuple[Stage, ...] | None:
    """The stages with the two lightest neighbours of one kind made one."""
    stages = plan.partition.stages
    pairs = [i for i in range(len(stages) - 1) if stages[i].kind is stages[i + 1].kind]
    if not pairs:
        return None
    at = min(pairs, key=lambda i: compute_s(plan, stages[i]) + compute_s(plan, stages[i + 1]))
    one, two = stages[at], stages[at + 1]
    both = Stage(at, one.kind, min(one.first, two.first), max(one.last, two.last))
    return _numbered([*stages[:at], both, *stages[at + 2 :]])


def _split(plan: Plan) -> tuple[Stage, ...] | None:
    """The stages with the heaviest forward or backward one divided where its halves are most even."""
    stages = plan.partition.stages
    wide = [stage for stage in stages if stage.first < stage.last and stage.kind is not StageKind.FB]
    if not wide:
        return None
    heaviest = max(wide, key=lambda stage: compute_s(plan, stage))

    def halves(middle: int) -> list[Stage]:
        parts = [replace(heaviest, last=middle), replace(heaviest, first=middle + 1)]
        return parts if heaviest.kind is StageKind.F else parts[::-1]

    middle = min(
        range(heaviest.first, heaviest.last), key=lambda m: max(compute_s(plan, part) for part in halves(m))
    )
    at = heaviest.index
    return _numbered([*stages[:at], *halves(middle), *stages[at + 1 :]])


def _numbered(stages: list[Stage]) -> tuple[Stage, ...]:
    # What was found of a stage's memory is true among the stages it was found with.
    return tuple(replace(stage, index=i, workspace_bytes=None) for i, stage in enumerate(stages))


def _advice(tried: list[Variation], notes: list[StageNote]) -> list[str]:
    lines = [str(found) for found in tried if found.change <= -WORTH and found.fits][:3]
    lines += [note.text for note in notes if note.hidden_by is not None]
    return lines or [
        f"Nothing that was tried saves more than {100 * WORTH:.0f} % of the time per microbatch."
    ]


def _range(times: list[float]) -> str:
    low, high = seconds(min(times)), seconds(max(times))
    return low if low == high else f"{low} to {high}"


def _segments(plan: Plan, stage: Stage) -> str:
    first, last = plan.chain.segments[stage.first].name, plan.chain.segments[stage.last].name
    return first if first == last else f"{first} … {last}"
