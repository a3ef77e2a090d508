"""What kernels of a device do that tensors without data do not show.

Two things make the memory of an operator depend on the device. Some composite operators choose another
kernel, which keeps other tensors for the backward; data-free tensors get the slowest, so the device's is
called by name. And kernels allocate workspaces inside themselves.

Left out: cuBLAS's fixed workspaces (8 MiB, on Hopper 32, for each thread and stream), cuDNN's (chosen by its
benchmark, up to the free memory it is given), cuDNN's reserve space of a batch norm, and split-K products'
partial sums.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from rpcompile.head_groups import attention_by_groups

if TYPE_CHECKING:
    from collections.abc import Mapping

_ATEN = torch.ops.aten
_LINEAR = _ATEN.linear.default
_SDPA = _ATEN.scaled_dot_product_attention.default
_HALF = (torch.float16, torch.bfloat16)
_FP32 = 4
_INT64 = 8


@dataclass(frozen=True)
class Kernels:
    """The kernels of one kind of device.

    Attributes:
        kind: "cuda" or "cpu".
    """

    kind: str

    @property
    def device(self) -> str:
        """Where data-free tensors are said to be. Those of a GPU abort a build of torch without CUDA."""
        return "cpu" if self.kind == "cpu" else "meta"

    def allocated(self, nbytes: int) -> int:
        """What the allocator takes for one tensor: CUDA's deals in multiples of 512 bytes."""
        return nbytes if self.kind == "cpu" else -(-nbytes // 512) * 512

    def call(self, target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Runs an operator as the device would, as far as the tensors that autograd keeps go."""
        if target is attention_by_groups:
            return attention_by_groups(
                *args, **kwargs, attention=_attention if self.kind == "cuda" else _SDPA
            )
        if self.kind == "cuda" and target is _SDPA:
            return _attention(*args, **kwargs)
        if self.kind == "cuda" and target is _ATEN.dropout.default and args[2] and args[1] > 0:
            return _ATEN.native_dropout.default(*args)[0]
        if target is _LINEAR and _adds_bias_in_place(*args):
            x, weight, bias = args
            return _ATEN.add_.Tensor(_ATEN.matmul.default(x, _ATEN.t.default(weight)), bias)
        return target(*args, **kwargs)

    def workspace_bytes(self, operator: Any, args: tuple[Any, ...]) -> int:
        """Bytes that the operator's kernel allocates and gives back before it is over."""
        rule = (_CUDA if self.kind == "cuda" else _CPU).get(operator)
        return rule(args) if rule else 0


def _adds_bias_in_place(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> bool:
    """Whether a linear layer is a product and a sum: in place, but a mode that looks on makes it another.

    Source: linear in aten/src/ATen/native/Linear.cpp.
    """
    autocast = torch.is_autocast_enabled("cpu")  # which would cast the bias to another dtype
    return bias is not None and x.dim() > 2 and not x.is_contiguous() and not autocast


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """The kernel that torch's dispatcher picks on a consumer GPU from Ampere on.

    Flash for 16-bit numbers without a mask and heads of up to 256, the values' as wide as the keys';
    memory-efficient attention for others whose heads are not grouped; else the products written out. Hopper,
    and Blackwell in data centres, prefer cuDNN's, whose workspaces are its own affair.

    Source: aten/src/ATen/native/transformers/cuda/sdp_utils.cpp.
    """
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    size = query.shape[-1]
    flash = query.dtype in _HALF and size == value.shape[-1] and size <= 256 and size % 8 == 0
    if attn_mask is None and flash:
        return _ATEN._scaled_dot_product_flash_attention.default(
            query, key, value, dropout_p, is_causal, False, scale=scale
        )[0]
    if query.shape[1] == key.shape[1] and size % 4 == 0:
        if attn_mask is not None:
            if attn_mask.dtype == torch.bool:
                attn_mask = torch.where(attn_mask, 0.0, float("-inf")).to(query.dtype)
            attn_mask = attn_mask.expand(*query.shape[:3], key.shape[2])
        keep = any(tensor.requires_grad for tensor in (query, key, value))
        return _ATEN._scaled_dot_product_efficient_attention.default(
            query, key, value, attn_mask, keep, dropout_p, is_causal, scale=scale
        )[0]
    return _SDPA(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _flash_backward(args: tuple[Any, ...]) -> int:
    """The sum of dq in float32, a float32 number a row, and dk and dv for every query head under grouping.

    Source: mha_bwd in aten/src/ATen/native/transformers/cuda/flash_attn/flash_api.cpp, and its caller in
    ../attention_backward.cu, which makes the result and its gradient contiguous.
    """
    query, key = args[1], args[2]
    batch, heads, rows, size = query.shape
    rows = _up(rows, 128)
    sums = batch * heads * rows * _up(size, 32 if size <= 128 else 64)
    expanded = 0 if key.shape[1] == heads else 2 * batch * heads * key.shape[2] * size * key.element_size()
    return _FP32 * (sums + batch * heads * rows) + expanded + _if_copied(args[0]) + _if_copied(args[4])


def _if_copied(heads: torch.Tensor) -> int:
    """Bytes of (batch, heads, rows, size) where (batch, rows, heads, size) are not contiguous."""
    return 0 if heads.transpose(1, 2).is_contiguous() else heads.numel() * heads.element_size()


def _efficient_backward(args: tuple[Any, ...]) -> int:
    """A float32 number a row, and the sum of dq in float32 where q is shorter than that.

    Source: _efficient_attention_backward in aten/src/ATen/native/transformers/cuda/attention_backward.cu
    and its kernel's `workspace_gq`.
    """
    query = args[1]
    batch, heads, rows, size = query.shape
    sums = batch * heads * _up(rows, 64) * size if query.dtype in _HALF else 0
    return _FP32 * (batch * heads * _up(rows, 32) + sums)


def _scatter(args: tuple[Any, ...]) -> int:
    """The position of each element among those that are scattered, and the mask at full size.

    Source: masked_scatter_cuda in aten/src/ATen/native/cuda/IndexKernel.cpp.
    """
    return args[0].numel() * (_INT64 + 1)


def _scatter_backward(args: tuple[Any, ...]) -> int:
    """An index for each dimension of each element that is selected.

    Source: masked_select_out_cuda_impl in aten/src/ATen/native/cuda/IndexKernel.cpp.
    """
    gradient, sizes = args[0], args[2]
    return torch.Size(sizes).numel() * gradient.dim() * _INT64


def _cpu_scatter_backward(args: tuple[Any, ...]) -> int:
    """The mask and its prefix sums at full size, as integers.

    Source: masked_select_out_impl_cpu in aten/src/ATen/native/TensorAdvancedIndexing.cpp.
    """
    return 2 * args[0].numel() * _INT64


def _cpu_blocks(query: torch.Tensor, key: torch.Tensor) -> tuple[int, int]:
    """Rows of q and of k that a thread of the CPU's flash attention has in hand at once."""
    rows = query.shape[2]
    return min(rows, 256 if rows >= 768 else 64 if rows >= 192 else 32), min(512, key.shape[2])


def _cpu_flash_forward(args: tuple[Any, ...]) -> int:
    """Each thread's block of scores, its results and two numbers a row, in float32.

    Source: aten/src/ATen/native/cpu/FlashAttentionKernel.cpp, as are the blocks; checked by measurement.
    """
    query, key = args[0], args[1]
    rows, columns = _cpu_blocks(query, key)
    reduced = rows * columns * query.element_size() if query.dtype in _HALF else 0
    return torch.get_num_threads() * (_FP32 * rows * (columns + 2 + query.shape[3]) + reduced)


def _cpu_flash_backward(args: tuple[Any, ...]) -> int:
    """Each thread's two blocks of scores, again in 16 bits if that is the dtype; the gradient, contiguous.

    Source: as forward.
    """
    query, key = args[1], args[2]
    rows, columns = _cpu_blocks(query, key)
    reduced = query.element_size() if query.dtype in _HALF else 0
    blocks = 2 * torch.get_num_threads() * rows * columns * (_FP32 + reduced)
    return blocks + _FP32 * rows + _if_copied(args[0])


def _cpu_convolution(args: tuple[Any, ...]) -> int:
    """oneDNN's copies of input and weight in its own layout, or of the result.

    Measured; where oneDNN needs no copy it is too much. Without oneDNN: every window of the input.
    """
    x, weight = args[0], args[1]
    if not torch.backends.mkldnn.enabled:  # pyright: ignore[reportAttributeAccessIssue]
        columns, results = _columns(x, weight, args[3], args[4], args[6], args[8])
        return columns + results
    return x.nbytes + weight.nbytes


def _cpu_convolution_backward(args: tuple[Any, ...]) -> int:
    """oneDNN's copies of gradient and input in its own layout; see `_cpu_convolution`."""
    gradient, x, weight = args[:3]
    if not torch.backends.mkldnn.enabled:  # pyright: ignore[reportAttributeAccessIssue]
        copied = 0 if gradient.is_contiguous() else gradient.nbytes
        columns, _ = _columns(x, weight, args[4], args[5], args[7], args[9])
        return copied + columns + (x.nbytes + weight.nbytes if args[9] > 1 else 0)
    return gradient.nbytes + x.nbytes


def _columns(
    x: torch.Tensor,
    weight: torch.Tensor,
    stride: list[int],
    padding: list[int],
    transposed: bool,
    groups: int,
) -> tuple[int, int]:
    """Every window that the kernel visits, side by side; and results of groups, before they are put together.

    Windows are of one group at a time, and of one sample where it is transposed.

    Source: Convolution.cpp, ConvolutionMM2d.cpp and NaiveConvolutionTranspose2d.cpp in aten/src/ATen/native.
    """
    kernel = weight.shape[2:]
    steps = list(zip(x.shape[2:], kernel, stride, padding, strict=True))
    places = [(size + 2 * pad - width) // step + 1 for size, width, step, pad in steps]
    place, size = torch.Size(places).numel() * x.shape[0], x.element_size()
    results = place * weight.shape[0] * size if groups > 1 and not transposed else 0
    if all(width == 1 for width in kernel) and all(step == 1 for step in stride):
        return 0, results
    windows = x.shape[2:].numel() * weight.shape[1] if transposed else place * x.shape[1] // groups
    return windows * kernel.numel() * size, results


_CUDA = {
    _ATEN._scaled_dot_product_flash_attention_backward.default: _flash_backward,
    _ATEN._scaled_dot_product_efficient_attention_backward.default: _efficient_backward,
    _ATEN.masked_scatter.default: _scatter,
    _ATEN.masked_scatter_backward.default: _scatter_backward,
}
_CPU = {
    _ATEN._scaled_dot_product_flash_attention_for_cpu.default: _cpu_flash_forward,
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward.default: _cpu_flash_backward,
    _ATEN.convolution.default: _cpu_convolution,
    _ATEN.convolution_backward.default: _cpu_convolution_backward,
    _ATEN.masked_scatter_backward.default: _cpu_scatter_backward,
}
