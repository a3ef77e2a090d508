"""What transfers and host work share, and what each action of a schedule takes of it."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from rpcompile.errors import InvalidArgument
from rpcompile.ir import DOWN_STREAMS, Stream

if TYPE_CHECKING:
    from rpcompile.hardware import HardwareFile
    from rpcompile.probe import HardwareProbe


@dataclass(frozen=True)
class SharedLinks:
    """Capacities that running transfers and host actions divide among themselves; None is no limit.

    The bytes of a transfer cross the link of its GPU, its PCIe root and host memory, once each; those of
    a host action are its traffic with host memory, all of whose bandwidth it uses if it names none. (How
    activations and weights share one direction of one link is not an option; see `rpcompile/simulate.py`.)
    Copies of activations, of their gradients and of inputs take what they need first; weight uploads,
    weight gradients and host work share the rest. Within either kind rates are max-min fair, and no
    transfer is faster than on an idle machine.

    Attributes:
        host_bytes_per_s: Host memory. The default is what a server with eight channels of DDR4-3200 has
            (204.8 GB/s), rounded down.
        both_ways_bytes_per_s: Both directions of one GPU's link together; what a probe measured both ways
            at once, summed.
        roots: GPUs behind each shared PCIe root; GPUs that are left out share none.
        root_bytes_per_s: One direction of a root.
    """

    host_bytes_per_s: float | None = 200e9
    both_ways_bytes_per_s: float | None = None
    roots: tuple[tuple[int, ...], ...] = ()
    root_bytes_per_s: float | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name != "roots" and value is not None and not 0 < value < math.inf:
                raise InvalidArgument(f"{field.name} is {value}; give a rate above 0, or None for no limit")
        members = [gpu for root in self.roots for gpu in root]
        if len(set(members)) < len(members):
            twice = next(gpu for gpu in members if members.count(gpu) > 1)
            raise InvalidArgument(f"GPU {twice} is behind more than one root; name each GPU once")
        if self.roots and self.root_bytes_per_s is None:
            raise InvalidArgument("roots are given without root_bytes_per_s, which they share")

    @classmethod
    def of(cls, found: HardwareProbe | HardwareFile) -> SharedLinks:
        """What a probe of this machine, or the file that it wrote, says; roots are not probed."""
        up, down = found.h2d_both_bytes_per_s, found.d2h_both_bytes_per_s
        both = None if up is None or down is None else up + down
        return cls(found.host_memory_bytes_per_s, both_ways_bytes_per_s=both)

    def capacities(self, gpus: int) -> list[float]:
        """Bytes per second of host memory, of each GPU's link both ways, and of each root up and down."""
        limits = [self.host_bytes_per_s, *[self.both_ways_bytes_per_s] * gpus]
        limits += [self.root_bytes_per_s] * (2 * len(self.roots))
        return [math.inf if limit is None else limit for limit in limits]

    def used_by(self, stream: Stream, gpu: int, gpus: int) -> tuple[int, int, int]:
        """The positions in `capacities` that a transfer or host action of `gpu` draws on, -1 for none."""
        if stream is Stream.HOST:
            return (0, -1, -1)
        for number, root in enumerate(self.roots):
            if gpu in root:
                return (0, 1 + gpu, 1 + gpus + 2 * number + (stream in DOWN_STREAMS))
        return (0, 1 + gpu, -1)
