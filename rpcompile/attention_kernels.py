"""The fused attention kernels: what each can run, its forward, and its backward from what was kept.

One table, `KERNELS`, names those of each device. Those of CUDA have run on tensors without data only, never
on a GPU.

Shapes: query BHSE, key BHTE, value BHTE, output BHSE, log-sum-exp BHS; B batch, H heads (fewer for key and
value where they are grouped), S and T tokens, E entries of a head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

_ATEN = torch.ops.aten
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_HALF = (torch.float16, torch.bfloat16)
_ALIGNMENT = 32  # what the rows of the memory-efficient kernel's log-sum-exp are rounded up to

Three = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Query, key and value, or their gradients."""


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
        node: Of autograd's node for its backward.
        mask, log_sum_exp: Under what names the node keeps them; "" for a kernel without a mask.
        refuses: Why it cannot run a call; None if it can.
        forward: (query, key, value, mask, is_causal, scale) -> output, log-sum-exp.
        details: (query, key) -> what else its backward reads of a forward without dropout.
        backward: (details with "is_causal" and "scale", or all that the node keeps; gradient, query, key,
            value, mask, output, log-sum-exp) -> gradients of query, key and value.
        rows: Rows of the log-sum-exp, from those of the query.
    """

    name: str
    node: str
    mask: str
    log_sum_exp: str
    refuses: Callable[[Call], str | None]
    forward: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    details: Callable[[torch.Tensor, torch.Tensor], dict[str, Any]]
    backward: Callable[..., Three]
    rows: Callable[[Any], Any] = lambda rows: rows


def find_kernel(device: str, call: Call) -> Kernel | str:
    """The kernel that keeps what a later backward needs; or why there is none, in words.

    Args:
        device: "cpu", or anything else for CUDA: data-free tensors stand for those of a GPU.
        call: The attention.
    """
    refused: list[str] = []
    for kernel in KERNELS["cpu" if device == "cpu" else "cuda"]:
        reason = _unusual(call) or kernel.refuses(call)
        if reason is None:
            return kernel
        refused.append(reason)
    return refused[0]


def kernel_of(node: str) -> Kernel | None:
    """The kernel whose backward is autograd's node of this name; None if it is none of these."""
    return next((kernel for kernels in KERNELS.values() for kernel in kernels if kernel.node == node), None)


def log_sum_exp_like(kernel: Kernel | str, output: torch.Tensor) -> torch.Tensor:
    """An empty tensor like the log-sum-exp that `find_kernel`'s answer makes with an output."""
    dtype = torch.float64 if output.dtype == torch.float64 else torch.float32
    rows = output.shape[2] if isinstance(kernel, str) else kernel.rows(output.shape[2])
    return output.new_empty((*output.shape[:2], rows), dtype=dtype)


# ------------------------------------------------------------------- what each can run


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
    saved: Mapping[str, Any], gradient: Any, query: Any, key: Any, value: Any, mask: Any, *results: Any
) -> Three:
    return _ATEN._scaled_dot_product_flash_attention_for_cpu_backward(
        gradient, query, key, value, *results, 0.0, saved["is_causal"], attn_mask=mask, scale=saved["scale"]
    )


def _cuda_flash(query: Any, key: Any, value: Any, mask: Any, is_causal: bool, scale: float | None) -> Any:
    return _ATEN._scaled_dot_product_flash_attention(query, key, value, 0.0, is_causal, scale=scale)[:2]


def _cuda_flash_details(query: torch.Tensor, key: torch.Tensor) -> dict[str, Any]:
    # A table of where each sequence begins, even an empty one, would say that they are packed into one;
    # dropout's seed is not read without any.
    seed, offset = (query.new_empty(shape, dtype=torch.uint64) for shape in ((2,), ()))
    lengths = {"max_q": query.shape[2], "max_k": key.shape[2]}
    return {"cum_seq_q": None, "cum_seq_k": None, **lengths, "rng_state": seed, "unused": offset}


def _cuda_flash_backward(
    saved: Mapping[str, Any], gradient: Any, query: Any, key: Any, value: Any, _mask: Any, *results: Any
) -> Three:
    sequences = (saved[name] for name in ("cum_seq_q", "cum_seq_k", "max_q", "max_k"))
    tail = 0.0, saved["is_causal"], saved["rng_state"], saved["unused"]
    return _ATEN._scaled_dot_product_flash_attention_backward(
        gradient, query, key, value, *results, *sequences, *tail, scale=saved["scale"]
    )


def _cuda_efficient(query: Any, key: Any, value: Any, mask: Any, is_causal: bool, scale: float | None) -> Any:
    return _ATEN._scaled_dot_product_efficient_attention(
        query, key, value, None, True, 0.0, is_causal, scale=scale
    )[:2]


def _cuda_efficient_details(query: torch.Tensor, key: torch.Tensor) -> dict[str, Any]:
    seed = query.new_zeros((), dtype=torch.int64)
    return {"philox_seed": seed, "philox_offset": seed}


def _cuda_efficient_backward(
    saved: Mapping[str, Any], gradient: Any, query: Any, key: Any, value: Any, mask: Any, *results: Any
) -> Three:
    tail = saved["philox_seed"], saved["philox_offset"], 0.0, [True, True, True, False], saved["is_causal"]
    return _ATEN._scaled_dot_product_efficient_attention_backward(
        gradient, query, key, value, mask, *results, *tail, scale=saved["scale"]
    )[:3]


FLASH = Kernel(
    name="_scaled_dot_product_flash_attention",
    node="ScaledDotProductFlashAttentionBackward0",
    mask="",
    log_sum_exp="logsumexp",
    refuses=_cuda_flash_refuses,
    forward=_cuda_flash,
    details=_cuda_flash_details,
    backward=_cuda_flash_backward,
)
"""CUDA's flash attention."""
KERNELS: dict[str, tuple[Kernel, ...]] = {
    "cpu": (
        Kernel(
            name="_scaled_dot_product_flash_attention_for_cpu",
            node="ScaledDotProductFlashAttentionForCpuBackward0",
            mask="attn_mask",
            log_sum_exp="logsumexp",
            refuses=_cpu_flash_refuses,
            forward=_cpu_flash,
            details=lambda query, key: {},
            backward=_cpu_flash_backward,
        ),
    ),
    "cuda": (
        FLASH,
        Kernel(
            name="_scaled_dot_product_efficient_attention",
            node="ScaledDotProductEfficientAttentionBackward0",
            mask="attn_bias",
            log_sum_exp="log_sumexp",
            refuses=_cuda_efficient_refuses,
            forward=_cuda_efficient,
            details=_cuda_efficient_details,
            backward=_cuda_efficient_backward,
            rows=lambda rows: -(-rows // _ALIGNMENT) * _ALIGNMENT,
        ),
    ),
}
"""By kind of device, in the order in which scaled_dot_product_attention prefers them. Not among them is
cuDNN's attention, which it prefers to both on Hopper and on Blackwell in data centres."""
