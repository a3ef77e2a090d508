"""SegmentChain -> SegmentChain: divides tokens and heads where a segment does not fit otherwise."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from rpcompile.device_kernels import Kernels
from rpcompile.errors import InvalidArgument
from rpcompile.ir import Partition, SegmentChain, Stage, StageKind
from rpcompile.passes._segment_memory import LoneMemory, SegmentMemories
from rpcompile.passes._tile_costs import NOTHING, TileCost, TileCosts
from rpcompile.passes._token_regions import find_regions
from rpcompile.passes.extract_stages import ExtractStages
from rpcompile.passes.group_heads import key_heads

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rpcompile.ir import CostedGraph, Segment
    from rpcompile.passes._token_regions import TokenRegion

# Chunks of fewer, over all rows of the microbatch, would leave a GPU's matrix units idle.
_LEAST_TOKENS = 256
# What a loss may take of a GPU's memory before it is tiled. Its chunks cost little time, for its forward and
# backward run together, and the memory that it leaves makes larger stages.
_LOSS_SHARE = 0.125
# What a segment's own need may take of the memory that its weights, gradients and boundaries leave.
_SHARE = 0.95
# Where that is not to be had: more chunks are not worth their time for less than this part of the need.
_WORTH = 0.1
_NAMED = ("auto", "loss")


@dataclass(frozen=True)
class ChooseTiles:
    """Takes, for each kind of segment, what costs least time of all that fits.

    More chunks of tokens need less memory and cost more time: weights are read, and their gradients added
    up, once a chunk. Groups of heads cost no time that is priced. So each number of chunks is tried with the
    most groups, from one chunk on, until what the segment needs fits; then the fewest groups that do are
    taken. `backward_s` holds the time of the chunks and of what runs twice: a segment that mixes tokens
    somewhere (attention) runs its regions twice in the backward when it is tiled. One that is token-wise
    throughout (`reruns`) runs its forward only once, in the backward, if it is the last of its stage;
    elsewhere that time is not priced. A segment that offloads its attention outputs (`Segment.offloads`)
    has to fit as a stage that loads them, copies included.

    Attributes:
        costed: The graph that the chain was bound from.
        tiles: "auto"; "loss": the same for the segment that ends in the loss, and one chunk elsewhere; or the
            number of chunks of every region.
        head_groups: "auto"; or into how many groups every attention's heads are divided at most.
        kernels: Of which device the memory is; as in `BindChain`.
    """

    name: ClassVar[str] = "choose-tiles"
    costed: CostedGraph
    tiles: str | int = "auto"
    head_groups: str | int = "auto"
    kernels: Kernels | None = None

    def run(self, chain: SegmentChain) -> SegmentChain:
        """Sets `tiles`, `head_groups`, memory and seconds of the segments.

        Raises:
            InvalidArgument: An option is something else.
        """
        if self.tiles not in _NAMED and (not isinstance(self.tiles, int) or self.tiles < 1):
            raise InvalidArgument(
                f"tiles={self.tiles!r}; it must be 'auto', 'loss' or a number of chunks from 1 on"
            )
        if self.head_groups != "auto" and (not isinstance(self.head_groups, int) or self.head_groups < 1):
            raise InvalidArgument(
                f"head_groups={self.head_groups!r}; it must be 'auto' or a number of groups from 1 on"
            )
        kernels = self.kernels or Kernels("cpu" if chain.hardware.name == "cpu" else "cuda")
        chooser = _Chooser(self, chain, kernels)
        segments = tuple(chooser.divided(index) for index in range(len(chain.segments)))
        return replace(chain, segments=segments)


@dataclass(frozen=True)
class _Choice:
    """What dividing makes of one kind of segment; `more` is what that costs."""

    tiles: int
    head_groups: int
    memory: LoneMemory
    more: TileCost = NOTHING

    @property
    def need_bytes(self) -> int:
        return self.memory.need_bytes


class _Chooser:
    def __init__(self, options: ChooseTiles, chain: SegmentChain, kernels: Kernels) -> None:
        self._options, self._chain = options, chain
        self._capture = options.costed.capture
        self._names = self._capture.graph_module.meta.get("symbols", {})
        self._pieces = SegmentMemories(self._capture, chain.bindings, kernels)
        self._whole = self._pieces.peak
        self._costs = TileCosts(options.costed, chain)
        self._known: dict[object, _Choice | None] = {}

    def divided(self, index: int) -> Segment:
        segment, options = self._chain.segments[index], self._options
        automatic = options.tiles in _NAMED and options.head_groups == "auto"
        whole_fits = segment.saved_bytes + segment.peak_bytes <= self._goal(index) and not segment.offloads
        if not segment.needs_backward or (automatic and whole_fits):
            return segment
        key = self._whole.key(self._pieces.piece(index, index)), segment.weight_bytes
        if key not in self._known:
            self._known[key] = self._choose(index)
        choice = self._known[key]
        if choice is None:
            return segment
        return replace(
            segment,
            tiles=choice.tiles,
            head_groups=choice.head_groups,
            **choice.memory._asdict(),
            forward_s=segment.forward_s + choice.more.forward_s,
            backward_s=segment.backward_s + choice.more.backward_s,
            reruns=choice.more.reruns,
        )

    # ------------------------------------------------------------------ what fits

    def _free(self, index: int) -> float:
        """What the segment's own need may be for it to be a stage of its own."""
        chain = self._chain
        own, before = chain.segments[index], chain.segments[index - 1] if index else None
        around = chain.segments[max(0, index - 1) : index + 2]
        # Beside it are a neighbour's weights, on their way up, and gradients, on their way down,
        taken = own.weight_bytes + max(other.weight_bytes for other in around) + own.rematerialised_bytes
        taken += own.gradient_bytes + max(other.gradient_bytes for other in around)
        # and what two microbatches copy.
        taken += 2 * (own.input_bytes + own.boundary_gradient_bytes + own.kept_bytes)
        taken += 2 * (before.boundary_bytes + before.boundary_gradient_bytes) if before else 0
        return _SHARE * (chain.hardware.usable_bytes - taken)

    def _goal(self, index: int) -> float:
        free = self._free(index)
        return min(free, _LOSS_SHARE * self._chain.hardware.usable_bytes) if self._is_last(index) else free

    def _is_last(self, index: int) -> bool:
        return index == len(self._chain.segments) - 1

    # ------------------------------------------------------------------ the choice

    def _choose(self, index: int) -> _Choice | None:
        """The cheapest that fits; else the cheapest of those that need hardly more than the least."""
        regions, groups = self._regions(index), self._groups(index)
        chunks = list(self._chunks(index, regions))
        if (chunks, groups) == ([1], [1]):
            return None
        goal, tried = self._goal(index), list[_Choice]()
        tokens = self._tokens(regions)
        usual = max((tiles for tiles in chunks if tiles * _LEAST_TOKENS <= tokens), default=chunks[0])
        for tiles in chunks:
            # What a segment needs falls no faster than its chunks; where none reaches the goal, most do best.
            if tried and tiles not in (usual, chunks[-1]) and 0 < tiles * goal < tried[0].need_bytes:
                continue
            tried.append(self._measure(index, tiles, groups[-1]))
            # Shorter chunks of a row are for what does not fit otherwise.
            if tried[-1].need_bytes <= (goal if tiles < usual else self._free(index)):
                break
        least = min(choice.need_bytes for choice in tried)
        limit = max(least, goal, min((1 + _WORTH) * least, self._free(index)))
        found = next(choice for choice in tried if choice.need_bytes <= limit)
        for fewer in groups[:-1]:
            other = self._measure(index, found.tiles, fewer)
            if other.need_bytes <= max(found.need_bytes, goal):
                found = other
                break
        if (found.tiles, found.head_groups) == (1, 1):
            return None
        if self._chain.segments[index].offloads:  # in a fused stage it does not
            found = self._measure(index, found.tiles, found.head_groups, offloads=False)
        return replace(found, more=self._costs.of(index, regions, found.tiles))

    def _chunks(self, index: int, regions: list[TokenRegion]) -> Iterator[int]:
        """Numbers of chunks to try, ascending."""
        tiles = self._options.tiles
        if not regions or (tiles == "loss" and not self._is_last(index)):
            yield 1
        elif tiles not in _NAMED:
            yield int(tiles)
        else:
            tokens, count = self._tokens(regions), 1
            most = min(tokens, tokens * self._chain.bindings.get("batch", 1) // _LEAST_TOKENS)
            while count <= max(1, most):
                yield count
                count *= 2

    def _tokens(self, regions: list[TokenRegion]) -> int:
        """Of one row."""
        return min((self._chain.bindings[region.symbol] for region in regions), default=1)

    def _groups(self, index: int) -> list[int]:
        """Numbers of groups of heads to try, ascending."""
        nodes, gradients = self._whole.nodes, self._capture.requires_grad
        names = self._chain.segments[index].nodes
        heads = max(key_heads(nodes[name], gradients) for name in names)
        if self._options.head_groups != "auto":
            return [min(heads, int(self._options.head_groups))]
        return [count for count in range(1, heads + 1) if heads % count == 0]

    def _regions(self, index: int) -> list[TokenRegion]:
        segment_of = dict.fromkeys(self._chain.segments[index].nodes, index)
        kind = StageKind.FB if self._is_last(index) else StageKind.B
        stage = Stage(0, kind, index, index)
        partition = Partition((stage,), 0, 0.0, 0.0, "GIVEN", 0.0, "none")
        whole = self._with(index, tiles=1, head_groups=1, offloads=False)
        (graph,) = ExtractStages(self._capture, whole).run(partition)
        return find_regions(graph.graph_module.graph, self._names, segment_of)

    # ------------------------------------------------------------------ its memory

    def _measure(self, index: int, tiles: int, groups: int, **changes: bool) -> _Choice:
        chain = self._with(index, tiles=tiles, head_groups=groups, **changes)
        return _Choice(tiles, groups, self._pieces.alone(chain, index))

    def _with(self, index: int, **changes: int) -> SegmentChain:
        """The chain with one segment changed."""
        segments = list(self._chain.segments)
        segments[index] = replace(segments[index], **changes)
        return replace(self._chain, segments=tuple(segments))
