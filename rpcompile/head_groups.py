"""Attention whose backward runs group of heads by group of heads, over the memory of q, k and v.

A flash backward sums dq in float32, and with grouped heads makes dk and dv for every query head: as much as
q, k, v and both results together. A key's head and the query heads that read it meet no others, so groups
of them can go one after another with such memory for one group only, and the same numbers come out. What a
group's gradients take is there already: its own q, k and v, which nobody reads afterwards.

The forward is torch's own, whatever kernel its dispatcher picks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.graph import get_gradient_edge

if TYPE_CHECKING:
    from collections.abc import Callable

_ATEN = torch.ops.aten
_Three = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


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
    attention: Callable[..., torch.Tensor] = _ATEN.scaled_dot_product_attention.default,
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
        rule = _BACKWARD.get(edge.node.name())
        saved = None if rule is None else _saved(edge.node)
        if rule is None or saved is None or _differ(saved, leaves):
            # A kernel that is not known here, or one that works on copies: as torch does it.
            return None, None, None, *torch.autograd.grad([edge], leaves, [gradient])
        del edge
        return None, None, None, *_by_groups(ctx, rule, saved, gradient)


def _by_groups(ctx: Any, rule: Callable[..., Any], saved: dict[str, Any], gradient: torch.Tensor) -> _Three:
    three = saved["query"], saved["key"], saved["value"]
    # Where a dimension is expanded, numbers share memory.
    overwrite = ctx.overwrite and all(_is_dense(tensor) for tensor in three)
    found = three if overwrite else tuple(torch.empty_like(tensor) for tensor in three)
    heads = three[0].shape[1], three[1].shape[1], three[2].shape[1]
    for group in range(ctx.groups):
        mine = [slice(n * group // ctx.groups, n * (group + 1) // ctx.groups) for n in heads]
        made = rule(saved, gradient[:, mine[0]], mine[0], mine[1])
        for target, part, piece in zip(found, mine, made, strict=True):
            target[:, part].copy_(piece)
        del made, piece
    return found  # type: ignore[return-value]


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


# ------------------------------------------------------------------------------ the kernels' backwards


def _flash_cpu(saved: dict[str, Any], gradient: torch.Tensor, queries: slice, keys: slice) -> _Three:
    mask = _mask(saved["attn_mask"], queries)
    return _ATEN._scaled_dot_product_flash_attention_for_cpu_backward.default(
        gradient,
        *_part(saved, "logsumexp", queries, keys),
        0.0,
        saved["is_causal"],
        attn_mask=mask,
        scale=saved["scale"],
    )


def _flash(saved: dict[str, Any], gradient: torch.Tensor, queries: slice, keys: slice) -> _Three:
    sequences = (saved[name] for name in ("cum_seq_q", "cum_seq_k", "max_q", "max_k"))
    return _ATEN._scaled_dot_product_flash_attention_backward.default(
        gradient,
        *_part(saved, "logsumexp", queries, keys),
        *sequences,
        0.0,
        saved["is_causal"],
        saved["rng_state"],
        saved["unused"],
        scale=saved["scale"],
    )


def _efficient(saved: dict[str, Any], gradient: torch.Tensor, queries: slice, keys: slice) -> _Three:
    query, key, value, output, logsumexp = _part(saved, "log_sumexp", queries, keys)
    return _ATEN._scaled_dot_product_efficient_attention_backward.default(
        gradient,
        query,
        key,
        value,
        _mask(saved["attn_bias"], queries),
        output,
        logsumexp,
        saved["philox_seed"],
        saved["philox_offset"],
        0.0,
        [True, True, True, False],
        saved["is_causal"],
        scale=saved["scale"],
    )[:3]


def _part(
    saved: dict[str, Any], logsumexp: str, queries: slice, keys: slice
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    return (
        saved["query"][:, queries],
        saved["key"][:, keys],
        saved["value"][:, keys],
        saved["output"][:, queries],
        saved[logsumexp][:, queries],
    )


def _mask(mask: torch.Tensor | None, queries: slice) -> torch.Tensor | None:
    return mask if mask is None or mask.dim() < 4 or mask.shape[1] == 1 else mask[:, queries]


# By the name of autograd's node. The two of CUDA have not been run on a GPU.
_BACKWARD = {
    "ScaledDotProductFlashAttentionForCpuBackward0": _flash_cpu,
    "ScaledDotProductFlashAttentionBackward0": _flash,
    "ScaledDotProductEfficientAttentionBackward0": _efficient,
}
