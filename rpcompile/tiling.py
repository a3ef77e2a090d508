"""Runs a token-wise region of a stage in chunks along the sequence, forward and backward.

Between forward and backward a region keeps its inputs only: the backward runs each chunk again and
propagates through it at once, so one chunk's intermediate tensors are all that is ever there.
A region that ends in the loss does both in its forward, and so nothing is run twice.
"""

from __future__ import annotations

import threading
from contextlib import contextmanager, nullcontext
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from contextlib import AbstractContextManager

_LOW_PRECISION = (torch.float16, torch.bfloat16)
_expected = threading.local()


@contextmanager
def expected_loss_gradient(value: float) -> Iterator[None]:
    """Says what gradient the loss will get.

    A region that ends in the loss propagates it before it is known. Any value is right up to rounding; the
    true one also keeps float16 gradients where loss scaling puts them.
    """
    before = getattr(_expected, "value", 1.0)
    _expected.value = value
    try:
        yield
    finally:
        _expected.value = before


def count_valid(target: torch.Tensor, ignore_index: int) -> torch.Tensor:
    """The number of tokens that a mean loss is over, float32."""
    return (target != ignore_index).sum().to(torch.float32)


class TiledRegion(nn.Module):
    """A region's graph with the places of its tokens.

    Args:
        graph_module: Takes the region's inputs, then the number of tokens if `takes_sequence`; returns a
            tuple. Symbolic in the number of tokens.
        input_dims: Of each input the dimension of tokens, None for what every chunk sees whole.
        output_dims: Of each output the dimension of tokens; None for a loss, which is summed.
        chunks: Into how many parts the tokens are divided.
        takes_sequence: Whether the graph reads the number of tokens.
        needs_output: False where nobody reads the outputs, so that only the backward has to run.

    Attributes:
        at_most: Run only so many chunks; the memory of three is that of all.
    """

    at_most: int | None = None

    def __init__(
        self,
        graph_module: torch.fx.GraphModule,
        input_dims: Sequence[int | None],
        output_dims: Sequence[int | None],
        chunks: int,
        *,
        takes_sequence: bool,
        needs_output: bool,
    ) -> None:
        super().__init__()
        self.graph_module = graph_module
        self.input_dims = tuple(input_dims)
        self.output_dims = tuple(output_dims)
        self.chunks = chunks
        self.takes_sequence = takes_sequence
        self.needs_output = needs_output

    @property
    def places(self) -> tuple[object, ...]:
        """What tells regions with equal graphs apart."""
        return self.input_dims, self.output_dims, self.chunks, self.takes_sequence, self.needs_output

    @property
    def is_loss(self) -> bool:
        return None in self.output_dims

    def forward(self, *inputs: Any) -> tuple[torch.Tensor, ...]:
        if not torch.is_grad_enabled():
            return _forward(self, inputs)
        return _Tiled.apply(self, *inputs)  # type: ignore[no-any-return]

    def tokens(self, inputs: Sequence[Any]) -> int:
        return next(
            value.shape[dim] for value, dim in zip(inputs, self.input_dims, strict=True) if dim is not None
        )

    def bounds(self, inputs: Sequence[Any]) -> list[tuple[int, int]]:
        """First and last token (excluded) of each chunk; as equal as can be, none empty."""
        tokens = self.tokens(inputs)
        chunks = min(self.chunks, tokens)
        edges = [tokens * index // chunks for index in range(chunks + 1)]
        return list(pairwise(edges))[: self.at_most]

    def part(self, inputs: Sequence[Any], low: int, high: int) -> list[Any]:
        """The inputs of one chunk: views."""
        return [
            value if dim is None else value.narrow(dim, low, high - low)
            for value, dim in zip(inputs, self.input_dims, strict=True)
        ]

    def run(self, part: Sequence[Any], tokens: int) -> tuple[torch.Tensor, ...]:
        return self.graph_module(*part, *([tokens] if self.takes_sequence else []))


class _Tiled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, region: TiledRegion, *inputs: Any) -> tuple[torch.Tensor, ...]:
        ctx.region, ctx.autocast = region, _autocast(inputs)
        ctx.others = [None if isinstance(value, torch.Tensor) else value for value in inputs]
        wanted = ctx.needs_input_grad[1:]
        if region.is_loss and any(wanted):
            ctx.expected = getattr(_expected, "value", 1.0)
            totals, ctx.gradients = _losses_and_gradients(region, inputs, wanted, ctx.expected)
            return totals
        ctx.save_for_backward(*(value if isinstance(value, torch.Tensor) else None for value in inputs))
        if not region.needs_output:
            return _shapes_only(region, inputs)
        return _forward(region, inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> Any:  # type: ignore[override]
        region: TiledRegion = ctx.region
        if region.is_loss:
            (gradient,) = gradients
            assert gradient is not None
            factor = gradient / ctx.expected
            found, ctx.gradients = ctx.gradients, None
            return None, *(None if g is None else g.mul_(factor.to(g.dtype)) for g in found)
        saved = zip(ctx.saved_tensors, ctx.others, strict=True)
        inputs = [other if tensor is None else tensor for tensor, other in saved]
        with ctx.autocast():
            found = _gradients(region, inputs, ctx.needs_input_grad[1:], gradients)
        return None, *found


def _forward(region: TiledRegion, inputs: Sequence[Any]) -> tuple[torch.Tensor, ...]:
    """All chunks, put together; losses are added up."""
    tokens = region.tokens(inputs)
    outputs: list[torch.Tensor] = []
    found: tuple[torch.Tensor, ...] = ()
    for low, high in region.bounds(inputs):
        found = region.run(region.part(inputs, low, high), high - low)
        if not outputs:
            outputs = [
                torch.zeros_like(value, dtype=_sum_dtype(value))
                if dim is None
                else _whole(value, dim, tokens)
                for value, dim in zip(found, region.output_dims, strict=True)
            ]
        for output, value, dim in zip(outputs, found, region.output_dims, strict=True):
            if dim is None:
                output += value
            else:
                output.narrow(dim, low, high - low).copy_(value)
    return tuple(output.to(value.dtype) for output, value in zip(outputs, found, strict=True))


def _shapes_only(region: TiledRegion, inputs: Sequence[Any]) -> tuple[torch.Tensor, ...]:
    """Outputs that nobody reads, without memory."""
    tokens, found = region.tokens(inputs), region.run(region.part(inputs, 0, 1), 1)
    shapes = [
        (*value.shape[:dim], tokens, *value.shape[dim + 1 :])
        for value, dim in zip(found, region.output_dims, strict=True)
        if dim is not None
    ]
    return tuple(value.new_zeros(()).expand(shape) for value, shape in zip(found, shapes, strict=True))


def _gradients(
    region: TiledRegion,
    inputs: Sequence[Any],
    wanted: Sequence[bool],
    gradients: Sequence[torch.Tensor | None],
) -> list[torch.Tensor | None]:
    """Gradients of the inputs: every chunk is run again and propagated through."""
    sums = _Sums(region, inputs, wanted, gradients)
    for low, high in region.bounds(inputs):
        part = sums.leaves(low, high)
        with torch.enable_grad():
            outputs = region.run(part, high - low)
        roots: list[torch.Tensor] = []
        incoming: list[torch.Tensor] = []
        for output, gradient, dim in zip(outputs, gradients, region.output_dims, strict=True):
            if gradient is not None and output.requires_grad and dim is not None:
                roots.append(output)
                incoming.append(gradient.narrow(dim, low, high - low))
        del outputs
        sums.add(part, roots, incoming, low, high)
    return sums.results()


def _losses_and_gradients(
    region: TiledRegion, inputs: Sequence[Any], wanted: Sequence[bool], expected: float
) -> tuple[tuple[torch.Tensor, ...], list[torch.Tensor | None]]:
    """The loss, and the gradients of the inputs if its own gradient is `expected`."""
    sums = _Sums(region, inputs, wanted)
    total, dtype = None, torch.float32
    for low, high in region.bounds(inputs):
        part = sums.leaves(low, high)
        with torch.enable_grad():
            (loss,) = region.run(part, high - low)
        dtype = loss.dtype
        given = loss.detach().to(_sum_dtype(loss))
        total = given.clone() if total is None else total + given
        sums.add(part, [loss], [torch.full_like(loss, expected)], low, high)
    assert total is not None
    return (total.to(dtype),), sums.results()


def _sum_dtype(value: torch.Tensor) -> torch.dtype:
    """What is added up over chunks: a low precision would lose what is small beside the sum."""
    return torch.promote_types(value.dtype, torch.float32)


class _Sums:
    """Gradients of a region's inputs, put together from those of the chunks.

    What every chunk sees whole (weights) gets the sum, taken in float32 where the gradients are narrower.
    What the region only adds something to (a residual) gets the very gradient that came in: no copy is made.
    """

    def __init__(
        self,
        region: TiledRegion,
        inputs: Sequence[Any],
        wanted: Sequence[bool],
        incoming: Sequence[torch.Tensor | None] = (),
    ) -> None:
        self._region, self._inputs, self._incoming = region, inputs, incoming
        self._wanted = [index for index, want in enumerate(wanted) if want]
        self._found: list[torch.Tensor | None] = [None] * len(inputs)
        self._passed: dict[int, torch.Tensor] = {}  # of these inputs all chunks so far got what came in

    def leaves(self, low: int, high: int) -> list[Any]:
        """One chunk's inputs, cut off from what made them."""
        part = self._region.part(self._inputs, low, high)
        for index in self._wanted:
            part[index] = part[index].detach().requires_grad_(True)
        return part

    def add(
        self,
        part: Sequence[Any],
        roots: Sequence[torch.Tensor],
        gradients: Sequence[torch.Tensor],
        low: int,
        high: int,
    ) -> None:
        if not roots:
            return
        leaves = [part[index] for index in self._wanted]
        found = torch.autograd.grad(roots, leaves, gradients, allow_unused=True)
        for index, gradient in zip(self._wanted, found, strict=True):
            if gradient is None:
                continue
            if self._region.input_dims[index] is None:
                self._add_whole(index, gradient)
            else:
                self._put(index, gradient, low, high)

    def _add_whole(self, index: int, gradient: torch.Tensor) -> None:
        whole = self._found[index]
        if whole is None:
            self._found[index] = gradient.float() if gradient.dtype in _LOW_PRECISION else gradient.clone()
        else:
            whole += gradient

    def _put(self, index: int, gradient: torch.Tensor, low: int, high: int) -> None:
        dim = self._region.input_dims[index]
        assert dim is not None
        if low == 0:
            for whole, where in zip(self._incoming, self._region.output_dims, strict=False):
                if where == dim and whole is not None and _is_part(gradient, whole, dim, low):
                    self._passed[index] = whole
        passed, whole = self._passed.get(index), self._found[index]
        if passed is not None and _is_part(gradient, passed, dim, low):
            return
        if whole is None:
            self._found[index] = whole = torch.zeros_like(self._inputs[index])
            if (passed := self._passed.pop(index, None)) is not None:
                whole.narrow(dim, 0, low).copy_(passed.narrow(dim, 0, low))
        whole.narrow(dim, low, high - low).copy_(gradient)

    def results(self) -> list[torch.Tensor | None]:
        found = (self._passed.get(index, value) for index, value in enumerate(self._found))
        return [
            None if value is None else value.to(given.dtype)
            for value, given in zip(found, self._inputs, strict=True)
        ]


def _is_part(piece: torch.Tensor, whole: torch.Tensor, dim: int, low: int) -> bool:
    """Whether the piece is, in memory, the tokens from `low` on of the whole."""
    return (
        piece.untyped_storage()._cdata == whole.untyped_storage()._cdata
        and piece.shape[:dim] + piece.shape[dim + 1 :] == whole.shape[:dim] + whole.shape[dim + 1 :]
        and piece.storage_offset() == whole.storage_offset() + low * whole.stride(dim)
        and piece.stride() == whole.stride()
        and piece.dtype == whole.dtype
    )


def _whole(chunk: torch.Tensor, dim: int, tokens: int) -> torch.Tensor:
    """Empty memory for all chunks, its dimensions in the order of the chunk's in memory."""
    order = sorted(range(chunk.dim()), key=lambda index: -chunk.stride(index))
    shape = [tokens if index == dim else chunk.shape[index] for index in order]
    return chunk.new_empty(shape).permute([order.index(index) for index in range(chunk.dim())])


def _autocast(inputs: Sequence[Any]) -> Any:
    """Makes contexts that are under autocast as the caller is."""
    device = next(value.device.type for value in inputs if isinstance(value, torch.Tensor))
    if device == "meta" or not torch.is_autocast_enabled(device):
        return nullcontext
    dtype = torch.get_autocast_dtype(device)

    def context() -> AbstractContextManager[Any]:
        return torch.autocast(device, dtype, cache_enabled=False)

    return context
