"""Attention whose backward runs group of heads by group of heads, over the memory of q, k and v.

A flash backward sums dq in float32, and with grouped heads makes dk and dv for every query head: as much as
q, k, v and both results together. A key's head and the query heads that read it meet no others, so groups
of them can go one after another with such memory for one group only, and the same numbers come out. What a
group's gradients take is there already: its own q, k and v, which nobody reads afterwards.

The forward is torch's own, whatever kernel its dispatcher picks; but flash attention, where it can run, also
on cards on which torch prefers cuDNN's (Hopper, and Blackwell in data centres), which is not known here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.graph import get_gradient_edge

from rpcompile.attention_kernels import FLASH, Call, Three, find_kernel, kernel_of

if TYPE_CHECKING:
    from collections.abc import Callable

_ATEN = torch.ops.aten


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None,
    dropout_p: float,
    is_causal: bool,
    *,
    scale: float | None,
    enable_gqa: bool,
) -> torch.Tensor:
    call = Call(query, key, value, attn_mask, dropout_p, query.dtype)
    if not torch.is_autocast_enabled("cuda") and find_kernel(query.device.type, call) is FLASH:
        return FLASH.forward(query, key, value, attn_mask, is_causal, scale)[0]
    return _ATEN.scaled_dot_product_attention.default(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )


def attention_by_groups(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    groups: int,
    overwrite: bool,
    attention: Callable[..., torch.Tensor] = _attention,
) -> torch.Tensor:
    """`scaled_dot_product_attention` without dropout.

    Args:
        query: (batch, heads, rows, size), as are `key` and `value`, whose heads divide those of `query`.
        attn_mask: Without a gradient.
        groups: Into how many groups the heads are divided in the backward; divides those of `key`.
        overwrite: Gradients may take the memory of `query`, `key` and `value`: each has its own, and
            neither another operator nor another operator's backward reads it.
        attention: What runs the forward.
    """

    def run(*three: torch.Tensor) -> torch.Tensor:
        return attention(*three, attn_mask, 0.0, is_causal, scale=scale, enable_gqa=enable_gqa)

    if not torch.is_grad_enabled():
        return run(query, key, value)
    result = _ByGroups.apply(run, groups, overwrite, query, key, value)
    assert isinstance(result, torch.Tensor)
    return result


def gradients_by_groups(
    backward: Callable[..., Three],
    gradient: torch.Tensor,
    three: Three,
    mask: torch.Tensor | None,
    output: torch.Tensor,
    log_sum_exp: torch.Tensor,
    groups: int,
    overwrite: bool,
) -> Three:
    """Gradients of query, key and value.

    Args:
        backward: (gradient, query, key, value, mask, output, log-sum-exp) -> the three gradients.
        gradient: Of the output.
        three: query, key and value.
        mask, output, log_sum_exp: As the kernel takes and gave them.
        groups, overwrite: As for `attention_by_groups`.
    """
    if groups == 1 and not overwrite:
        return backward(gradient, *three, mask, output, log_sum_exp)
    # Where a dimension is expanded, numbers share memory.
    if overwrite and all(_is_dense(tensor) for tensor in three):
        found = three
    else:
        found = torch.empty_like(three[0]), torch.empty_like(three[1]), torch.empty_like(three[2])
    for group in range(groups):
        queries, keys = (
            slice(heads * group // groups, heads * (group + 1) // groups)
            for heads in (three[0].shape[1], three[1].shape[1])
        )
        bias = mask if mask is None or mask.dim() < 4 or mask.shape[1] == 1 else mask[:, queries]
        operands = (three[0][:, queries], three[1][:, keys], three[2][:, keys], bias, output[:, queries])
        # CUDA's flash attention takes its numbers to lie side by side.
        made = backward(gradient[:, queries], *operands, log_sum_exp[:, queries].contiguous())
        for target, part, piece in zip(found, (queries, keys, keys), made, strict=True):
            target[:, part].copy_(piece)
        made = piece = None  # before the next ones are there
    return found


class _ByGroups(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, run: Callable[..., torch.Tensor], groups: int, overwrite: bool, *three: torch.Tensor
    ) -> torch.Tensor:
        with torch.enable_grad():
            leaves = [tensor.detach().requires_grad_() for tensor in three]
            result = run(*leaves)
        ctx.groups, ctx.overwrite, ctx.leaves = groups, overwrite, leaves
        ctx.edge = get_gradient_edge(result)
        return result.detach()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:  # type: ignore[override]
        leaves, edge, ctx.leaves, ctx.edge = ctx.leaves, ctx.edge, None, None
        kernel = kernel_of(edge.node.name())
        saved = {} if kernel is None else _saved(edge.node)
        if kernel is None or _differ(saved, leaves):
            # A kernel that is not known here, or one that works on copies: as torch does it.
            return None, None, None, *torch.autograd.grad([edge], leaves, [gradient])
        del edge
        three = saved["query"], saved["key"], saved["value"]
        kept = saved[kernel.mask] if kernel.mask else None, saved["output"], saved[kernel.log_sum_exp]

        def backward(*operands: torch.Tensor | None) -> Three:
            return kernel.backward(saved, *operands)

        found = gradients_by_groups(backward, gradient, three, *kept, ctx.groups, ctx.overwrite)
        return None, None, None, *found


def _is_dense(tensor: torch.Tensor) -> bool:
    return all(stride != 0 or size == 1 for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _saved(node: Any) -> dict[str, Any]:
    """What a backward node keeps, by name, without gradients of its own."""
    names = [name for name in dir(node) if name.startswith("_saved_")]
    values = {name.removeprefix("_saved_"): getattr(node, name) for name in names}
    return {
        name: value.detach() if isinstance(value, torch.Tensor) else value for name, value in values.items()
    }


def _differ(saved: dict[str, Any], leaves: list[torch.Tensor]) -> bool:
    """Whether the kernel ran on other tensors than it was given, e.g. under autocast."""
    kept = [saved[name] for name in ("query", "key", "value")]
    return any(
        mine.untyped_storage()._cdata != given.untyped_storage()._cdata or mine.shape != given.shape
        for mine, given in zip(kept, leaves, strict=True)
    )
