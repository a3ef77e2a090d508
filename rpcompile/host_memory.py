"""What training takes of the host's memory, part by part."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rpcompile import buffers, stage_bytes

if TYPE_CHECKING:
    from rpcompile.ir import Schedule, SegmentChain

_FLOAT32 = 4


@dataclass(frozen=True)
class HostMemory:
    """Bytes on the host by what they are for.

    In mode "async" two iterations are in flight, and what each has for itself is there twice: gradients,
    partial ones, boundaries, attention outputs and inputs.

    Attributes:
        weight_bytes: Parameters and buffers; a tied tensor once.
        gradient_bytes: Gradients of the trainable parameters.
        master_bytes: float32 copies of trainable parameters of a lower precision.
        optimizer_bytes: What the optimizer keeps, e.g. AdamW's two moments.
        boundary_bytes: Activations kept for recompute or handed from GPU to GPU, all microbatches' at once.
        input_bytes: The batch.
        copy_bytes: In mode "async", the trainable weights that either iteration computes with.
        attention_bytes: Attention outputs kept for the backward, all microbatches' at once.
        partial_bytes: Gradients of further jobs of a stage, or uses of a tied tensor, before they are added
            to those of the first.
    """

    weight_bytes: int
    gradient_bytes: int
    master_bytes: int
    optimizer_bytes: int
    boundary_bytes: int
    input_bytes: int
    copy_bytes: int = 0
    attention_bytes: int = 0
    partial_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        """All of it: the peak, at the optimizer's step."""
        parts = self.weight_bytes, self.gradient_bytes, self.master_bytes
        rest = self.optimizer_bytes, self.boundary_bytes, self.input_bytes, self.copy_bytes
        return sum(parts) + sum(rest) + self.attention_bytes + self.partial_bytes


def installed_bytes() -> int:
    """Memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def item_bytes(dtype: str, unknown: int) -> int:
    """Size of one element of one of torch's dtypes, by its name; `unknown` for other names.

    "given", as profiles have it, is none of them.
    """
    if dtype == "given":
        return unknown
    import torch  # takes seconds; plans are read and made from profiles without it

    kind = getattr(torch, dtype, None)
    return kind.itemsize if isinstance(kind, torch.dtype) else unknown


def host_memory(
    chain: SegmentChain,
    schedule: Schedule,
    dtype: str,
    *,
    masters: bool = False,
    optimizer_states: int = 2,
) -> HostMemory:
    """Adds up what one model and one schedule take.

    Left out: pinned staging copies, sums in another dtype, and whatever the program holds besides training.

    Args:
        chain: The segments.
        schedule: With its host buffers.
        dtype: Of most parameters, e.g. "bfloat16"; all that train are taken to be of it.
        masters: Whether the optimizer steps float32 copies of parameters whose dtype is smaller.
        optimizer_states: Tensors that the optimizer keeps for each parameter, of the parameter's shape and
            the dtype of what it steps: 2 for AdamW, 1 for SGD with momentum, 0 for SGD.
    """
    every = range(len(chain.segments))
    training = schedule.mode != "forward"
    in_flight = 2 if schedule.mode == "async" else 1
    gradients = sum(stage_bytes.gradient_bytes(chain, every).values()) if training else 0
    itemsize = item_bytes(dtype, _FLOAT32) if masters else _FLOAT32
    copies = gradients // itemsize * _FLOAT32 if itemsize < _FLOAT32 else 0
    host: Counter[str] = Counter()  # by kind
    for name, size in schedule.buffers.items():
        if name.startswith(buffers.HOST):
            host[buffers.kind_of(name)] += size
    return HostMemory(
        weight_bytes=sum(stage_bytes.weight_bytes(chain, every).values()),
        gradient_bytes=in_flight * gradients,
        master_bytes=copies,
        optimizer_bytes=optimizer_states * (copies or gradients),
        boundary_bytes=in_flight * (host["x"] + host["dx"]),
        input_bytes=in_flight * host["inputs"],
        # As large as the gradients, for they are of the same tensors and dtype.
        copy_bytes=in_flight * gradients if schedule.mode == "async" else 0,
        attention_bytes=in_flight * host["kept"],
        # Each job's gradients have memory of their own, which stays from iteration to iteration.
        partial_bytes=in_flight * max(0, host["gradients"] - gradients),
    )
