"""Attention whose backward is given the output and log-sum-exp of an earlier forward.

A forward stage runs `with_log_sum_exp` and keeps both results; the backward stage, which has q, k and v from
its recompute, runs `from_kept`: nothing is computed in its forward, and its backward is the fused kernel's,
which needs the two. Where the forward's kernel is the one that scaled_dot_product_attention picks on the
device, every gradient has the same bits as after a recompute.

Shapes are those of `rpcompile/attention_kernels.py`. An output is kept as BSHE, which is the order that
kernels write it in.
"""

from __future__ import annotations

from typing import Any

import torch

from rpcompile.attention_kernels import Call, Kernel, Three, find_kernel
from rpcompile.head_groups import gradients_by_groups


def with_log_sum_exp(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None,
    is_causal: bool,
    scale: float | None,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """scaled_dot_product_attention without autograd, with the log-sum-exp of the scores.

    Args:
        query, key, value, attn_mask, is_causal, scale: As for `scaled_dot_product_attention`; fewer heads of
            key and value are grouped.
        dtype: What it computes in; the tensors are cast to it, as autocast would.

    Returns:
        Output; and what is kept: the output again (BSHE, the same memory), and log-sum-exp.
    """
    kernel, operands = _prepared(query, key, value, attn_mask, dtype)
    output, log_sum_exp = kernel.forward(*operands, is_causal, scale)
    return output, output.transpose(1, 2), log_sum_exp


def from_kept(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None,
    is_causal: bool,
    scale: float | None,
    kept_output: torch.Tensor,
    log_sum_exp: torch.Tensor,
    groups: int = 1,
    overwrite: bool = False,
) -> torch.Tensor:
    """The output that `with_log_sum_exp` gave for these arguments; gradients go to query, key and value.

    Args:
        query, key, value, attn_mask, is_causal, scale: As there.
        kept_output, log_sum_exp: What it said is kept.
        groups, overwrite: As for `head_groups.attention_by_groups`.
    """
    kernel, operands = _prepared(query, key, value, attn_mask, kept_output.dtype)
    output = kept_output.transpose(1, 2)
    how = kernel, is_causal, scale, groups, overwrite
    return _FromKept.apply(how, *operands, output, log_sum_exp)  # type: ignore[no-any-return]


class _FromKept(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        how: tuple[Kernel, bool, float | None, int, bool],
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        output: torch.Tensor,
        log_sum_exp: torch.Tensor,
    ) -> torch.Tensor:
        ctx.how = how
        ctx.save_for_backward(query, key, value, mask, output, log_sum_exp)
        return output.detach()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:  # type: ignore[override]
        kernel, is_causal, scale, groups, overwrite = ctx.how
        query, key, value, mask, output, log_sum_exp = ctx.saved_tensors
        saved = {"is_causal": is_causal, "scale": scale, **kernel.details(query, key)}

        def backward(*operands: torch.Tensor | None) -> Three:
            return kernel.backward(saved, *operands)

        three = query.detach(), key.detach(), value.detach()
        found = gradients_by_groups(backward, gradient, three, mask, output, log_sum_exp, groups, overwrite)
        wanted = ctx.needs_input_grad[1:4]
        kept = (grad if want else None for grad, want in zip(found, wanted, strict=True))
        return None, *kept, None, None, None


def _prepared(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None,
    dtype: torch.dtype,
) -> tuple[Kernel, tuple[torch.Tensor | None, ...]]:
    """The kernel, and its operands as scaled_dot_product_attention makes them."""
    kernel = find_kernel(query.device.type, Call(query, key, value, attn_mask, 0.0, dtype))
    if isinstance(kernel, str):
        # A plan for one device that runs on another.
        raise TypeError(f"attention outputs cannot be kept: {kernel}; use attention='recompute'")
    mask = attn_mask
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.where(mask, 0.0, float("-inf"))
    operands = (query, key, value, mask)
    return kernel, tuple(None if item is None else item.to(dtype) for item in operands)
