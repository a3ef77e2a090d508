"""The part of `rpcompile/verify.py` that looks at what actions say, not at their order."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import TYPE_CHECKING, NamedTuple

from rpcompile import buffers, stage_bytes
from rpcompile.buffers import BufferName
from rpcompile.errors import ScheduleError
from rpcompile.ir import COMPUTE_OPS, DOWN_STREAMS, ActionId, Op, StageKind, Stream

if TYPE_CHECKING:
    from rpcompile.buffers import ParsedNames
    from rpcompile.ir import Action, Partition, Schedule, SegmentChain, Stage

_STREAMS = {
    Op.PREFETCH: Stream.WEIGHTS,
    **dict.fromkeys((Op.LOAD, Op.RECEIVE), Stream.H2D),
    **dict.fromkeys(COMPUTE_OPS, Stream.COMPUTE),
    **dict.fromkeys((Op.HANDOFF, Op.OFFLOAD), Stream.D2H),
    Op.GRADIENT: Stream.GRADIENTS,
    **dict.fromkeys((Op.SUM, Op.UPDATE), Stream.HOST),
}
_KINDS = {
    Op.FORWARD: StageKind.F,
    Op.RECOMPUTE: StageKind.B,
    Op.BACKWARD: StageKind.B,
    Op.FUSED: StageKind.FB,
}
# What each copy may carry: kind of the source -> kind of the target.
_CARRIES = {
    Op.PREFETCH: {("weights", "weights")},
    Op.LOAD: {("inputs", "inputs"), ("x", "x"), ("kept", "kept")},
    Op.RECEIVE: {("x", "x"), ("dx", "dx")},
    Op.HANDOFF: {("x", "x"), ("dx", "dx")},
    Op.OFFLOAD: {("x", "x"), ("kept", "kept"), ("loss", "loss"), ("weights", "state")},
    Op.GRADIENT: {("gradients", "gradients")},
}


def check_actions(schedule: Schedule, chain: SegmentChain, partition: Partition, names: ParsedNames) -> None:
    """Checks ids, queues, coverage, operands and copies.

    Raises:
        ScheduleError: A property does not hold; the message names the action and the property.
    """
    _check_queues(schedule, partition)
    _check_coverage(schedule, chain, partition)
    _check_recomputes(schedule)
    _check_operands(schedule, chain, partition, names)
    _check_copies(schedule, names)
    _check_sizes(schedule, chain, partition, names)


def _check_queues(schedule: Schedule, partition: Partition) -> None:
    """Ids, streams, jobs and spaces."""
    queues = Counter((queue.gpu, queue.stream) for queue in schedule.queues)
    ids = [action.id for action in schedule.actions()]
    repeated = {id: count for id, count in Counter(ids).items() if count > 1}
    for (gpu, stream), count in queues.items():
        if count > 1:
            raise ScheduleError(f"gpu{gpu} has {count} {stream} queues; it must have one")
        if not 0 <= gpu < schedule.gpus:
            raise ScheduleError(f"there is a queue of gpu{gpu}; the schedule has {schedule.gpus} GPUs")
    for position, job in enumerate(schedule.jobs):
        if job.index != position:
            raise ScheduleError(f"job {position} of the schedule is numbered {job.index}")
        if not 0 <= job.stage < len(partition.stages):
            raise ScheduleError(f"job {position}: the partition has no stage {job.stage}")
    microbatches = [frozenset(job.microbatches) for job in schedule.jobs]
    space_of = {buffer: buffers.space_of(buffer) for buffer in schedule.buffers}
    for queue in schedule.queues:
        spaces = (buffers.HOST, buffers.gpu(queue.gpu))
        for action in queue.actions:
            if action.id in repeated:
                raise ScheduleError(f"{action.id}: {repeated[action.id]} actions have this id")
            if not _says_what_it_is(action):
                raise ScheduleError(f"{action.id}: its stage, op, microbatch or job differ from its id")
            stream = _STREAMS.get(action.op, queue.stream)
            if (action.gpu, action.stream, stream) != (queue.gpu, queue.stream, queue.stream):
                raise ScheduleError(
                    f"{action.id} is queued on gpu{queue.gpu} {queue.stream}; "
                    f"it belongs on gpu{action.gpu} {stream}"
                )
            job = schedule.jobs[action.job] if 0 <= action.job < len(schedule.jobs) else None
            # What the host does is on behalf of a job of any GPU.
            gpu = job.gpu if job and action.stream is Stream.HOST else action.gpu
            if job is None or (job.stage, job.gpu) != (action.stage, gpu):
                raise ScheduleError(
                    f"{action.id}: no job {action.job} runs stage {action.stage} on gpu{action.gpu}"
                )
            if action.microbatch is not None and action.microbatch not in microbatches[job.index]:
                raise ScheduleError(f"{action.id}: job {job.index} has no microbatch {action.microbatch}")
            _check_names(action, space_of, spaces)


def _says_what_it_is(action: Action) -> bool:
    """Whether the id agrees with the fields; most do, and are not taken apart to see it."""
    usual = f"{action.stage}{action.op}{'' if action.microbatch is None else action.microbatch}"
    if action.id.startswith(usual):
        rest = action.id[len(usual) :]
        job, _, part = rest.partition(".")
        if job in ("", f"@{action.job}") and (part.isdecimal() or job == rest):
            return True
    said = ActionId.parse(action.id)
    fields = (action.stage, action.op, action.microbatch)
    return (said.stage, said.op, said.microbatch) == fields and said.job in (None, action.job)


def _check_names(action: Action, space_of: dict[str, str], spaces: tuple[str, str]) -> None:
    if bool(action.frees) != (action.op is Op.FREE) or (action.frees and (action.reads or action.writes)):
        raise ScheduleError(f"{action.id}: FREE, and nothing else, frees buffers; it does nothing more")
    if (action.workspace_bytes and action.op not in COMPUTE_OPS) or (
        action.nbytes and action.op not in _CARRIES
    ):
        raise ScheduleError(f"{action.id}: only copies move bytes, only compute actions have a workspace")
    for operands in (action.reads, action.writes, action.frees):
        if len(operands) > 1 and len(set(operands)) < len(operands):
            twice = next(buffer for buffer in operands if operands.count(buffer) > 1)
            raise ScheduleError(f"{action.id} names {twice} twice")
        for buffer in operands:
            space = space_of.get(buffer)
            if space is None:
                raise ScheduleError(f"{action.id} uses {buffer}, which has no size in the schedule's buffers")
            if space not in spaces:
                raise ScheduleError(f"{action.id} runs on gpu{action.gpu} and cannot reach {buffer}")


def _check_coverage(schedule: Schedule, chain: SegmentChain, partition: Partition) -> None:
    """One forward and at most one backward of everything, in the order of each job's microbatches."""
    forwards: dict[tuple[int, int], list[str]] = defaultdict(list)
    backwards: dict[tuple[int, int], list[str]] = defaultdict(list)
    positions: dict[int, list[Action]] = defaultdict(list)
    for action in schedule.actions():
        if action.op not in COMPUTE_OPS or action.microbatch is None:
            continue
        stage = partition.stages[action.stage]
        if _KINDS[action.op] is not stage.kind:
            raise ScheduleError(f"{action.id} runs stage {stage.index}, which is of kind {stage.kind}")
        if action.op is Op.RECOMPUTE:
            continue  # `_check_recomputes` counts them
        positions[action.job].append(action)
        for segment in stage.segments:
            if action.op is not Op.BACKWARD:
                forwards[segment, action.microbatch].append(action.id)
            if action.op is not Op.FORWARD:
                backwards[segment, action.microbatch].append(action.id)
    for index, segment in enumerate(chain.segments):
        needed = segment.needs_backward and schedule.mode != "forward"
        for microbatch in range(schedule.microbatches):
            for what, found, least in (("forward", forwards, 1), ("backward", backwards, int(needed))):
                names = found[index, microbatch]
                if not least <= len(names) <= 1:
                    raise ScheduleError(
                        f"segment {index}, microbatch {microbatch} has {len(names)} {what}s "
                        f"({', '.join(names) or 'no action'}); it must have one"
                    )
                if names and what == "backward" and schedule.mode == "forward":
                    raise ScheduleError(f"{names[0]} runs backward; in mode 'forward' nothing must")
    for job in schedule.jobs:
        runs = positions[job.index]
        for action, microbatch in zip(runs, job.microbatches, strict=False):
            if action.microbatch != microbatch:
                raise ScheduleError(f"{action.id} is out of order: job {job.index} runs {job.microbatches}")
        if len(runs) != len(job.microbatches):
            raise ScheduleError(f"job {job.index} runs {len(runs)} microbatches of {job.microbatches}")


def _check_recomputes(schedule: Schedule) -> None:
    """Right before every BACKWARD its RECOMPUTE, and no other: two tapes would need memory for two."""
    for queue in schedule.queues:
        before: Action | None = None
        for action in queue.actions:
            if action.op not in COMPUTE_OPS:
                continue
            if (before is not None and before.op is Op.RECOMPUTE) or action.op is Op.BACKWARD:
                _check_pair(before, action)
            before = action
        if before is not None and before.op is Op.RECOMPUTE:
            raise ScheduleError(f"{before.id} recomputes for no backward: nothing comes behind it")


def _check_pair(before: Action | None, action: Action) -> None:
    if action.op is not Op.BACKWARD:
        assert before is not None
        raise ScheduleError(f"{before.id} recomputes for no backward: {action.id} comes right behind it")
    recomputed = before is not None and before.op is Op.RECOMPUTE
    if before is None or not recomputed or (before.job, before.microbatch) != (action.job, action.microbatch):
        found = "nothing" if before is None else before.id
        own = ActionId(action.stage, Op.RECOMPUTE, action.microbatch)
        raise ScheduleError(f"right before {action.id} comes {found}; its recompute {own} must")


def _check_operands(
    schedule: Schedule, chain: SegmentChain, partition: Partition, names: ParsedNames
) -> None:
    """Compute actions read and write exactly what their segments call for."""
    workspaces = [*map(stage_bytes.Workspaces(chain).planned, partition.stages)]
    wanted: dict[tuple[int, Op], _Operands] = {}
    for action in schedule.actions():
        if action.op not in COMPUTE_OPS:
            continue
        stage, key = partition.stages[action.stage], (action.job, action.op)
        if key not in wanted:
            wanted[key] = _Operands.of(action, stage, chain, schedule.mode)
        reads, writes = wanted[key].at(action.microbatch)
        found_reads = [names[name] for name in action.reads]
        found_writes = [names[name] for name in action.writes]
        if stage.kind is StageKind.F:  # which of its boundaries are used, their readers say
            space, inside = buffers.gpu(action.gpu), stage.segments
            writes += [
                BufferName(space, "x", name.segment, action.job, action.microbatch)
                for name in found_writes
                if name.kind == "x" and name.segment in inside
            ]
        # Gradients are read to be added to; how often, the checks of their writers say.
        found_reads = [
            BufferName(*name[:3], None, name[4]) if name.kind in ("x", "dx") else name
            for name in found_reads
            if name.kind != "gradients" or name not in found_writes
        ]
        # A backward stage's workspace is a buffer, the tape, that stays between its two actions.
        needed = 0 if stage.kind is StageKind.B else workspaces[stage.index]
        if action.workspace_bytes != needed:
            raise ScheduleError(
                f"{action.id} has a workspace of {action.workspace_bytes:,} bytes; it needs {needed:,}"
            )
        for name in action.writes if action.op is Op.RECOMPUTE else ():
            if names[name].kind == "tape" and schedule.buffers[name] != workspaces[stage.index]:
                raise ScheduleError(
                    f"{action.id} leaves {name} of {schedule.buffers[name]:,} bytes; its stage needs "
                    f"{workspaces[stage.index]:,}"
                )
        _compare(action, "read", reads, found_reads)
        _compare(action, "write", writes, found_writes)


class _Operands(NamedTuple):
    """What a job's actions of one kind read and write; for what is of a microbatch, all but its number."""

    reads: list[BufferName]
    writes: list[BufferName]
    reads_each: list[tuple[str, str, int | None, int | None]]
    writes_each: list[tuple[str, str, int | None, int | None]]

    @classmethod
    def of(cls, action: Action, stage: Stage, chain: SegmentChain, mode: str) -> _Operands:
        """Those of one action, which is of the stage, and of all others of its kind and job."""
        space, job, op = buffers.gpu(action.gpu), action.job, action.op
        below = None if stage.first == 0 else chain.segments[stage.first - 1]
        found = cls([], [], [], [])
        for index in stage.segments:
            weights = BufferName(space, "weights", index, job)
            found.reads.extend([weights] if chain.segments[index].weight_bytes else [])
            if stage.kind is not StageKind.B and mode != "forward":
                found.writes.extend([weights] if chain.segments[index].state_bytes else [])
            if op in (Op.FUSED, Op.BACKWARD) and chain.segments[index].gradient_bytes:
                found.writes.append(BufferName(space, "gradients", index, job))
        if any(chain.segments[index].inputs for index in stage.segments):
            found.reads_each.append((space, "inputs", None, job))
        # A boundary may lie under the name of the job that made it here, or of this one.
        if below:
            found.reads_each.append((space, "x", stage.first - 1, None))
        kept = [(space, "kept", index, job) for index in stage_bytes.kept_bytes(chain, stage)]
        if stage.kind is StageKind.B:
            found.reads_each.extend(kept)
        elif mode != "forward":
            found.writes_each.extend(kept)
        if op is Op.RECOMPUTE:
            found.writes_each.append((space, "tape", None, job))
        if op is Op.BACKWARD:
            found.reads_each.extend([(space, "dx", stage.last, None), (space, "tape", None, job)])
        if below and below.needs_backward and op in (Op.FUSED, Op.BACKWARD):
            found.writes_each.append((space, "dx", stage.first - 1, job))
        if stage.last == len(chain.segments) - 1 and stage.kind is not StageKind.B:
            found.writes_each.append((space, "loss", None, None))
        return found

    def at(self, microbatch: int | None) -> tuple[list[BufferName], list[BufferName]]:
        """What is read and written of one microbatch."""
        reads = self.reads + [BufferName(*each, microbatch) for each in self.reads_each]
        return reads, self.writes + [BufferName(*each, microbatch) for each in self.writes_each]


def _compare(action: Action, verb: str, expected: list[BufferName], found: list[BufferName]) -> None:
    if expected == found:
        return
    missing, extra = Counter(expected) - Counter(found), Counter(found) - Counter(expected)
    for names, must in ((missing, "must"), (extra, "must not")):
        for name in names:
            details = zip(("segment", "job", "microbatch"), name[2:], strict=True)
            what = ", ".join(f"{field} {value}" for field, value in details if value is not None)
            raise ScheduleError(f"{action.id} {must} {verb} {name.space}:{name.kind} ({what})")


def _check_copies(schedule: Schedule, names: ParsedNames) -> None:
    """A copy takes the same thing from one side to the other, and all of it."""
    for action in schedule.actions():
        if action.op not in _CARRIES:
            continue
        if len(action.reads) != len(action.writes) or not action.reads:
            raise ScheduleError(f"{action.id} copies {len(action.reads)} buffers into {len(action.writes)}")
        spaces = (buffers.HOST, buffers.gpu(action.gpu))
        if action.stream in DOWN_STREAMS:
            spaces = spaces[::-1]
        for source, target in zip(action.reads, action.writes, strict=True):
            left, right = names[source], names[target]
            if (left.space, right.space) != spaces:
                raise ScheduleError(f"{action.id} copies {source} to {target} on the {action.stream} stream")
            if (left.kind, right.kind) not in _CARRIES[action.op]:
                raise ScheduleError(
                    f"{action.id} copies {source} to {target}; {action.op.name} does not do that"
                )
            # A gradient changes its name with its owner: it is received from the job that made it.
            passed_on = action.op is Op.RECEIVE and left.kind == "dx"
            same_job = left.job == right.job or None in (left.job, right.job) or passed_on
            if (left.segment, left.microbatch) != (right.segment, right.microbatch) or not same_job:
                raise ScheduleError(f"{action.id} copies {source} to {target}, which is something else")
            # Of the caller's inputs and the model's weights a job may take a part, of weights only
            # the changed buffers go back.
            whole = left.kind not in ("inputs", "weights")
            if whole and schedule.buffers[source] != schedule.buffers[target]:
                sizes = f"{schedule.buffers[source]:,} and {schedule.buffers[target]:,} bytes"
                raise ScheduleError(f"{action.id} copies {source} to {target}, which have {sizes}")
        nbytes = sum(schedule.buffers[target] for target in action.writes)
        if action.nbytes != nbytes:
            raise ScheduleError(f"{action.id} moves {action.nbytes:,} bytes; what it writes has {nbytes:,}")


def _check_sizes(schedule: Schedule, chain: SegmentChain, partition: Partition, names: ParsedNames) -> None:
    """Buffers are as large as what they hold, for memory is proved from their sizes."""
    segments = chain.segments
    of_segment = {
        "x": [segment.boundary_bytes for segment in segments],
        "dx": [segment.boundary_gradient_bytes for segment in segments],
        "kept": [segment.kept_bytes for segment in segments],
        "state": [segment.state_bytes for segment in segments],
    }
    # By stage; at the end, what the host has of all segments.
    ranges = [*(stage.segments for stage in partition.stages), range(len(segments))]
    of_stage = {
        "weights": [stage_bytes.weight_bytes(chain, indices) for indices in ranges],
        "gradients": [stage_bytes.gradient_bytes(chain, indices) for indices in ranges],
    }
    inputs = [sum(segments[index].input_bytes for index in indices) for indices in ranges]
    stages = {job.index: job.stage for job in schedule.jobs}
    for buffer, nbytes in schedule.buffers.items():
        name = names[buffer]
        stage = -1 if name.job is None else stages.get(name.job, -1)
        wanted: int | None = None
        if name.kind in of_segment and name.segment is not None and name.segment < len(segments):
            wanted = of_segment[name.kind][name.segment]
        elif name.kind in of_stage and name.segment is not None:
            wanted = of_stage[name.kind][stage].get(name.segment)
        elif name.kind == "inputs":
            wanted = inputs[stage]
        if wanted is not None and nbytes != wanted:
            users = [a for a in schedule.actions() if buffer in (*a.writes, *a.reads, *a.frees)]
            users.sort(key=lambda action: buffer not in action.writes)
            user = users[0].id if users else "no action"
            raise ScheduleError(f"{user} uses {buffer} of {nbytes:,} bytes; what it holds has {wanted:,}")
