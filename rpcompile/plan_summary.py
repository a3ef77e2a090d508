"""A plan as plain data, for `--json` and for reports: what its table says, and memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from rpcompile import stage_bytes
from rpcompile.ir import DOWN_STREAMS, UP_STREAMS, StageKind
from rpcompile.simulate_dispatch import stage_time

if TYPE_CHECKING:
    from rpcompile.ir import Hardware, Stage
    from rpcompile.plan import Plan


def summary(plan: Plan) -> dict[str, Any]:
    """Everything about a plan but its transfers; numbers in the units that the keys end with.

    Of GPUs that are not alike, `hardware` is the smallest and `gpu_hardware` has each. In mode "async",
    or with updates (`update_s_per_byte` above 0), `prediction.iteration_s` is the period of the steady
    state, and `actions` are those of one iteration alone, which takes `alone_s`; the next one is shifted
    by `rotate` GPUs.

    `source` says that the times are simulated. `stages[].upload_s` is one upload of the stage's weights at
    the link's full rate; `compute_s` is one microbatch, and so are the bytes of
    `activations.offloaded_attention`; `actions` is `rpcompile/action_table.py`'s table.
    """
    predicted, partition, chain = plan.prediction, plan.partition, plan.chain
    return {
        "source": "simulated",
        "id": plan.id,
        "model": plan.model_name,
        "fingerprint": plan.fingerprint,
        "dtype": plan.dtype,
        "policy": plan.schedule.policy,
        "mode": plan.mode,
        "gpus": plan.gpus,
        "microbatches": plan.microbatches,
        "sizes": plan.chain.bindings,
        "hardware": _hardware(chain.hardware),
        "gpu_hardware": [_hardware(chain.hardware_of(gpu)) for gpu in range(plan.gpus)]
        if chain.kinds
        else None,
        "links": msgspec.to_builtins(plan.links),
        "rotate": plan.schedule.rotate,
        "update_s_per_byte": plan.update_s_per_byte,
        "prediction": {
            "iteration_s": predicted.iteration_s,
            "tokens_per_s": predicted.tokens_per_s,
            "alone_s": predicted.alone_s,
            "bubble": predicted.bubble,
            "traffic": predicted.traffic,
            "gpu_peak_bytes": list(predicted.gpu_peak_bytes),
            "host_peak_bytes": predicted.host_peak_bytes,
            "host": msgspec.to_builtins(predicted.host),
        },
        "solver": {
            "name": partition.solver,
            "status": partition.status,
            "objective_s": partition.objective_s,
            "bound_s": partition.bound_s,
            "gap": partition.gap,
            "solve_s": partition.solve_s,
        },
        "activations": {
            "tiles": {segment.name: segment.tiles for segment in plan.chain.segments if segment.tiles > 1},
            "offloaded_attention": {
                plan.chain.segments[index].name: nbytes
                for stage in partition.stages
                if stage.kind is StageKind.B
                for index, nbytes in stage_bytes.kept_bytes(plan.chain, stage).items()
            },
            "why": plan.attention,
        },
        "stages": [_stage(plan, stage) for stage in partition.stages],
        "actions": msgspec.to_builtins(plan.actions()),
        "provenance": plan.provenance,
    }


def compute_s(plan: Plan, stage: Stage, gpu: int | None = None) -> float:
    """Seconds of one microbatch of a stage, by the chain.

    Args:
        plan: The plan.
        stage: One of its stages.
        gpu: Where; None for the mean over its microbatches, wherever they run.
    """
    if gpu is None and plan.chain.kinds:
        jobs = [job for job in plan.schedule.jobs if job.stage == stage.index]
        runs = sum(len(job.microbatches) for job in jobs)
        total_s = sum(len(job.microbatches) * compute_s(plan, stage, job.gpu) for job in jobs)
        return total_s / runs if runs else 0.0
    return stage_time(plan.chain, stage, gpu or 0).seconds


def upload_s(plan: Plan, stage: Stage) -> float:
    """Seconds of one upload of a stage's weights at the full rate of the slowest link that it takes."""
    weights = sum(stage_bytes.weight_bytes(plan.chain, stage.segments).values())
    gpus = {job.gpu for job in plan.schedule.jobs if job.stage == stage.index} or {0}
    return weights / min(plan.chain.hardware_of(gpu).h2d_bytes_per_s for gpu in gpus)


def upload_traffic(plan: Plan) -> tuple[int, int]:
    """Bytes that one iteration moves to the GPUs, and back."""
    up = sum(action.nbytes for action in plan.schedule.actions() if action.stream in UP_STREAMS)
    down = sum(action.nbytes for action in plan.schedule.actions() if action.stream in DOWN_STREAMS)
    return up, down


def _hardware(hardware: Hardware) -> dict[str, Any]:
    return {
        "name": hardware.name,
        "memory_bytes": hardware.memory_bytes,
        "usable_bytes": hardware.usable_bytes,
        "h2d_bytes_per_s": hardware.h2d_bytes_per_s,
        "d2h_bytes_per_s": hardware.d2h_bytes_per_s,
    }


def _stage(plan: Plan, stage: Stage) -> dict[str, Any]:
    segments = [plan.chain.segments[index].name for index in stage.segments]
    jobs = [job for job in plan.schedule.jobs if job.stage == stage.index]
    weights = sum(stage_bytes.weight_bytes(plan.chain, stage.segments).values())
    return {
        "index": stage.index,
        "kind": stage.kind.value,
        "first_segment": stage.first,
        "last_segment": stage.last,
        "segments": segments,
        "jobs": [
            {
                "index": job.index,
                "gpu": job.gpu,
                "round": job.round,
                "replica": job.replica,
                "microbatches": list(job.microbatches),
            }
            for job in jobs
        ],
        "weight_bytes": weights,
        "compute_s": compute_s(plan, stage),
        "upload_s": upload_s(plan, stage),
    }
