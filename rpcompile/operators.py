"""What operators cost: a registry from operator name to formulas over symbolic shapes.

FLOPs follow `torch.utils.flop_counter.FlopCounterMode`, whose totals are matched exactly, but for three
choices: causal attention is halved (the counter counts the whole square); attention's backward is
that of a fused kernel, five products of matrices, which the counter counts only where such a kernel
runs; the weight gradient of a grouped convolution meets each channel only with its own group (the
counter lets every input channel meet every output channel).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import sympy
import torch
from torch._ops import OpOverload

from rpcompile.prices import UNKNOWN, Call, Operator
from rpcompile.sizes import operator_name

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch.fx import Node

_FLOAT32_BYTES = 4
_INT64_BYTES = 8


# ------------------------------------------------------------------------------ matrix products


def _product(shape: tuple[sympy.Expr, ...]) -> sympy.Expr:
    return sympy.Mul(*shape)


def _matmul_flops(*names: str) -> Callable[[Call], sympy.Expr]:
    """2 M N K: every element of the result is a sum over the last dimension of the first operand."""

    def flops(call: Call) -> sympy.Expr:
        return 2 * _product(call.results[0].shape) * call.operands(*names)[0].shape[-1]

    return flops


def _convolution_flops(call: Call) -> sympy.Expr:
    source, weight = call.operands("input", "weight")
    # A transposed convolution spreads each input element; a plain one gathers for each output element.
    transposed = dict(call.arguments).get("transposed", False)
    points = source.shape if transposed else call.results[0].shape
    return 2 * _product(points) * _product(weight.shape[1:])


def _transposed_convolution_flops(call: Call) -> sympy.Expr:
    source, weight = call.operands("input", "weight")
    return 2 * _product(source.shape) * _product(weight.shape[1:])


def _attention_flops(call: Call, query_products: int, value_products: int) -> sympy.Expr:
    query, key, value = call.operands("query", "key", "value")
    pairs = _product(query.shape[:-1]) * key.shape[-2]
    depth = query_products * query.shape[-1] + value_products * value.shape[-1]
    share = sympy.Rational(1, 2) if call.constant("is_causal") else sympy.Integer(1)
    return 2 * pairs * depth * share


def _attention_backward_flops(call: Call) -> sympy.Expr:
    # One kernel makes all three gradients: the scores again, dQ and dK are as deep as queries, dV and
    # the scores' gradient as values.
    return _attention_flops(call, 3, 2)


def _grouped_flops(call: Call) -> sympy.Expr:
    """2 M K N: each row meets the matrix of its own group only, wherever the group borders lie."""
    left, right = call.operands("self", "mat2") or call.operands("input", "weight")
    groups = left.shape[0] if len(left.shape) == len(right.shape) == 3 else sympy.Integer(1)
    return 2 * groups * left.shape[-2] * left.shape[-1] * right.shape[-1]


def _einsum_flops(call: Call) -> sympy.Expr | None:
    """Two operands: 2 x the product of every index that survives the sums over one operand alone."""
    equation = str(call.constant("equation")).replace(" ", "")
    left, _, output = equation.partition("->")
    terms = left.split(",")
    if len(terms) == 1:
        return sympy.Integer(0)
    if len(terms) != 2 or "." in equation:
        return None
    if "->" not in equation:
        output = "".join(letter for letter in set(left) - {","} if left.count(letter) == 1)
    size = {
        letter: extent
        for term, operand in zip(terms, call.operands("tensors"), strict=True)
        for letter, extent in zip(term, operand.shape, strict=True)
    }
    shared = set(terms[0]) & set(terms[1])
    if shared <= set(output):
        return sympy.Integer(0)  # nothing is contracted: torch multiplies elementwise
    return 2 * _product(tuple(size[letter] for letter in sorted(shared | set(output))))


# ------------------------------------------------------------------------------ kept besides results


def _noise(call: Call) -> sympy.Expr:
    """Dropout's mask; the unfused kernel keeps it in the input's dtype."""
    return call.results[0].nbytes


def _log_softmax(call: Call) -> sympy.Expr:
    """The logarithms, and the sum of the weights that a mean divides by."""
    logits = call.operands("self")[0]
    return logits.nbytes + logits.itemsize


def _row_statistics(call: Call) -> sympy.Expr:
    """Mean and inverse deviation, at most one pair for each row of the last dimension."""
    return 2 * _FLOAT32_BYTES * _product(call.results[0].shape[:-1])


def _normalised(call: Call) -> sympy.Expr:
    """What an unfused root-mean-square norm keeps: the normalised rows and the factor of each."""
    return call.results[0].nbytes + _row_statistics(call)


def _channel_statistics(call: Call) -> sympy.Expr:
    return 2 * _FLOAT32_BYTES * call.results[0].shape[1]


def _log_sum_exp(call: Call) -> sympy.Expr:
    return _FLOAT32_BYTES * _product(call.operands("query")[0].shape[:-1])


def _maximum_positions(call: Call) -> sympy.Expr:
    return _INT64_BYTES * _product(call.results[0].shape)


# ------------------------------------------------------------------------------ the registry

_COUNTER = "torch.utils.flop_counter: "
_BYTES = "bytes: each input and output once; kept: torch's derivative formulas"
_BOUND = "bytes: each input and output once; kept: every input and result (upper bound)"


def _matrix_products() -> Iterator[tuple[str, Operator]]:
    for name, first, second in (
        ("linear", "input", "weight"),
        ("matmul", "self", "other"),
        ("mm", "self", "mat2"),
        ("bmm", "self", "mat2"),
        ("addmm", "mat1", "mat2"),
        ("baddbmm", "batch1", "batch2"),
        ("mv", "self", "vec"),
        ("dot", "self", "tensor"),
    ):
        flops = _matmul_flops(first)
        yield name, Operator("matmul", _COUNTER + "mm_flop", crossed=(first, second), flops=flops)
    for name in ("_grouped_mm", "transformers.grouped_mm_fallback"):
        pair = ("self", "mat2", "input", "weight")  # the operator's own two; the other names are absent
        source = "2 x rows x depth x width, each row in one group (torch.utils.flop_counter has none)"
        yield name, Operator("matmul", source, crossed=pair, flops=_grouped_flops)
    source = _COUNTER + "bmm_flop, for two operands"
    yield "einsum", Operator("matmul", source, crossed=("tensors",), flops=_einsum_flops)
    for name in ("conv1d", "conv2d", "conv3d", "convolution", "_convolution"):
        source = _COUNTER + "conv_flop_count"
        yield name, Operator("convolution", source, crossed=("input", "weight"), flops=_convolution_flops)
    for name in ("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"):
        source, pair = _COUNTER + "conv_flop_count", ("input", "weight")
        yield name, Operator("convolution", source, crossed=pair, flops=_transposed_convolution_flops)
    yield (
        "scaled_dot_product_attention",
        Operator(
            "attention",
            _COUNTER + "sdpa_flop_count and sdpa_backward_flop_count; halved where is_causal",
            keeps=("query", "key", "value", "attn_mask", "result"),
            scratch=_log_sum_exp,
            flops=lambda call: _attention_flops(call, 1, 1),
            backward_flops=_attention_backward_flops,
        ),
    )


# (class, what autograd keeps, operators). In-place forms are found under the plain name.
_BY_BYTES: tuple[tuple[str, str, str], ...] = (
    (
        "elementwise",
        "",
        "add sub rsub neg clone to _to_copy type_as contiguous reshape reshape_as flatten unflatten copy "
        "cat stack pad constant_pad_nd roll flip repeat repeat_interleave tril triu "
        "floor_divide remainder __and__ __or__ __xor__ lift_fresh_copy one_hot "
        "arange zeros ones full empty linspace eye scalar_tensor rand randn randint randperm bernoulli "
        "zeros_like ones_like full_like empty_like rand_like randn_like "
        "new_zeros new_ones new_full new_empty fill detach",
    ),
    ("elementwise", "self", "silu gelu abs cos sin log log1p log2 leaky_relu hardtanh hardswish hardsigmoid"),
    (
        "elementwise",
        "self",
        "relu6 softplus mish clamp clamp_min clamp_max erf elu celu square glu log_sigmoid",
    ),
    ("elementwise", "self exponent", "pow"),
    ("elementwise", "self weight", "prelu"),
    ("elementwise", "result", "exp exp2 expm1 tanh sigmoid sqrt rsqrt reciprocal relu"),
    ("elementwise", "self other", "maximum minimum"),
    ("elementwise", "condition", "where"),
    ("elementwise", "mask", "masked_fill masked_scatter"),
    (
        "reduction",
        "",
        "sum mean cumsum argmax argmin any all histc bincount searchsorted bucketize argsort diff",
    ),
    ("reduction", "", "upsample_nearest1d upsample_nearest2d upsample_bilinear2d upsample_bicubic2d"),
    ("reduction", "result", "softmax log_softmax _softmax _log_softmax topk sort"),
    ("reduction", "self result", "amax amin max min prod var std norm linalg_vector_norm logsumexp"),
    ("reduction", "self", "avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d"),
    ("reduction", "v g", "_weight_norm"),
    ("reduction", "self target", "mse_loss l1_loss smooth_l1_loss huber_loss"),
    (
        "reduction",
        "self target",
        "binary_cross_entropy binary_cross_entropy_with_logits nll_loss nll_loss_nd",
    ),
    ("gather", "index indices", "index_put index_add index_copy scatter scatter_add scatter_reduce"),
)

# (class, what autograd keeps, scratch, operators)
_WITH_SCRATCH: tuple[tuple[str, str, Callable[[Call], sympy.Expr], str], ...] = (
    ("elementwise", "", _noise, "dropout feature_dropout"),
    ("reduction", "input", _row_statistics, "layer_norm group_norm instance_norm"),
    ("reduction", "input", _channel_statistics, "batch_norm"),
    ("reduction", "input", _normalised, "rms_norm"),
    ("reduction", "target", _log_softmax, "cross_entropy_loss"),
    ("reduction", "self", _maximum_positions, "max_pool1d max_pool2d max_pool3d adaptive_max_pool2d"),
)

# (table, operators): they keep their index.
_TABLES = (("weight", "embedding"), ("self", "index index_select gather take_along_dim"))


def _priced_by_bytes() -> Iterator[tuple[str, Operator]]:
    for op_class, keeps, names in _BY_BYTES:
        for name in names.split():
            yield name, Operator(op_class, _BYTES, keeps=tuple(keeps.split()))
    for op_class, keeps, scratch, names in _WITH_SCRATCH:
        for name in names.split():
            yield name, Operator(op_class, _BYTES, keeps=tuple(keeps.split()), scratch=scratch)
    for table, names in _TABLES:
        for name in names.split():
            yield name, Operator("gather", _BYTES, keeps=("index", "indices"), table=table)
    yield "mul", Operator("elementwise", _BYTES, crossed=("self", "other"))
    yield "div", Operator("elementwise", _BYTES, keeps=("other",), crossed=("self", "other"))


_REGISTRY = {
    name if "." in name else f"aten.{name}": operator
    for rows in (_matrix_products(), _priced_by_bytes())
    for name, operator in rows
}
_POINTWISE = Operator("elementwise", _BOUND, keeps=None)


def find(node: Node) -> Operator:
    """The formulas for `node`'s operator; those of an unknown one have the source "bytes only"."""
    name = operator_name(node)
    operator = _REGISTRY.get(name) or _REGISTRY.get(name.removesuffix("_"))
    if operator is not None:
        return operator
    is_pointwise = isinstance(node.target, OpOverload) and torch.Tag.pointwise in node.target.tags
    return _POINTWISE if is_pointwise else UNKNOWN
