"""From the caller's batch to microbatches, and from their outputs back to one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.utils import _pytree as pytree

from rpcompile.errors import BatchError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rpcompile.ir import Capture, InputSpec
    from rpcompile.runtime.stage_runner import Tensors


def named_batch(capture: Capture, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensors:
    """The batch by input name, checked against what was captured.

    Raises:
        BatchError: A tensor is missing, unknown, or has another dtype or shape than captured.
    """
    given = {**{str(index): value for index, value in enumerate(args)}, **kwargs}
    expected = {spec.name: spec for spec in capture.inputs}
    missing, unknown = sorted(expected.keys() - given.keys()), sorted(given.keys() - expected.keys())
    if missing or unknown:
        parts = [f"missing {missing}"] * bool(missing) + [f"not captured {unknown}"] * bool(unknown)
        raise BatchError(
            f"the batch does not match the inputs compiled for ({sorted(expected)}): {', '.join(parts)}. "
            f"Compile with example_inputs that hold every tensor you will pass."
        )
    for name, spec in expected.items():
        _check(spec, given[name])
    return {name: given[name] for name in expected}


def _check(spec: InputSpec, value: Any) -> None:
    if not isinstance(value, torch.Tensor):
        raise BatchError(f"input {spec.name!r} must be a tensor, not {type(value).__name__}")
    if value.device.type != "cpu":
        raise BatchError(
            f"input {spec.name!r} is on {value.device}; pass it on the host: it is copied for you"
        )
    dtype = str(value.dtype).removeprefix("torch.")
    if dtype != spec.dtype:
        raise BatchError(f"input {spec.name!r} is {dtype}, compiled for {spec.dtype}")
    fits = len(value.shape) == len(spec.shape) and all(
        isinstance(want, str) or want == size or (index == spec.batch_dim and size % want == 0)
        for index, (want, size) in enumerate(zip(spec.shape, value.shape, strict=True))
    )
    if not fits:
        raise BatchError(
            f"input {spec.name!r} has shape {tuple(value.shape)}, compiled for {spec.shape}; sizes that are "
            f"numbers are fixed: pad to them, or compile with example_inputs of the size you pass"
        )


def split_batch(capture: Capture, batch: Tensors, microbatches: int) -> list[Tensors]:
    """Parts along each input's batch dimension; inputs without one go whole to every part.

    Parts are equal, or else the first ones have one row more.

    Raises:
        BatchError: The batch has fewer rows than there are microbatches.
    """
    parts: list[Tensors] = [{} for _ in range(microbatches)]
    for spec in capture.inputs:
        value = batch[spec.name]
        if spec.batch_dim is None:
            for part in parts:
                part[spec.name] = value
            continue
        size = value.shape[spec.batch_dim]
        if size < microbatches:
            raise BatchError(
                f"a batch of {size} ({spec.name!r}) does not divide into {microbatches} microbatches; pass "
                f"at least {microbatches} rows, or compile with microbatches={max(size, 1)}"
            )
        for part, chunk in zip(parts, value.tensor_split(microbatches, spec.batch_dim), strict=True):
            part[spec.name] = chunk
    return parts


def row_weights(capture: Capture, parts: Sequence[Tensors]) -> list[float] | None:
    """Each part's share of the batch's rows; None where all are equal."""
    batched = [(spec.name, spec.batch_dim) for spec in capture.inputs if spec.batch_dim is not None]
    if not batched:
        return None
    name, dim = batched[0]
    rows = [part[name].shape[dim] for part in parts]
    return None if len(set(rows)) == 1 else [count / sum(rows) for count in rows]


def microbatch_sizes(capture: Capture, part: Tensors) -> dict[str, int]:
    """Symbol -> size in one microbatch.

    Raises:
        BatchError: Two inputs disagree, or a size is outside the captured range.
    """
    sizes: dict[str, int] = {}
    for spec in capture.inputs:
        for want, size in zip(spec.shape, part[spec.name].shape, strict=True):
            if isinstance(want, int):
                if want != size:
                    raise BatchError(f"a microbatch of {spec.name!r} has size {size}, compiled for {want}")
                continue
            if sizes.setdefault(want, size) != size:
                raise BatchError(f"input {spec.name!r} has {want} {size}, other inputs have {sizes[want]}")
            low, high = capture.symbols[want]
            if not low <= size <= high:
                raise BatchError(
                    f"{want} is {size} in a microbatch of {spec.name!r}; the model was captured for "
                    f"{low} to {high}"
                )
    return sizes


def largest_divisor(size: int, limit: int) -> int:
    """The largest number up to `limit` that divides `size`."""
    return max((divisor for divisor in range(1, limit + 1) if size % divisor == 0), default=1)


def evaluation_parts(capture: Capture, batch: Tensors, most: int) -> int:
    """How many microbatches a batch to be evaluated is split into, of any size that was captured.

    Args:
        batch: As `named_batch` returns it.
        most: Largest number, where the microbatch's size is not fixed.

    Raises:
        BatchError: The batch is empty.
    """
    for spec in capture.inputs:
        if spec.batch_dim is None:
            continue
        size, want = batch[spec.name].shape[spec.batch_dim], spec.shape[spec.batch_dim]
        if not size:
            raise BatchError("the batch is empty")
        return size // want if isinstance(want, int) else max(1, min(most, size // capture.symbols[want][0]))
    return 1


def total_loss(
    capture: Capture, outputs: Sequence[Tensors], shares: Sequence[float] | None, summed: bool
) -> torch.Tensor:
    """The whole batch's loss, a scalar of at least float32.

    Args:
        outputs: Of each microbatch, by node name.
        shares: Each microbatch's share of the rows; None where all are equal.
        summed: The losses are parts of a sum already, by `num_items_in_batch`.
    """
    losses = [made[capture.outputs[0]] for made in outputs]
    total = torch.zeros((), dtype=torch.promote_types(losses[0].dtype, torch.float32))
    for number, loss in enumerate(losses):
        total += loss if summed else loss / len(losses) if shares is None else loss * shares[number]
    return total


def join_outputs(
    capture: Capture, parts: Sequence[Tensors], shares: Sequence[float] | None, loss: torch.Tensor
) -> Any:
    """The model's output for the whole batch, in the form the model returns it.

    Tensors are concatenated along their batch dimension. Those without one that depend on the batch are
    averaged over microbatches by rows, or added if they are not floating-point (counts). Where the batch is
    fixed, the batch dimension is the first one of its size. Outputs made before the last segment are None.

    Args:
        parts: Outputs of each microbatch, by node name.
        shares: As for `total_loss`.
        loss: What the loss is for the whole batch.
    """
    output = next(node for node in capture.graph_module.graph.nodes if node.op == "output")
    batch = _Batch.of(capture)

    def join(node: Any) -> torch.Tensor | None:
        if not isinstance(node, torch.fx.Node) or node.name not in parts[0]:
            return None
        if node.name == capture.outputs[0]:
            return loss.to(parts[0][node.name].dtype)
        tensors = [part[node.name] for part in parts]
        if len(tensors) == 1 or node not in batch.dependent:
            return tensors[0]
        dim = batch.dim(node)
        if dim is not None:
            return torch.cat(tensors, dim)
        if not (tensors[0].is_floating_point() or tensors[0].is_complex()):
            return torch.stack(tensors).sum(0).to(tensors[0].dtype)
        if shares is None:
            return torch.stack(tensors).mean(0)
        return sum((tensor * share for tensor, share in zip(tensors, shares, strict=True)), tensors[0] * 0)

    return pytree.tree_unflatten([join(node) for node in output.args[0]], capture.output_spec)  # type: ignore[arg-type]


@dataclass(frozen=True)
class _Batch:
    """Where the batch is found in a captured graph.

    Attributes:
        size: A microbatch's rows: a symbol of the graph's sizes, or a number where they are fixed.
        dependent: The nodes that come from inputs with a batch dimension.
    """

    size: int | str
    dependent: frozenset[torch.fx.Node]

    @classmethod
    def of(cls, capture: Capture) -> _Batch:
        dims = {spec.placeholder: spec.batch_dim for spec in capture.inputs if spec.batch_dim is not None}
        size: int | str = ""
        dependent: set[torch.fx.Node] = set()
        for node in capture.graph_module.graph.nodes:
            if node.name in dims:
                rows = node.meta["val"].shape[dims[node.name]]
                size = rows if isinstance(rows, int) else str(rows.node.expr)
                dependent.add(node)
            elif not dependent.isdisjoint(node.all_input_nodes):
                dependent.add(node)
        return cls(size, frozenset(dependent))

    def dim(self, node: torch.fx.Node) -> int | None:
        """The batch dimension of a node's value; None if it has none."""
        shape = node.meta["val"].shape
        if isinstance(self.size, str):
            holds = [self.size in _symbols(length) for length in shape]
        else:
            holds = [length == self.size for length in shape]
            if True not in holds and shape:  # rows and another dimension may be one: (B, S, V) as (B S, V)
                holds = [isinstance(shape[0], int) and shape[0] % self.size == 0]
        return holds.index(True) if True in holds else None


def _symbols(size: int | torch.SymInt) -> set[str]:
    return set() if isinstance(size, int) else {str(symbol) for symbol in size.node.expr.free_symbols}
