"""What pipelines whose GPUs hold on to their stages have in common: placement, jobs and orders.

Virtual stage v of S runs its forward and its backward on GPU v mod N.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rpcompile.errors import PartitionError, require_at_least
from rpcompile.ir import Dispatch, Job, StageKind

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from rpcompile.ir import Partition

Step = tuple[str, int, int]  # "F" or "B", virtual stage, microbatch


def dispatch_pipeline(
    policy: str,
    partition: Partition,
    gpus: int,
    microbatches: int,
    *,
    chunks: int | None,
    steps: Callable[[int, int], Iterable[Step]],
) -> Dispatch:
    """The dispatch of a pipeline.

    Args:
        policy: Its name.
        partition: Forward stages, then their mirror image as backward stages. The last of the forward
            stages may be fused; then it has no backward stage.
        gpus: N.
        microbatches: M.
        chunks: Virtual stages that each GPU must have; None for any number from 1.
        steps: From (GPU, its number of virtual stages) to the order of what it runs.

    Raises:
        InvalidArgument: `gpus` or `microbatches` is below 1.
        PartitionError: The stages are no mirror image, or do not divide over the GPUs as they must.
    """
    require_at_least(1, gpus=gpus, microbatches=microbatches)
    up = [stage for stage in partition.stages if stage.kind is not StageKind.B]
    down = partition.stages[len(up) :]
    fused = bool(up) and up[-1].kind is StageKind.FB
    mirrored = [(s.first, s.last) for s in reversed(up[:-1] if fused else up)]
    if [(s.first, s.last) for s in down] != mirrored:
        raise PartitionError(
            f"{policy} needs backward stages that mirror the forward stages, for each GPU keeps its stages; "
            "use partition-pipeline"
        )
    count, per_gpu = len(up), len(up) // gpus
    if count % gpus or not count or (chunks is not None and per_gpu != chunks):
        wanted = f"a multiple of {gpus}" if chunks is None else str(chunks * gpus)
        raise PartitionError(
            f"{policy} on {gpus} GPUs needs {wanted} forward stages, the partition has {count}; "
            "use partition-pipeline"
        )
    all_microbatches = tuple(range(microbatches))
    jobs = tuple(
        Job(stage.index, stage.index, 0, 0, all_microbatches, _virtual(stage.index, count, fused) % gpus)
        for stage in partition.stages
    )
    order: list[tuple[tuple[int, int], ...]] = []
    for gpu in range(gpus):
        found: list[tuple[int, int]] = []
        for kind, virtual, microbatch in steps(gpu, per_gpu):
            if kind == "F":
                found.append((virtual, microbatch))
            elif not (fused and virtual == count - 1):
                found.append((2 * count - 1 - fused - virtual, microbatch))
        order.append(tuple(found))
    return Dispatch(policy, gpus, microbatches, jobs, tuple(order))


def _virtual(stage: int, count: int, fused: bool) -> int:
    """The virtual stage whose forward or backward a stage is."""
    return stage if stage < count else 2 * count - 1 - fused - stage


def one_forward_one_backward(forward: list[Step], backward: list[Step], warm_up: int) -> list[Step]:
    """`warm_up` forwards, then one forward and one backward in turn, then the backwards that are left."""
    warm_up = min(warm_up, len(forward))
    steady = [step for pair in zip(forward[warm_up:], backward, strict=False) for step in pair]
    return [*forward[:warm_up], *steady, *backward[len(forward) - warm_up :]]
