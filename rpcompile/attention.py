"""Attention whose backward is given the output and log-sum-exp of an earlier forward.

A forward stage runs `with_log_sum_exp` and keeps both results; the backward stage, which has q, k and v from
its recompute, runs `from_kept`: nothing is computed in its forward, and its backward is the fused kernel's,
which needs the two. Where the forward's kernel is the one that scaled_dot_product_attention picks on the
device, every gradient has the same bits as after a recompute.

One table, `_KERNELS`, names the kernels of each device. Those of CUDA have run on tensors without data
only, never on a GPU.

Shapes: query BHSE, key BHTE, value BHTE, output BHSE, log-sum-exp BHS; B batch, H heads (fewer for key and
value where they are grouped), S and T tokens, E entries of a head. An output is kept as BSHE, which is the
order that kernels write it in.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

_ATEN = torch.ops.aten
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_HALF = (torch.float16, torch.bfloat16)
_ALIGNMENT = 32  # what the rows of the memory-efficient kernel's log-sum-exp are rounded up to


@dataclass(frozen=True)
class Call:
    """What decides which kernel can run an attention.

    Attributes:
        query, key, value: The tensors, with or without data.
        attn_mask: Added to the scores, or where they count; None for none.
        dropout_p: Probability of dropout.
        dtype: What it computes in: another than the tensors' under autocast.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    attn_mask: torch.Tensor | None
    dropout_p: float
    dtype: torch.dtype


@dataclass(frozen=True)
class Kernel:
    """A fused attention with its backward.

    Attributes:
        name: Of the ATen operator.
        refuses: Why it cannot run a call; None if it can.
        forward: (query, key, value, mask, is_causal, scale) -> output, log-sum-exp.
        backward: (gradient, query, key, value, mask, output, log-sum-exp, is_causal, scale) -> gradients of
            query, key and value.
        rows: Rows of the log-sum-exp, from those of the query.
    """

    name: str
    refuses: Callable[[Call], str | None]
    forward: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    backward: Callable[..., tuple[torch.Tensor, ...]]
    rows: Callable[[Any], Any] = lambda rows: rows


def find_kernel(device: str, call: Call) -> Kernel | str:
    """The kernel that keeps what `from_kept` needs; or why there is none, in words.

    Args:
        device: "cpu", or anything else for CUDA: data-free tensors stand for those of a GPU.
        call: The attention.
    """
    refused: list[str] = []
    for kernel in _KERNELS["cpu" if device == "cpu" else "cuda"]:
        reason = _unusual(call) or kernel.refuses(call)
        if reason is None:
            return kernel
        refused.append(reason)
    return refused[0]


def log_sum_exp_like(kernel: Kernel | str, output: torch.Tensor) -> torch.Tensor:
    """An empty tensor like the log-sum-exp that `find_kernel`'s answer makes with an output."""
    dtype = torch.float64 if output.dtype == torch.float64 else torch.float32
    rows = output.shape[2] if isinstance(kernel, str) else kernel.rows(output.shape[2])
    return output.new_empty((*output.shape[:2], rows), dtype=dtype)


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
) -> torch.Tensor:
    """The output that `with_log_sum_exp` gave for these arguments; gradients go to query, key and value."""
    kernel, operands = _prepared(query, key, value, attn_mask, kept_output.dtype)
    output = kept_output.transpose(1, 2)
    return _FromKept.apply(kernel, *operands, is_causal, scale, output, log_sum_exp)  # type: ignore[no-any-return]


class _FromKept(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        kernel: Kernel,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        is_causal: bool,
        scale: float | None,
        output: torch.Tensor,
        log_sum_exp: torch.Tensor,
    ) -> torch.Tensor:
        ctx.kernel, ctx.is_causal, ctx.scale = kernel, is_causal, scale
        ctx.save_for_backward(query, key, value, mask, output, log_sum_exp)
        return output.detach()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:  # type: ignore[override]
        found = ctx.kernel.backward(gradient, *ctx.saved_tensors, ctx.is_causal, ctx.scale)
        wanted = ctx.needs_input_grad[1:4]
        kept = (grad if want else None for grad, want in zip(found, wanted, strict=True))
        return None, *kept, None, None, None, None, None


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


# ------------------------------------------------------------------- what each kernel can run


def _unusual(call: Call) -> str | None:
    query, key, value = call.query, call.key, call.value
    if call.dropout_p > 0:
        return f"its dropout of {call.dropout_p:g} would have to be drawn again"
    if {tensor.dim() for tensor in (query, key, value)} != {4}:
        return f"its query has {query.dim()} dimensions, and fused kernels take 4"
    if not query.shape[-1] == key.shape[-1] == value.shape[-1]:
        return f"its values are {value.shape[-1]} wide and its queries {query.shape[-1]}"
    if any(tensor.stride(-1) != 1 for tensor in (query, key, value)):
        return "the entries of its heads do not lie side by side in memory"
    return None


def _cpu_flash_refuses(call: Call) -> str | None:
    if call.dtype not in (*_FLOATS, torch.float64):
        return f"the CPU's flash attention does not take {call.dtype}"
    if call.attn_mask is not None and call.attn_mask.dim() not in (2, 4):
        return f"its mask has {call.attn_mask.dim()} dimensions, and flash attention takes 2 or 4"
    return None


def _cuda_flash_refuses(call: Call) -> str | None:
    size = call.query.shape[-1]
    if call.attn_mask is not None:
        return "it has a mask, and CUDA's flash attention takes none"
    if call.dtype not in _HALF:
        return (
            f"CUDA's flash attention takes float16 and bfloat16, not {str(call.dtype).removeprefix('torch.')}"
        )
    if size > 256 or size % 8:
        return f"its heads are {size} wide; CUDA's flash attention takes multiples of 8 up to 256"
    return None


def _cuda_efficient_refuses(call: Call) -> str | None:
    if call.attn_mask is not None:
        return "it has a mask"
    if call.dtype not in _FLOATS:
        return f"memory-efficient attention does not take {call.dtype}"
    if call.query.shape[1] != call.key.shape[1]:
        return "its heads are grouped, and memory-efficient attention takes no groups"
    if call.query.shape[-1] % 4:
        return (
            f"its heads are {call.query.shape[-1]} wide, and memory-efficient attention takes multiples of 4"
        )
    return None


# ------------------------------------------------------------------- the kernels


def _cpu_flash(query: Any, key: Any, value: Any, mask: Any, is_causal: bool, scale: float | None) -> Any:
    return _ATEN._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, is_causal, attn_mask=mask, scale=scale
    )


def _cpu_flash_backward(
    gradient: Any,
    query: Any,
    key: Any,
    value: Any,
    mask: Any,
    output: Any,
    log_sum_exp: Any,
    is_causal: bool,
    scale: float | None,
) -> Any:
    return _ATEN._scaled_dot_product_flash_attention_for_cpu_backward(
        gradient, query, key, value, output, log_sum_exp, 0.0, is_causal, attn_mask=mask, scale=scale
    )


def _cuda_flash(query: Any, key: Any, value: Any, mask: Any, is_causal: bool, scale: float | None) -> Any:
    return _ATEN._scaled_dot_product_flash_attention(query, key, value, 0.0, is_causal, scale=scale)[:2]


def _cuda_flash_backward(
    gradient: Any,
    query: Any,
    key: Any,
    value: Any,
    mask: Any,
    output: Any,
    log_sum_exp: Any,
    is_causal: bool,
    scale: float | None,
) -> Any:
    # Sequences of one length need no table of where each begins; dropout's seed is not read without any.
    table = query.new_empty(0, dtype=torch.int32)
    seed = query.new_zeros(2, dtype=torch.int64)
    tail = table, table, query.shape[2], key.shape[2], 0.0, is_causal, seed, seed[:0]
    return _ATEN._scaled_dot_product_flash_attention_backward(
        gradient, query, key, value, output, log_sum_exp, *tail, scale=scale
    )


def _cuda_efficient(query: Any, key: Any, value: Any, mask: Any, is_causal: bool, scale: float | None) -> Any:
    return _ATEN._scaled_dot_product_efficient_attention(
        query, key, value, None, True, 0.0, is_causal, scale=scale
    )[:2]


def _cuda_efficient_backward(
    gradient: Any,
    query: Any,
    key: Any,
    value: Any,
    mask: Any,
    output: Any,
    log_sum_exp: Any,
    is_causal: bool,
    scale: float | None,
) -> Any:
    seed = query.new_zeros((), dtype=torch.int64)
    tail = seed, seed, 0.0, [True, True, True, False], is_causal
    return _ATEN._scaled_dot_product_efficient_attention_backward(
        gradient, query, key, value, None, output, log_sum_exp, *tail, scale=scale
    )[:3]


_KERNELS: dict[str, tuple[Kernel, ...]] = {
    "cpu": (
        Kernel(
            "_scaled_dot_product_flash_attention_for_cpu", _cpu_flash_refuses, _cpu_flash, _cpu_flash_backward
        ),
    ),
    "cuda": (
        Kernel("_scaled_dot_product_flash_attention", _cuda_flash_refuses, _cuda_flash, _cuda_flash_backward),
        Kernel(
            "_scaled_dot_product_efficient_attention",
            _cuda_efficient_refuses,
            _cuda_efficient,
            _cuda_efficient_backward,
            rows=lambda rows: -(-rows // _ALIGNMENT) * _ALIGNMENT,
        ),
    ),
}
"""By kind of device, in the order in which scaled_dot_product_attention prefers them."""
