"""Divides a chain as somebody says: a list of how many segments each stage has."""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

from rpcompile.errors import InvalidArgument, PartitionError
from rpcompile.ir import Partition, Stage, StageKind

if TYPE_CHECKING:
    from rpcompile.ir import SegmentChain

_FORM = re.compile(r"\d+(,\d+)*(\|\d+(,\d+)*)?")


@dataclass(frozen=True)
class PartitionAsGiven:
    """SegmentChain -> Partition.

    The chain's last segment (the head with its loss) belongs to the stage where forward turns into
    backward; it may be left out of the counts, as published ones do. Before -> after, seven segments::

        3,3        ->  F0-2 F3-6 B3-6 B0-2          a pipeline's forward stages; backward mirrors them
        3,3        ->  F0-2 FB3-6 B0-2              the same with `fused`
        4|2,2,2    ->  F0-3 FB4-6 B2-3 B0-1         forward stages | fused stage, then backward stages

    Attributes:
        counts: The text.
        fused: Let a pipeline's last stage run forward and backward at once, as a schedule must have it
            that is to run. Published pipelines do not.
    """

    counts: str
    fused: bool = False

    name = "partition-as-given"

    def run(self, chain: SegmentChain) -> Partition:
        """Divides the chain.

        Raises:
            InvalidArgument: `counts` has another form.
            PartitionError: The counts do not add up to the chain, or a stage is left without a segment.
        """
        if _FORM.fullmatch(self.counts) is None:
            raise InvalidArgument(
                f"partition {self.counts!r} is no list of counts; write e.g. 3,3,4,2 for a pipeline, or "
                "7,7,7,7|0,3,3,3 for forward stages | fused and backward stages"
            )
        up, *rest = ([int(count) for count in part.split(",")] for part in self.counts.split("|"))
        tail, *down = rest[0] if rest else [0]
        layers = len(chain.segments) - 1
        if sum(up) + tail == layers + 1:  # counted with the head
            up, tail = (up, tail - 1) if tail else ([*up[:-1], up[-1] - 1], tail)
        checks = [(sum(up) + tail, "forward and fused stages", layers)]
        if rest:
            checks.append((sum(down) + tail, "fused and backward stages", layers - chain.first_backward))
        for found, what, wanted in checks:
            if found != wanted:
                raise PartitionError(
                    f"the {what} of {self.counts!r} have {found} segments; besides the last one, the chain "
                    f"has {wanted} for them"
                )
        stages = self._apart(up, tail, down, layers) if rest else self._mirrored(up)
        for stage in stages:
            if stage.last < stage.first:
                raise PartitionError(f"stage {stage.index} ({stage.kind}) of {self.counts!r} has no segment")
        return Partition(stages, chain.hardware.usable_bytes, 0.0, 0.0, "FEASIBLE", 0.0, self.name)

    def _apart(self, up: list[int], tail: int, down: list[int], layers: int) -> tuple[Stage, ...]:
        forward = [(StageKind.F, a, b - 1) for a, b in pairwise(accumulate(up, initial=0))]
        backward = [
            (StageKind.B, layers - tail - b, layers - tail - a - 1)
            for a, b in pairwise(accumulate(down, initial=0))
        ]
        found = [*forward, (StageKind.FB, layers - tail, layers), *backward]
        return tuple(Stage(index, *stage) for index, stage in enumerate(found))

    def _mirrored(self, up: list[int]) -> tuple[Stage, ...]:
        spans = [(a, b - 1) for a, b in pairwise(accumulate([*up[:-1], up[-1] + 1], initial=0))]
        found = [(StageKind.F, *span) for span in spans]
        if self.fused:
            found[-1] = (StageKind.FB, *spans.pop())
        found += [(StageKind.B, *span) for span in reversed(spans)]
        return tuple(Stage(index, *stage) for index, stage in enumerate(found))
