"""The profile file: what the segments of a model cost, as somebody measured it, to make a plan from.

A JSON object; `rpcompile/data/profile.schema.json` is its JSON Schema. Unknown fields are refused::

    {
      "format": "rpcompile.profile", "version": 1,
      "source": "where the figures are from",
      "hardware": "rtx4090",                  a catalogue name or hardware file, or numbers
      "gpu_memory_bytes": 23000000000,        optional: what a plan may use of each GPU's memory
      "tokens_per_microbatch": 8192,          optional
      "hop_s": 0.0016,                        optional: one boundary from one GPU to the next
      "segments": [
        {"name": "layers.0", "forward_s": 0.0074, "backward_s": 0.0158, "weight_bytes": 100663296,
         "gradient_bytes": 100663296, "boundary_bytes": 33554432, "saved_bytes": 700000000, "chunks": 1,
         "attention": {"nbytes": 34603008, "forward_s": 0.0011}},     optional: what offloading it takes
        ...
      ]
    }

Times and sizes are for one microbatch; `backward_s` is without recompute. Segments are in execution order
and the last one ends with the loss, so its `boundary_bytes` is 0. A segment with `attention` may offload
its `nbytes` in the forward and load them for the backward, which then recomputes `forward_s` less of it.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec

from rpcompile import hardware as catalogue
from rpcompile.errors import InvalidArgument, ProfileFileError
from rpcompile.files import write_in_one_step
from rpcompile.hardware import Bytes, HardwareNumbers, Seconds
from rpcompile.ir import AttentionOutputs, Hardware, Segment, SegmentChain, TiedWeight

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator

FORMAT, VERSION = "rpcompile.profile", 1

Count = Annotated[int, msgspec.Meta(ge=1)]


class ProfileAttention(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What offloading a segment's attention outputs takes; fields as in `ir.AttentionOutputs`.

    Memory is that of the segment unless it is given.
    """

    nbytes: Count
    forward_s: Seconds
    saved_bytes: Bytes | None = None
    peak_bytes: Bytes | None = None
    forward_peak_bytes: int | None = None


class ProfileSegment(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What one segment costs; fields as in `ir.Segment`.

    A backward passes through every segment from the first one on that has a `backward_s` or
    `gradient_bytes`. `boundary_gradient_bytes` is then `boundary_bytes` unless it is given, and
    `forward_peak_bytes` is `peak_bytes`.
    """

    name: str
    forward_s: Seconds
    backward_s: Seconds
    weight_bytes: Bytes
    gradient_bytes: Bytes
    boundary_bytes: Bytes
    saved_bytes: Bytes
    chunks: Count = 1
    boundary_gradient_bytes: Bytes | None = None
    state_bytes: Bytes = 0
    input_bytes: Bytes = 0
    peak_bytes: Bytes = 0
    forward_flops: Seconds = 0.0
    backward_flops: Seconds = 0.0
    forward_peak_bytes: int | None = None
    saved_input_bytes: Bytes = 0
    rematerialised_bytes: Bytes = 0
    attention: ProfileAttention | None = None


class ProfileTied(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One tensor that several segments read, by their positions; see `ir.TiedWeight`."""

    name: str
    segments: Annotated[tuple[Bytes, ...], msgspec.Meta(min_length=2)]
    weight_bytes: Bytes
    gradient_bytes: Bytes


class Profile(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True, kw_only=True):
    """A profile file; see the module's text.

    Attributes:
        hop_s: If given, each boundary that is not empty counts as the bytes that take this long from GPU
            to host to GPU, also where memory is concerned; `boundary_bytes` then only says which are
            not empty.
    """

    format: str
    version: int
    hardware: str | HardwareNumbers
    segments: Annotated[tuple[ProfileSegment, ...], msgspec.Meta(min_length=1)]
    source: str = ""
    gpu_memory_bytes: Bytes | None = None
    tokens_per_microbatch: Count | None = None
    hop_s: Seconds | None = None
    tied: tuple[ProfileTied, ...] = ()

    @classmethod
    def from_chain(cls, chain: SegmentChain, source: str = "") -> Profile:
        """The profile of any chain; node, parameter and tensor names are left out."""
        hardware = {name: getattr(chain.hardware, name) for name in HardwareNumbers.__struct_fields__}
        segments = [_profile_segment(segment) for segment in chain.segments]
        tokens = math.prod(chain.bindings.values()) if "sequence" in chain.bindings else None
        tied = [ProfileTied(t.name, t.segments, t.weight_bytes, t.gradient_bytes) for t in chain.tied]
        return cls(
            format=FORMAT,
            version=VERSION,
            hardware=HardwareNumbers(**hardware),
            segments=tuple(segments),
            source=source or ", ".join(sorted({segment.source for segment in chain.segments})),
            tokens_per_microbatch=tokens,
            tied=tuple(tied),
        )

    def to_chain(self) -> SegmentChain:
        """The chain that passes take; its segments' source is "given".

        Raises:
            ProfileFileError: The segments do not fit together, or the hardware is unknown.
        """
        hardware = self._hardware()
        starts = (i for i, s in enumerate(self.segments) if s.backward_s or s.gradient_bytes)
        first_backward = next(starts, len(self.segments))
        segments = tuple(
            self._segment(index, hardware, index >= first_backward) for index in range(len(self.segments))
        )
        tied = tuple(self._tied(index) for index in range(len(self.tied)))
        tokens = self.tokens_per_microbatch
        return SegmentChain(segments, {"batch": 1, "sequence": tokens} if tokens else {}, hardware, tied)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the file, all or nothing.

        Raises:
            ProfileFileError: It cannot be written.
        """
        text = json.dumps(msgspec.to_builtins(self), indent=1, sort_keys=True, allow_nan=False) + "\n"
        try:
            write_in_one_step(Path(path), text)
        except OSError as error:
            raise ProfileFileError(f"{path}: cannot be written: {error}") from error

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Profile:
        """Reads and checks a file.

        Raises:
            ProfileFileError: It cannot be read, or something in it is wrong; says where and what.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ProfileFileError(f"{path}: cannot be read: {error}") from error
        return cls.parse(text, str(path))

    @classmethod
    def parse(cls, text: str, where: str = "profile") -> Profile:
        """The same for a text; `where` names it in errors."""
        try:
            found: Any = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ProfileFileError(f"{where}: is no JSON: {error}") from error
        if not isinstance(found, dict) or found.get("format") != FORMAT:
            raise ProfileFileError(f'{where}: is no profile; it must be an object with "format": "{FORMAT}"')
        version = found.get("version")
        if isinstance(version, int) and version > VERSION:
            raise ProfileFileError(
                f"{where}: has version {version}, this rpcompile reads {VERSION}; use a newer rpcompile"
            )
        if version != VERSION or isinstance(version, bool):
            raise ProfileFileError(f"{where}: $.version is {version!r}; it must be {VERSION}")
        for place in _not_finite(found, "$"):
            raise ProfileFileError(f"{where}: {place} is not a finite number; give one, or leave it out")
        try:
            profile = msgspec.convert(found, cls)
        except msgspec.ValidationError as error:
            raise ProfileFileError(f"{where}: {error}; see rpcompile/data/profile.schema.json") from error
        try:
            profile.to_chain()
        except ProfileFileError as error:
            raise ProfileFileError(f"{where}: {error}") from error
        return profile

    # ---------------------------------------------------------------------- parts of a chain

    def _hardware(self) -> Hardware:
        if isinstance(self.hardware, str):
            try:
                hardware = catalogue.lookup(self.hardware)
            except InvalidArgument as error:
                raise ProfileFileError(f"$.hardware: {error}, or give its numbers") from error
        else:
            hardware = Hardware(**msgspec.structs.asdict(self.hardware))
        usable = hardware.usable_bytes if self.gpu_memory_bytes is None else self.gpu_memory_bytes
        if usable > hardware.memory_bytes:
            raise ProfileFileError(
                f"a plan may use {usable} bytes of a GPU that has {hardware.memory_bytes}; "
                "lower $.gpu_memory_bytes or $.hardware.usable_bytes"
            )
        sources = dict(hardware.sources)
        if self.gpu_memory_bytes is not None:
            sources["usable_bytes"] = "given: by the profile"
        return replace(hardware, usable_bytes=usable, sources=sources)

    def _segment(self, index: int, hardware: Hardware, needs_backward: bool) -> Segment:
        given, last = self.segments[index], index == len(self.segments) - 1
        if last and given.boundary_bytes:
            raise ProfileFileError(
                f"$.segments[{index}].boundary_bytes is {given.boundary_bytes}; the last segment ends with "
                "the loss and hands nothing on: set it to 0"
            )
        boundary, gradient = given.boundary_bytes, given.boundary_gradient_bytes
        if gradient is None:
            gradient = boundary if needs_backward else 0
        if self.hop_s is not None:
            boundary, gradient = (
                _hop_bytes(self.hop_s, hardware) if size else 0 for size in (boundary, gradient)
            )
        fields = msgspec.structs.asdict(given)
        fields |= {"boundary_bytes": boundary, "boundary_gradient_bytes": gradient}
        if given.forward_peak_bytes is None:
            fields["forward_peak_bytes"] = given.peak_bytes
        fields["attention"] = self._attention(index, needs_backward and not last)
        values = () if last else (f"{given.name}.output",)
        return Segment(
            **fields,
            nodes=(),
            parameters=(),
            inputs=("inputs",) if given.input_bytes else (),
            boundary=values,
            boundary_gradients=values if gradient else (),
            needs_backward=needs_backward,
            source="given",
        )

    def _attention(self, index: int, recomputed: bool) -> AttentionOutputs | None:
        segment, where = self.segments[index], f"$.segments[{index}].attention"
        given = segment.attention
        if given is None:
            return None
        if not recomputed:
            raise ProfileFileError(
                f"{where} is given, but segment {segment.name!r} is never recomputed: it has no backward, or "
                "ends with the loss; leave it out"
            )
        if given.forward_s > segment.forward_s:
            raise ProfileFileError(
                f"{where}.forward_s is {given.forward_s}, more than the {segment.forward_s} of its whole "
                "segment; give the part of that which attention takes"
            )
        peak_bytes = segment.peak_bytes if given.peak_bytes is None else given.peak_bytes
        forward_peak_bytes = given.forward_peak_bytes
        if forward_peak_bytes is None:
            own = segment.forward_peak_bytes
            forward_peak_bytes = segment.peak_bytes if own is None else own
        return AttentionOutputs(
            nodes=(),
            nbytes=given.nbytes,
            forward_s=given.forward_s,
            saved_bytes=segment.saved_bytes if given.saved_bytes is None else given.saved_bytes,
            peak_bytes=peak_bytes,
            forward_peak_bytes=forward_peak_bytes,
        )

    def _tied(self, index: int) -> TiedWeight:
        tied = self.tied[index]
        for segment in tied.segments:
            if segment >= len(self.segments):
                raise ProfileFileError(
                    f"$.tied[{index}].segments names segment {segment} of {len(self.segments)}; "
                    "segments are counted from 0"
                )
        return TiedWeight(tied.name, tied.segments, tied.weight_bytes, tied.gradient_bytes)


def schema() -> dict[str, Any]:
    """The file's JSON Schema."""
    return json.loads(msgspec.json.encode(msgspec.json.schema(Profile)))


def _profile_segment(segment: Segment) -> ProfileSegment:
    fields = {name: getattr(segment, name) for name in ProfileSegment.__struct_fields__}
    attention, names = segment.attention, ProfileAttention.__struct_fields__
    can = attention is not None and attention.nbytes > 0
    fields["attention"] = ProfileAttention(*(getattr(attention, name) for name in names)) if can else None
    return ProfileSegment(**fields)


def _hop_bytes(hop_s: float, hardware: Hardware) -> int:
    moving_s = hop_s - 2 * hardware.latency_s
    return max(1, round(moving_s / (1 / hardware.d2h_bytes_per_s + 1 / hardware.h2d_bytes_per_s)))


def _not_finite(value: object, place: str) -> Iterator[str]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _not_finite(item, f"{place}.{key}")
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _not_finite(item, f"{place}[{index}]")
    elif isinstance(value, float) and not math.isfinite(value):
        yield place
