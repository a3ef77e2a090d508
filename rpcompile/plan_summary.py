"""A plan as plain data, for `--json` and for reports: what its table says, and memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from rpcompile import stage_bytes
from rpcompile.ir import DOWN_STREAMS, UP_STREAMS, StageKind

if TYPE_CHECKING:
    from rpcompile.ir import Stage
    from rpcompile.plan import Plan


def summary(plan: Plan) -> dict[str, Any]:
    """Everything about a plan but its transfers; numbers in the units that the keys end with.

    `source` says that the times are simulated. `stages[].upload_s` is one upload of the stage's weights at
    the link's full rate; `compute_s` is one microbatch; `actions` is `rpcompile/action_table.py`'s table.
    """
    predicted, partition, hardware = plan.prediction, plan.partition, plan.chain.hardware
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
        "hardware": {
            "name": hardware.name,
            "memory_bytes": hardware.memory_bytes,
            "usable_bytes": hardware.usable_bytes,
            "h2d_bytes_per_s": hardware.h2d_bytes_per_s,
            "d2h_bytes_per_s": hardware.d2h_bytes_per_s,
        },
        "prediction": {
            "iteration_s": predicted.iteration_s,
            "tokens_per_s": predicted.tokens_per_s,
            "bubble": predicted.bubble,
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
        "stages": [_stage(plan, stage) for stage in partition.stages],
        "actions": msgspec.to_builtins(plan.actions()),
        "provenance": plan.provenance,
    }


def compute_s(plan: Plan, stage: Stage) -> float:
    """Seconds of one microbatch of a stage, by the chain."""
    segments = [plan.chain.segments[index] for index in stage.segments]
    backward_s = sum(segment.backward_s for segment in segments)
    return sum(segment.forward_s for segment in segments) + (0.0 if stage.kind is StageKind.F else backward_s)


def upload_traffic(plan: Plan) -> tuple[int, int]:
    """Bytes that one iteration moves to the GPUs, and back."""
    up = sum(action.nbytes for action in plan.schedule.actions() if action.stream in UP_STREAMS)
    down = sum(action.nbytes for action in plan.schedule.actions() if action.stream in DOWN_STREAMS)
    return up, down


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
        "upload_s": weights / plan.chain.hardware.h2d_bytes_per_s,
    }
