"""Boxes of GPUs that are not all alike: who is what, and what segments take on each kind."""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from rpcompile import hardware as catalogue
from rpcompile.errors import InvalidArgument
from rpcompile.ir import GpuKind, Hardware

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rpcompile.ir import SegmentChain
    from rpcompile.shared_links import SharedLinks

_PART = re.compile(r"(?:(?P<count>\d+)x)?(?P<name>[^@]+?)(?:@(?P<speed>[^@]+))?")


@dataclass(frozen=True)
class Box:
    """The GPUs of a plan, in order.

    Attributes:
        gpus: What each is.
        speeds: Compute speed of each relative to the GPU that given seconds are for; None: not said.
        links: What their transfers share, as far as hardware files say.
    """

    gpus: tuple[Hardware, ...]
    speeds: tuple[float | None, ...]
    links: SharedLinks | None = None

    @classmethod
    def of(cls, gpus: Sequence[str | Hardware]) -> Box:
        """Of catalogue names, hardware files and `Hardware`, one for each GPU.

        Raises:
            InvalidArgument: There are none, or a GPU is unknown.
        """
        if isinstance(gpus, str) or not gpus:
            raise InvalidArgument(f"gpus={gpus!r}; give a number, or a list with one name for each GPU")
        found = tuple(catalogue.lookup(gpu) if isinstance(gpu, str) else gpu for gpu in gpus)
        links = catalogue.shared_links(gpu for gpu in gpus if isinstance(gpu, str))
        return cls(found, (None,) * len(found), links)

    @classmethod
    def parse(cls, text: str) -> Box:
        """Of a text such as `2xrtx4090,rtx3090@0.45`: counts, names, and speeds where they are stated.

        Raises:
            InvalidArgument: It has another form, a number is out of range, or a GPU is unknown.
        """
        gpus: list[str] = []
        speeds: list[float | None] = []
        for part in text.split(","):
            match = _PART.fullmatch(part.strip())
            if match is None:
                raise InvalidArgument(f"--gpu {text!r}: {part!r} is no GPU; write e.g. 2xrtx4090,rtx3090")
            count = int(match["count"] or 1)
            if not 1 <= count <= 64:
                raise InvalidArgument(f"--gpu {text!r}: {part!r} counts {count} GPUs; give 1 to 64")
            gpus += [match["name"]] * count
            speeds += [_speed(match["speed"], text)] * count
        return replace(cls.of(gpus), speeds=tuple(speeds))

    @property
    def kinds(self) -> list[Hardware]:
        """The different ones."""
        found: list[Hardware] = []
        for gpu in self.gpus:
            if gpu not in found:
                found.append(gpu)
        return found

    @property
    def smallest(self) -> Hardware:
        """The one with the least usable memory, in which segments have to fit."""
        return min(self.kinds, key=lambda hardware: hardware.usable_bytes)


def _speed(text: str | None, whole: str) -> float | None:
    if text is None:
        return None
    try:
        speed = float(text)
    except ValueError:
        speed = math.nan
    if not 0 < speed < math.inf:
        raise InvalidArgument(f"--gpu {whole!r}: the speed {text!r} must be a finite number above 0")
    return speed


def with_ratios(
    chain: SegmentChain, box: Box, ratios: Sequence[tuple[Sequence[float], Sequence[float]]]
) -> SegmentChain:
    """A chain on a box of GPUs.

    Args:
        chain: Its seconds are on some GPU.
        box: The GPUs.
        ratios: For each of `box.kinds`, what the forward and the backward of each segment take on it,
            relative to the chain's seconds.
    """
    segments, kinds = chain.segments, box.kinds
    found = tuple(
        GpuKind(
            hardware,
            tuple(s.forward_s * ratio for s, ratio in zip(segments, forward, strict=True)),
            tuple(s.backward_s * ratio for s, ratio in zip(segments, backward, strict=True)),
        )
        for hardware, (forward, backward) in zip(kinds, ratios, strict=True)
    )
    reference = kinds.index(box.smallest)
    own = found[reference]
    priced = tuple(
        replace(segment, forward_s=forward_s, backward_s=backward_s)
        for segment, forward_s, backward_s in zip(segments, own.forward_s, own.backward_s, strict=True)
    )
    chain = replace(chain, segments=priced, hardware=own.hardware, kinds=(), kind_of=())
    if len(kinds) == 1:
        return chain
    return replace(chain, kinds=found, kind_of=tuple(kinds.index(gpu) for gpu in box.gpus))


def with_speeds(chain: SegmentChain, box: Box) -> SegmentChain:
    """A chain of given seconds on a box of GPUs whose speed is stated.

    GPUs of the kind that the seconds are for have speed 1; so has one other kind alone, whose speed is not
    stated: then only its memory and link count.

    Raises:
        InvalidArgument: A speed is missing, or GPUs of one kind have several.
    """
    kinds, named = box.kinds, chain.hardware.name
    ratios: list[tuple[list[float], list[float]]] = []
    for hardware in kinds:
        stated = {speed for gpu, speed in zip(box.gpus, box.speeds, strict=True) if gpu == hardware}
        if len(stated) > 1:
            raise InvalidArgument(f"the GPUs {hardware.name} have several speeds: {stated}; give them one")
        (speed,) = stated
        if speed is None and hardware.name != named and len(kinds) > 1:
            raise InvalidArgument(
                f"the seconds are given for {named}; say how fast {hardware.name} is beside it, e.g. "
                f"{hardware.name}@0.5 for half as fast"
            )
        ratio = [1 / (speed or 1.0)] * len(chain.segments)
        ratios.append((ratio, ratio))
    return with_ratios(chain, box, ratios)


def box_of(chain: SegmentChain, gpus: int) -> Box:
    """The GPUs that a chain was priced for."""
    return Box(tuple(chain.hardware_of(gpu) for gpu in range(gpus)), (None,) * gpus)


def box_text(chain: SegmentChain, gpus: int) -> str:
    """E.g. `2 x rtx4090 24 GiB + 1 x rtx3090 24 GiB`."""
    every = (chain.hardware_of(gpu) for gpu in range(gpus))
    counts = Counter(f"{gpu.name} {gpu.memory_bytes / 2**30:.0f} GiB" for gpu in every)
    return " + ".join(f"{count} x {name}" for name, count in counts.items())
