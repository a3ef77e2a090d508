"""The cost file: what every operator of a model costs, as expressions in its sizes.

JSON; written by `CapturedModel.save_costs`, read without torch. Each distinct expression stands once in
`expressions`, and operators name it by its position::

    {"format": "rpcompile.costs", "version": 1, "model": "LlamaForCausalLM", "fingerprint": "5d0c...",
     "sizes": {"batch": [1, 1048576], "sequence": [1, 1048576]},
     "expressions": ["0", "1152*batch*sequence", ...],
     "segments": [{"name": "model.layers.0.self_attn", "operators": [
        {"node": "linear", "op_class": "matmul", "source": "...", "forward_flops": 7, ...}, ...]}, ...]}
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec

from rpcompile.errors import InvalidArgument
from rpcompile.expressions import Expression, parse
from rpcompile.files import write_in_one_step

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping

    from rpcompile.ir import CostedGraph

FORMAT, VERSION = "rpcompile.costs", 1
QUANTITIES = (
    "forward_flops",
    "backward_flops",
    "read_bytes",
    "write_bytes",
    "backward_read_bytes",
    "backward_write_bytes",
    "saved_bytes",
)
Index = Annotated[int, msgspec.Meta(ge=0)]


class OperatorCosts(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One node; the quantities of `ir.NodeCost` as positions in `CostFile.expressions`."""

    node: str
    op_class: str
    source: str
    forward_flops: Index
    backward_flops: Index
    read_bytes: Index
    write_bytes: Index
    backward_read_bytes: Index
    backward_write_bytes: Index
    saved_bytes: Index


class SegmentCosts(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The operators between two cuts; rematerialised ones stand in a segment of their own, first."""

    name: str
    operators: tuple[OperatorCosts, ...]


class CostFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A cost file; see the module's text."""

    format: str
    version: int
    model: str
    fingerprint: str
    sizes: dict[str, tuple[int, int]]
    expressions: tuple[str, ...]
    segments: tuple[SegmentCosts, ...]

    @classmethod
    def of(cls, costed: CostedGraph) -> CostFile:
        """The file of a priced graph."""
        capture, places = costed.capture, dict[str, int]()

        def operator_costs(name: str) -> OperatorCosts:
            cost = costed.costs[name]
            indices = {
                quantity: places.setdefault(str(getattr(cost, quantity)), len(places))
                for quantity in QUANTITIES
            }
            return OperatorCosts(name, cost.op_class, cost.source, **indices)

        bounds = [0, *(cut.position for cut in capture.cuts), len(capture.order)]
        names = [*(cut.name for cut in capture.cuts), capture.last_name]
        segments = [
            SegmentCosts(name, tuple(map(operator_costs, capture.order[begin:end])))
            for name, begin, end in zip(names, bounds[:-1], bounds[1:], strict=True)
        ]
        if capture.rematerialised:
            shared = tuple(map(operator_costs, sorted(capture.rematerialised)))
            segments.insert(0, SegmentCosts("rematerialised", shared))
        sizes = {name: (low, high) for name, (low, high) in capture.symbols.items()}
        return cls(
            FORMAT, VERSION, capture.model_name, capture.fingerprint, sizes, tuple(places), tuple(segments)
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the file, all or nothing.

        Raises:
            OSError: It cannot be written.
        """
        write_in_one_step(Path(path), msgspec.json.format(msgspec.json.encode(self), indent=1))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> CostFile:
        """Reads and checks a file.

        Raises:
            InvalidArgument: It cannot be read, is no cost file, or holds an expression that is not allowed.
        """
        try:
            found = msgspec.json.decode(Path(path).read_bytes(), type=cls)
        except (OSError, msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise InvalidArgument(f"cost file {path} cannot be read: {error}") from error
        if (found.format, found.version) != (FORMAT, VERSION):
            raise InvalidArgument(
                f"{path} has format {found.format!r} version {found.version}; this rpcompile reads "
                f"{FORMAT!r} version {VERSION}"
            )
        found.parsed()
        for segment in found.segments:
            for operator in segment.operators:
                for quantity in QUANTITIES:
                    if getattr(operator, quantity) >= len(found.expressions):
                        raise InvalidArgument(
                            f"cost file {path}: {quantity} of {operator.node} is expression "
                            f"{getattr(operator, quantity)} of {len(found.expressions)}"
                        )
        return found

    def parsed(self) -> tuple[Expression, ...]:
        """The expressions, ready to evaluate.

        Raises:
            InvalidArgument: One of them is not allowed.
        """
        return tuple(parse(text, self.sizes) for text in self.expressions)

    def totals(self, sizes: Mapping[str, int]) -> dict[str, dict[str, float]]:
        """Segment name -> quantity -> its sum over the segment's operators, at these sizes.

        Raises:
            InvalidArgument: A size is missing or outside its range.
        """
        for name, (low, high) in self.sizes.items():
            if not low <= sizes.get(name, low - 1) <= high:
                raise InvalidArgument(
                    f"{name}={sizes.get(name)} is outside the captured range {low} to {high}"
                )
        values = [expression.evaluate(sizes) for expression in self.parsed()]
        return {
            segment.name: {
                quantity: sum(values[getattr(operator, quantity)] for operator in segment.operators)
                for quantity in QUANTITIES
            }
            for segment in self.segments
        }
