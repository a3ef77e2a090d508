"""What a dispatch takes, straight from the definitions; and the least any can take, by CP-SAT."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ortools.sat.python import cp_model

from rpcompile.ir import StageKind
from tests.partition_oracle import all_partitions

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rpcompile.ir import Dispatch, Partition, SegmentChain
    from tests.partition_oracle import Spans


def play_by_definition(
    chain: SegmentChain, partition: Partition, dispatch: Dispatch, speed: Sequence[float]
) -> float:
    """Seconds of one iteration; host bandwidth has no end and nothing is loaded but weights.

    Each rule of `rpcompile.dispatch_time` as a function that looks up what it needs, in whatever order.
    """
    hardware, segments = chain.hardware, chain.segments
    jobs_on = [[job for job in dispatch.jobs if job.gpu == gpu] for gpu in range(dispatch.gpus)]
    job_of = {(job.stage, m): job for job in dispatch.jobs for m in job.microbatches}

    def inside(job_index: int):
        stage = partition.stages[dispatch.jobs[job_index].stage]
        return stage.kind, [segments[index] for index in stage.segments]

    def compute_s(job_index: int) -> float:
        kind, own = inside(job_index)
        total = sum(s.forward_s + (s.backward_s if kind is not StageKind.F else 0.0) for s in own)
        return total / speed[dispatch.jobs[job_index].gpu]

    def gradient_bytes(job_index: int) -> int:
        kind, own = inside(job_index)
        return 0 if kind is StageKind.F else sum(s.gradient_bytes for s in own)

    def before(job_index: int, gradients: bool) -> list[int]:
        """Jobs before this one on its GPU, the last one first."""
        found = [job.index for job in jobs_on[dispatch.jobs[job_index].gpu] if job.index < job_index]
        return [index for index in reversed(found) if not gradients or gradient_bytes(index)]

    known: dict[tuple[str, int], float] = {}

    def once(kind: str, job_index: int, value) -> float:
        if (kind, job_index) not in known:
            known[kind, job_index] = value()
        return known[kind, job_index]

    def uploaded(job_index: int) -> float:
        def value() -> float:
            nbytes = sum(s.weight_bytes for s in inside(job_index)[1])
            earlier = [k for k in before(job_index, False) if sum(s.weight_bytes for s in inside(k)[1])]
            begin = max(
                [0.0]
                + [uploaded(k) for k in earlier[:1]]
                + [end(k, dispatch.jobs[k].microbatches[-1]) for k in before(job_index, False)[1:2]]
            )
            return begin + hardware.latency_s + nbytes / hardware.h2d_bytes_per_s if nbytes else 0.0

        return once("uploaded", job_index, value)

    def sent(job_index: int) -> float:
        def value() -> float:
            last = end(job_index, dispatch.jobs[job_index].microbatches[-1])
            begin = max([last] + [sent(k) for k in before(job_index, True)[:1]])
            return begin + hardware.latency_s + gradient_bytes(job_index) / hardware.d2h_bytes_per_s

        return once("sent", job_index, value)

    def end(job_index: int, microbatch: int) -> float:
        job = dispatch.jobs[job_index]

        def value() -> float:
            position = job.microbatches.index(microbatch)
            waits = [uploaded(job_index)]
            if position:
                waits.append(end(job_index, job.microbatches[position - 1]))
            else:
                waits += [end(k, dispatch.jobs[k].microbatches[-1]) for k in before(job_index, False)[:1]]
            if gradient_bytes(job_index):
                waits += [sent(k) for k in before(job_index, True)[1:2]]
            if job.stage:
                source = job_of[job.stage - 1, microbatch]
                kind, _ = inside(job_index)
                stage = partition.stages[job.stage]
                below, behind = stage.first - 1, stage.last
                nbytes = segments[behind].boundary_gradient_bytes
                if kind is not StageKind.B:
                    nbytes = segments[below].boundary_bytes
                hop = nbytes / hardware.d2h_bytes_per_s + nbytes / hardware.h2d_bytes_per_s
                hop += 2 * hardware.latency_s
                arrives = end(source.index, microbatch)
                if source.gpu != job.gpu:
                    arrives += hop
                if kind is StageKind.B:
                    # The recompute is over when it is, or when the gradient comes, if that is later.
                    arrives -= sum(s.forward_s for s in inside(job_index)[1]) / speed[job.gpu]
                    if stage.first:
                        maker = next(s.index for s in partition.stages if s.last >= below)
                        nbytes = segments[below].boundary_bytes
                        up_down = nbytes / hardware.d2h_bytes_per_s + nbytes / hardware.h2d_bytes_per_s
                        made = end(job_of[maker, microbatch].index, microbatch)
                        waits.append(made + up_down + 2 * hardware.latency_s)
                waits.append(arrives)
            return max(waits) + compute_s(job_index)

        return once(f"end {microbatch}", job_index, value)

    ends = [end(job.index, job.microbatches[-1]) for job in dispatch.jobs]
    return max(ends + [sent(job.index) for job in dispatch.jobs if gradient_bytes(job.index)])


def least_makespan(chain: SegmentChain, gpus: int, microbatches: int) -> float:
    """The least of any partition, assignment and order of computing, in whole seconds, without weights."""
    return min(_least(chain, spans, gpus, microbatches) for spans in all_partitions(chain, "sync"))


def _least(chain: SegmentChain, spans: Spans, gpus: int, microbatches: int) -> float:
    model, segments = cp_model.CpModel(), chain.segments
    horizon = microbatches * int(sum(2 * s.forward_s + s.backward_s + 4 * s.boundary_bytes for s in segments))
    makespan = model.new_int_var(0, horizon, "makespan")
    rows: list[list[cp_model.IntervalVar]] = [[] for _ in range(gpus)]
    for _ in range(microbatches):
        last = None
        made: list[tuple[int, cp_model.LinearExpr]] = []  # last segment of a forward stage, its end
        for kind, first, final in spans:
            own = segments[first : final + 1]
            seconds = int(sum(s.forward_s + (s.backward_s if kind is not StageKind.F else 0) for s in own))
            start, on = model.new_int_var(0, horizon, ""), [model.new_bool_var("") for _ in range(gpus)]
            model.add_exactly_one(on)
            for gpu in range(gpus):
                rows[gpu].append(model.new_optional_fixed_size_interval_var(start, seconds, on[gpu], ""))
            ahead = 0
            if kind is StageKind.B:
                # A gap between recompute and the rest of a backward may as well lie before it.
                ahead = int(sum(s.forward_s for s in own))
                if first:
                    saved = next(end for behind, end in made if behind >= first - 1)
                    model.add(start >= saved + 2 * segments[first - 1].boundary_bytes)
            made.append((final, start + seconds))
            if last is not None:
                crossing = segments[first - 1].boundary_bytes if kind is not StageKind.B else 0
                hop = 2 * (segments[final].boundary_gradient_bytes if kind is StageKind.B else crossing)
                for gpu in range(gpus):
                    model.add(start >= last[0] + hop - ahead).only_enforce_if(on[gpu], ~last[1][gpu])
                model.add(start >= last[0] - ahead)
            last = (start + seconds, on)
        assert last is not None
        model.add(makespan >= last[0])
    for row in rows:
        model.add_no_overlap(row)
    model.minimize(makespan)
    solver = cp_model.CpSolver()
    solver.parameters.num_workers = 1
    assert solver.solve(model) == cp_model.OPTIMAL
    return solver.objective_value
