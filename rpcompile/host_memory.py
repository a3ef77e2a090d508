"""What training takes of the host's memory, part by part."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rpcompile import buffers

if TYPE_CHECKING:
    from collections.abc import Iterable

    from rpcompile.ir import Schedule, TensorSpec

_FLOAT32 = 4


@dataclass(frozen=True)
class HostMemory:
    """Bytes on the host by what they are for.

    Attributes:
        weight_bytes: Parameters and buffers; a tied tensor once.
        gradient_bytes: Gradients of the trainable parameters.
        master_bytes: float32 copies of trainable parameters of a lower precision.
        optimizer_bytes: What the optimizer keeps, e.g. AdamW's two moments.
        boundary_bytes: Activations kept for recompute or handed from GPU to GPU, all microbatches' at once.
        input_bytes: The batch.
    """

    weight_bytes: int
    gradient_bytes: int
    master_bytes: int
    optimizer_bytes: int
    boundary_bytes: int
    input_bytes: int

    @property
    def total_bytes(self) -> int:
        """All of it: the peak, at the optimizer's step."""
        parts = self.weight_bytes, self.gradient_bytes, self.master_bytes
        return sum(parts) + self.optimizer_bytes + self.boundary_bytes + self.input_bytes


def host_memory(
    parameters: Iterable[TensorSpec],
    others: Iterable[TensorSpec],
    schedule: Schedule,
    *,
    masters: bool = False,
    optimizer_states: int = 2,
) -> HostMemory:
    """Adds up what one model and one schedule take.

    Left out: partial gradients of replicated stages before they are summed, pinned staging copies, and
    whatever the program holds besides training.

    Args:
        parameters: The model's parameters that its graph reads.
        others: Its buffers.
        schedule: With its host buffers.
        masters: Whether the optimizer steps float32 copies of parameters whose dtype is smaller.
        optimizer_states: Tensors that the optimizer keeps for each parameter, of the parameter's shape and
            the dtype of what it steps: 2 for AdamW, 1 for SGD with momentum, 0 for SGD.
    """
    distinct = {spec.name: spec for spec in parameters}.values()
    trainable = [spec for spec in distinct if spec.trainable] if schedule.mode != "forward" else []
    elements = [(math.prod(spec.shape), spec.nbytes) for spec in trainable]
    low = [count for count, nbytes in elements if masters and nbytes < _FLOAT32 * count]
    stepped = sum(nbytes for count, nbytes in elements if not masters or nbytes >= _FLOAT32 * count)
    host = {buffers.parse(name): size for name, size in schedule.buffers.items() if name.startswith("host:")}
    weights = {spec.name: spec.nbytes for spec in others} | {spec.name: spec.nbytes for spec in distinct}
    return HostMemory(
        weight_bytes=sum(weights.values()),
        gradient_bytes=sum(spec.nbytes for spec in trainable),
        master_bytes=_FLOAT32 * sum(low),
        optimizer_bytes=optimizer_states * (_FLOAT32 * sum(low) + stepped),
        boundary_bytes=sum(size for name, size in host.items() if name.kind in ("x", "dx")),
        input_bytes=sum(size for name, size in host.items() if name.kind == "inputs"),
    )
