"""Names of the buffers that actions read and write.

A name is `<space>:<what>`; space is `host` or `gpu<k>`. Segment `s` ends at boundary `s`: the
tensors that cross the cut behind it. `j` is a job, `m` a microbatch.

    host:weights.s4        parameters and buffers of segment 4, as the model holds them
    host:inputs.m0         the caller's tensors for microbatch 0
    host:x.s6.m0           boundary 6, kept for recompute or handed on
    host:kept.s4.m0        attention outputs and log-sum-exps of segment 4, kept for its backward
    host:dx.s6.j9.m0       gradient of boundary 6, handed on by job 9
    host:gradients.j9.s4   job 9's gradient of segment 4's parameters
    host:state.j2.s4       segment 4's buffers as job 2's forward left them
    host:updated.s4        segment 4's weights for the next iteration
    host:norm              norm of all gradients, to clip them by
    host:loss.m0           the loss (in evaluation: every output)
    gpu1:weights.j2.s4     job 2's copy of segment 4's weights
    gpu1:inputs.j2.m0      job 2's copy of the caller's tensors
    gpu1:x.s6.j2.m0        boundary 6 as job 2 made or received it
    gpu1:kept.s4.j2.m0     attention outputs of segment 4 as job 2 made or loaded them
    gpu1:dx.s6.j9.m0       gradient of boundary 6 as job 9 made or received it
    gpu1:tape.j9.m0        what job 9's recompute keeps for its backward, and what the two need besides
    gpu1:gradients.j9.s4   gradient accumulated over job 9's microbatches
    gpu1:loss.m0           the loss on the device
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import NamedTuple

from rpcompile.errors import ScheduleError

HOST = "host"


class BufferName(NamedTuple):
    """A buffer's name taken apart; what a name does not say is None.

    `kind` is "weights", "inputs", "x", "kept", "dx", "tape", "gradients", "state", "updated", "norm" or
    "loss".
    """

    space: str
    kind: str
    segment: int | None = None
    job: int | None = None
    microbatch: int | None = None


_PATTERN = re.compile(
    r"(host|gpu\d+):(weights|inputs|x|kept|dx|tape|gradients|state|updated|norm|loss)"
    r"(?:\.s(\d+))?(?:\.j(\d+))?(?:\.s(\d+))?(?:\.m(\d+))?"
)


@lru_cache(maxsize=1 << 12)
def parse(buffer: str) -> BufferName:
    """Takes a name apart.

    Raises:
        ScheduleError: It is not a buffer's name.
    """
    match = _PATTERN.fullmatch(buffer)
    if match is None:
        raise ScheduleError(f"{buffer!r} is not a buffer; write e.g. host:weights.s4 or gpu1:x.s6.j2.m0")
    space, kind, segment, job, behind, microbatch = match.groups()
    segment = behind if segment is None else segment
    return BufferName(
        space,
        kind,
        None if segment is None else int(segment),
        None if job is None else int(job),
        None if microbatch is None else int(microbatch),
    )


class ParsedNames(dict[str, BufferName]):
    """Names taken apart when they are first asked for: one for each pass over a schedule."""

    def __missing__(self, buffer: str) -> BufferName:
        name = self[buffer] = parse.__wrapped__(buffer)
        return name


def segment_of(buffer: str) -> int:
    """The segment in a buffer's name: `gpu1:x.s6.j2.m0` -> 6.

    Raises:
        ScheduleError: The name has none.
    """
    segment = parse(buffer).segment
    if segment is None:
        raise ScheduleError(f"{buffer!r} belongs to no segment")
    return segment


def kind_of(buffer: str) -> str:
    """`BufferName.kind`, without taking the rest apart."""
    return buffer.partition(":")[2].partition(".")[0]


def space_of(buffer: str) -> str:
    """`host` or `gpu<k>`."""
    return buffer.partition(":")[0]


def gpu(index: int) -> str:
    return f"gpu{index}"


def weights(space: str, segment: int, job: int | None = None) -> str:
    return f"{space}:weights.s{segment}" if job is None else f"{space}:weights.j{job}.s{segment}"


def inputs(space: str, microbatch: int, job: int | None = None) -> str:
    return f"{space}:inputs.m{microbatch}" if job is None else f"{space}:inputs.j{job}.m{microbatch}"


def boundary(space: str, segment: int, microbatch: int, job: int | None = None) -> str:
    middle = "" if job is None else f".j{job}"
    return f"{space}:x.s{segment}{middle}.m{microbatch}"


def kept(space: str, segment: int, microbatch: int, job: int | None = None) -> str:
    middle = "" if job is None else f".j{job}"
    return f"{space}:kept.s{segment}{middle}.m{microbatch}"


def boundary_gradient(space: str, segment: int, microbatch: int, job: int) -> str:
    return f"{space}:dx.s{segment}.j{job}.m{microbatch}"


def tape(space: str, microbatch: int, job: int) -> str:
    return f"{space}:tape.j{job}.m{microbatch}"


def gradients(space: str, segment: int, job: int) -> str:
    return f"{space}:gradients.j{job}.s{segment}"


def state(segment: int, job: int) -> str:
    return f"{HOST}:state.j{job}.s{segment}"


def updated(segment: int) -> str:
    return f"{HOST}:updated.s{segment}"


NORM = f"{HOST}:norm"


def loss(space: str, microbatch: int) -> str:
    return f"{space}:loss.m{microbatch}"
