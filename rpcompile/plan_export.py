"""A plan's schedule in other forms: readable Python, and the action table of torch.distributed.pipelining."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rpcompile.errors import InvalidArgument
from rpcompile.ir import Op, Stage, StageKind
from rpcompile.units import seconds, size
from rpcompile.variations import dispatch_of

if TYPE_CHECKING:
    from rpcompile.ir import Action
    from rpcompile.plan import Plan

_REMEDY = (
    "Use the plan under policy gpipe, 1f1b, interleaved_1f1b or looped_bfs (`export --policy`, "
    "`rpcompile.policies.under_policy`)"
)


def schedule_python(plan: Plan) -> str:
    """The instructions of each GPU as a function of its worker, in the order they are predicted to start.

    It is what the program does, readable and runnable against any object with these methods; comments say
    when each instruction starts and what it moves (simulated).
    """
    timeline = plan.simulate()
    merged: list[list[Action]] = [[] for _ in range(plan.gpus)]
    for action in sorted(plan.schedule.actions(), key=lambda action: timeline.start_s[action.id]):
        merged[action.gpu].append(action)
    parts = [
        f'"""Plan {plan.id}: {plan.model_name}, {plan.microbatches} microbatches on {plan.gpus} GPUs."""\n'
    ]
    for gpu, actions in enumerate(merged):
        lines = [f"def gpu{gpu}(gpu):"]
        for action in actions:
            lines += [f"    gpu.wait({action.stream.value!r}, {event!r})" for event in action.waits]
            starts = seconds(timeline.start_s[action.id])
            moved = f", {size(action.nbytes)}" if action.nbytes else ""
            lines.append(f"    gpu.{action.op.name.lower()}({_arguments(action)})  # at {starts}{moved}")
            lines += [f"    gpu.record({action.stream.value!r}, {event!r})" for event in action.records]
        parts.append("\n".join([*lines, *(["    pass"] if len(lines) == 1 else [])]) + "\n")
    return "\n\n".join(parts)


def _arguments(action: Action) -> str:
    if action.op is Op.FREE:
        return f"{action.id!r}, stream={action.stream.value!r}, buffers={action.frees!r}"
    microbatch = "" if action.microbatch is None else f"microbatch={action.microbatch}, "
    return (
        f"{action.id!r}, stage={action.stage}, {microbatch}reads={action.reads!r}, writes={action.writes!r}"
    )


def actions_csv(plan: Plan) -> str:
    """A row a GPU of actions like `2F0,2B0`, for `_load_csv` of torch's pipeline schedules.

    There a stage stays on one GPU and keeps its activations, so a stage's forward and backward must have
    the same segments and the same GPU, as those of gpipe, 1f1b, interleaved_1f1b and looped_bfs plans. Its
    recompute is then not needed. A fused stage is a forward and a backward.

    Raises:
        InvalidArgument: A stage's forward and backward differ, or it has jobs on several GPUs.
    """
    numbers = _pipeline_stages(plan)
    gpus: dict[int, set[int]] = {}
    for job in plan.schedule.jobs:
        gpus.setdefault(numbers[job.stage], set()).add(job.gpu)
    for number, found in gpus.items():
        if len(found) > 1:
            raise InvalidArgument(
                f"policy {plan.schedule.policy!r}: pipeline stage {number} is on GPUs {sorted(found)}; "
                f"torch.distributed.pipelining keeps a stage on one. {_REMEDY}"
            )
    jobs, stages = plan.schedule.jobs, plan.partition.stages
    texts = {StageKind.F: ("F",), StageKind.B: ("B",), StageKind.FB: ("F", "B")}
    rows = [
        ",".join(
            f"{numbers[jobs[job].stage]}{letter}{microbatch}"
            for job, microbatch in order
            for letter in texts[stages[jobs[job].stage].kind]
        )
        for order in dispatch_of(plan.schedule).order
    ]
    return "\n".join(rows) + "\n"


def _pipeline_stages(plan: Plan) -> dict[int, int]:
    """Number of the pipeline stage that each stage is the forward or the backward of."""
    stages = plan.partition.stages
    forward = [stage for stage in stages if stage.kind is not StageKind.B]
    numbers = {stage.index: number for number, stage in enumerate(forward)}
    ranges = {(stage.first, stage.last): numbers[stage.index] for stage in forward}
    for stage in stages:
        if stage.kind is not StageKind.B:
            continue
        if (stage.first, stage.last) not in ranges:
            raise InvalidArgument(_cut_apart(plan, stage))
        numbers[stage.index] = ranges[stage.first, stage.last]
    return numbers


def _cut_apart(plan: Plan, stage: Stage) -> str:
    return (
        f"policy {plan.schedule.policy!r}: backward stage {stage.index} has segments {stage.first}.."
        f"{stage.last} and no forward stage has the same; torch.distributed.pipelining cuts both alike. "
        f"{_REMEDY}"
    )
