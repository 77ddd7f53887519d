"""Norms over channels, and of a residual connection's sum, in one pass each way."""

from functools import lru_cache
from typing import NamedTuple, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ._check import check, check_that
from ._device import load_factors
from ._launch import (
    MAX_PLANS,
    Launch,
    cdiv,
    next_power_of_2,
    num_processors,
    runs_on_triton,
    share_rows,
    tl,
    triton,
)
from ._operator import Operator

_MAX_CHANNELS = 8192  # of the Triton kernels, which hold a row in registers
_BLOCK_ELEMENTS = 2048  # rows times channels that a program holds at a time, more only if one row has more


class _Walk(NamedTuple):
    """How the backward pass shares its rows: rows times channels that a program holds at a time, and programs for each
    multiprocessor, each of which leaves a partial sum."""

    elements: int
    programs: int


# By the largest number of channels that each is for.
_WALKS = {256: _Walk(1024, 8), _MAX_CHANNELS: _Walk(2048, 4)}


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-5, out_dtype: Optional[torch.dtype] = None) -> Tensor:
    """RMSNorm over the channels: weight * x / sqrt(mean(x^2) + eps).

    Computed in fp32 (fp64 if x is fp64); on Triton by one kernel, and one for its backward pass, for up to 8192
    channels. Differentiable in reverse mode in every tensor.

    Args:
        x: [B, ..., d], in any floating dtype.
        weight: [d].
        eps: Added to the mean square.
        out_dtype: Dtype of the result, the weight's by default.

    Returns:
        [B, ..., d] in out_dtype.

    Raises:
        ValueError: If shapes, dtypes or devices do not fit together.
    """
    return _norm('rms_norm', x, weight, None, eps, out_dtype or weight.dtype)


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5, out_dtype: Optional[torch.dtype] = None
) -> Tensor:
    """LayerNorm over the channels: weight * (x - mean(x)) / sqrt(variance(x) + eps) + bias.

    Like `rms_norm` in all else; bias is [d], and differentiable too.
    """
    return _norm('layer_norm', x, weight, bias, eps, out_dtype or weight.dtype)


def add_norm(
    x: Tensor,
    residual: Optional[Tensor],
    weight: Tensor,
    bias: Optional[Tensor] = None,
    eps: float = 1e-5,
    out_dtype: Optional[torch.dtype] = None,
) -> Tuple[Tensor, Tensor]:
    """The norm of residual + x, and that sum: `layer_norm` with a bias, otherwise `rms_norm`.

    Like `rms_norm` in all else; residual is differentiable too.

    Args:
        x: [B, ..., d], in any floating dtype.
        residual: [B, ..., d], in any floating dtype; None for 0.
        weight: [d].
        bias: [d], or None.
        eps: Added to the mean square or the variance.
        out_dtype: Dtype of the norm, the weight's by default.

    Returns:
        The norm [B, ..., d] in out_dtype, and the sum [B, ..., d] in at least fp32.

    Raises:
        ValueError: If shapes, dtypes or devices do not fit together.
    """
    out_dtype = out_dtype or weight.dtype
    _check_norm('add_norm', x, weight, bias, out_dtype, residual)
    if _has_kernel(x):
        return _add_operator(x, residual, weight, bias, eps, out_dtype)
    summed = x.to(torch.promote_types(x.dtype, torch.float32))
    summed = summed if residual is None else residual + summed
    return _plain_norm(summed, weight, bias, eps, out_dtype), summed


def _norm(
    function: str, x: Tensor, weight: Tensor, bias: Optional[Tensor], eps: float, out_dtype: torch.dtype
) -> Tensor:
    _check_norm(function, x, weight, bias, out_dtype)
    return (_operator if _has_kernel(x) else _plain_norm)(x, weight, bias, eps, out_dtype)


def _check_norm(
    function: str,
    x: Tensor,
    weight: Tensor,
    bias: Optional[Tensor],
    out_dtype: torch.dtype,
    residual: Optional[Tensor] = None,
) -> None:
    is_matrix = x.ndim >= 2 and x.shape[-1] > 0
    check_that(is_matrix, f'{function}: x must be [B, ..., d] with d > 0, got {tuple(x.shape)}')
    sizes = '...' if residual is None else ' '.join(f'size_{i}' for i in range(x.ndim - 1))
    check(function, x=(x, f'{sizes} d'), weight=(weight, 'd'), bias=(bias, 'd'), residual=(residual, f'{sizes} d'))
    check_that(out_dtype.is_floating_point, f'{function}: out_dtype must be floating, got {out_dtype}')


def _has_kernel(x: Tensor) -> bool:
    return runs_on_triton(x) and x.shape[-1] <= _MAX_CHANNELS and not torch.jit.is_tracing()


def _plain_norm(x: Tensor, weight: Tensor, bias: Optional[Tensor], eps: float, out_dtype: torch.dtype) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    x, weight = x.to(wide), weight.to(wide)
    if bias is not None:
        return F.layer_norm(x, x.shape[-1:], weight, bias.to(wide), eps).to(out_dtype)
    # Not F.rms_norm, whose shape PyTorch 2.11 mistakes in graphs of any batch size.
    return (x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps) * weight).to(out_dtype)


def _forward(
    x: Tensor, weight: Tensor, bias: Optional[Tensor], eps: float, out_dtype: torch.dtype, save: bool
) -> Tuple[Tensor, Tensor]:
    bias = None if bias is None else bias.contiguous()
    out, _, moments = norm_forward(x.contiguous(), weight.contiguous(), bias, eps, out_dtype, save)
    return out, x.new_empty(0, dtype=torch.float32) if moments is None else moments


def _backward(grads: tuple, inputs: tuple, saved: tuple) -> Sequence[Optional[Tensor]]:
    (grad_out,), (x, weight, bias, _, _), (moments,) = grads, inputs, saved
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    sums = norm_backward(grad_out.contiguous(), x.contiguous(), weight.contiguous(), moments, bias is not None, grad_x)
    total = sums.sum(dim=0)
    return grad_x, total[0], None if bias is None else total[1]


def _like(
    x: Tensor, weight: Tensor, bias: Optional[Tensor], eps: float, out_dtype: torch.dtype, save: bool
) -> Tuple[Tensor, Tensor]:
    moments = (1 if bias is None else 2, x.shape[:-1].numel()) if save else (0,)
    return x.new_empty(x.shape, dtype=out_dtype), x.new_empty(moments, dtype=torch.float32)


_operator = Operator('norm', _forward, _backward, _like)


def _add_forward(
    x: Tensor,
    residual: Optional[Tensor],
    weight: Tensor,
    bias: Optional[Tensor],
    eps: float,
    out_dtype: torch.dtype,
    save: bool,
) -> Tuple[Tensor, Tensor, Tensor, Tensor]:
    """The norm, the sum, and for the backward pass the sum normalised before weight and bias, and its deviations."""
    x, residual, weight, bias = (None if t is None else t.contiguous() for t in (x, residual, weight, bias))
    summed = torch.empty_like(x, dtype=torch.float32)
    out, normal, moments = norm_forward(x, weight, bias, eps, out_dtype, save, residual, None, summed, save_normal=save)
    return out, summed, *(x.new_empty(0, dtype=torch.float32) if t is None else t for t in (normal, moments))


def _add_backward(grads: tuple, inputs: tuple, saved: tuple) -> Sequence[Optional[Tensor]]:
    (grad_out, grad_summed), (x, residual, weight, bias, _, _), (normal, moments) = grads, inputs, saved
    grad_out = torch.zeros_like(normal) if grad_out is None else grad_out.contiguous()
    grad_summed = None if grad_summed is None else grad_summed.contiguous()
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    grad_residual = None if residual is None else torch.empty_like(residual, memory_format=torch.contiguous_format)
    sums = norm_backward(
        *(grad_out, normal, weight.contiguous(), moments, bias is not None, grad_x, grad_summed, grad_residual),
        is_normal=True,
    )
    total = sums.sum(dim=0)
    return grad_x, grad_residual, total[0], None if bias is None else total[1]


def _add_like(
    x: Tensor,
    residual: Optional[Tensor],
    weight: Tensor,
    bias: Optional[Tensor],
    eps: float,
    out_dtype: torch.dtype,
    save: bool,
) -> Tuple[Tensor, Tensor, Tensor, Tensor]:
    normal = x.new_empty(x.shape if save else 0, dtype=out_dtype if save else torch.float32)
    moments = x.new_empty((1, x.shape[:-1].numel()) if save else 0, dtype=torch.float32)
    return x.new_empty(x.shape, dtype=out_dtype), x.new_empty(x.shape, dtype=torch.float32), normal, moments


_add_operator = Operator('add_norm', _add_forward, _add_backward, _add_like, results=2)


@triton.jit(do_not_specialize_on_alignment=['rows', 'rows_per_sample'])  # images of any size run on the same kernel
def norm_kernel(
    x,  # [rows, dim]
    residual,  # [rows, dim], or None
    scale,  # [samples], or None
    weight,  # [dim]
    bias,  # [dim]; None for RMSNorm
    out,  # [rows, dim]: written, the normalised residual + scale * x
    summed,  # [rows, dim] or None: written, residual + scale * x
    normal,  # [rows, dim] or None: written, the normalised sum before weight and bias
    moments,  # [1 or 2, rows] or None: written, reciprocal deviations, and means of LayerNorm if there is no `normal`
    rows,
    rows_per_sample,
    eps: tl.constexpr,
    dim: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
):
    """One program normalises ROWS rows."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, BLOCK_D)
    has_row = row < rows
    has_channel = channel < dim
    mask = has_row[:, None] & has_channel[None, :]
    offset = row[:, None] * dim + channel[None, :]
    total = tl.load(x + offset, mask=mask, other=0.0).to(tl.float32)  # [ROWS, BLOCK_D]
    if scale is not None:
        total *= load_factors(scale, row, rows, rows_per_sample)
    if residual is not None:
        total += tl.load(residual + offset, mask=mask, other=0.0).to(tl.float32)  # [ROWS, BLOCK_D]
    if summed is not None:
        tl.store(summed + offset, total.to(summed.dtype.element_ty), mask=mask)
    if bias is not None:
        mean = tl.sum(total, axis=1) / dim
        if moments is not None:
            if normal is None:
                tl.store(moments + rows + row, mean, mask=has_row)
        total = tl.where(has_channel[None, :], total - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(total * total, axis=1) / dim + eps)
    if moments is not None:
        tl.store(moments + row, rstd, mask=has_row)
    total *= rstd[:, None]
    if normal is not None:
        tl.store(normal + offset, total.to(normal.dtype.element_ty), mask=mask)
    total *= tl.load(weight + channel, mask=has_channel, other=0.0).to(tl.float32)[None, :]
    if bias is not None:
        total += tl.load(bias + channel, mask=has_channel, other=0.0).to(tl.float32)[None, :]
    tl.store(out + offset, total.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize_on_alignment=['rows', 'rows_per_sample', 'rows_per_program'])
def norm_backward_kernel(
    grad_out,  # [rows, dim]
    grad_summed,  # [rows, dim], or None
    summed,  # [rows, dim]: what was normalised, or that normalised before weight and bias
    scale,  # [samples], or None
    weight,  # [dim]
    moments,  # as in `norm_kernel`
    grad_residual,  # [rows, dim] or None: written
    grad_x,  # [rows, dim]: written
    sums,  # [programs, 1 or 2, dim]: written, parts of the gradients of weight and bias
    rows,
    rows_per_sample,
    rows_per_program,
    dim: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    CENTRED: tl.constexpr,
    NORMAL: tl.constexpr,
):
    """One program walks rows_per_program rows, ROWS at a time.

    With n = (summed - mean) * rstd, which `summed` itself is with NORMAL, and g = weight * grad_out:

        grad_residual = grad_summed + rstd * (g - n * mean(g * n) - mean(g)),    grad_x = scale * grad_residual

    where RMSNorm, which is not CENTRED, has neither mean nor mean(g).
    """
    program = tl.program_id(0)
    channel = tl.arange(0, BLOCK_D)
    has_channel = channel < dim
    grad_weight = tl.zeros([ROWS, BLOCK_D], tl.float32)
    grad_bias = tl.zeros([ROWS, BLOCK_D], tl.float32)
    factor = tl.load(weight + channel, mask=has_channel, other=0.0).to(tl.float32)  # [BLOCK_D]
    first = program.to(tl.int64) * rows_per_program
    for start in range(0, rows_per_program, ROWS):
        row = first + start + tl.arange(0, ROWS)
        has_row = row < rows
        mask = has_row[:, None] & has_channel[None, :]
        offset = row[:, None] * dim + channel[None, :]
        grad = tl.load(grad_out + offset, mask=mask, other=0.0).to(tl.float32)  # [ROWS, BLOCK_D]
        normal = tl.load(summed + offset, mask=mask, other=0.0).to(tl.float32)  # [ROWS, BLOCK_D]
        rstd = tl.load(moments + row, mask=has_row, other=0.0)  # [ROWS]
        if not NORMAL:
            if CENTRED:
                mean = tl.load(moments + rows + row, mask=has_row, other=0.0)  # [ROWS]
                normal -= mean[:, None]  # beyond the channels too, where grad is 0
            normal *= rstd[:, None]
        if CENTRED:
            grad_bias += grad
        grad_weight += grad * normal
        grad *= factor[None, :]
        along = tl.sum(grad * normal, axis=1) / dim
        if CENTRED:
            grad -= tl.sum(grad, axis=1)[:, None] / dim
        grad = (grad - normal * along[:, None]) * rstd[:, None]
        if grad_summed is not None:
            grad += tl.load(grad_summed + offset, mask=mask, other=0.0).to(tl.float32)  # [ROWS, BLOCK_D]
        if grad_residual is not None:
            tl.store(grad_residual + offset, grad.to(grad_residual.dtype.element_ty), mask=mask)
        if scale is not None:
            grad *= load_factors(scale, row, rows, rows_per_sample)
        tl.store(grad_x + offset, grad.to(grad_x.dtype.element_ty), mask=mask)
    if CENTRED:
        sums += program * 2 * dim + channel
        tl.store(sums + dim, tl.sum(grad_bias, axis=0), mask=has_channel)
    else:
        sums += program * dim + channel
    tl.store(sums, tl.sum(grad_weight, axis=0), mask=has_channel)


class NormOutputs(NamedTuple):
    out: Tensor
    normal: Optional[Tensor]
    moments: Optional[Tensor]


def norm_forward(
    x: Tensor,
    weight: Tensor,
    bias: Optional[Tensor],
    eps: float,
    out_dtype: torch.dtype,
    save: bool,
    residual: Optional[Tensor] = None,
    scale: Optional[Tensor] = None,
    summed: Optional[Tensor] = None,
    save_normal: bool = False,
) -> NormOutputs:
    """LayerNorm of residual + scale * x on Triton, or RMSNorm without a bias. All tensors are contiguous.

    Args:
        scale: Factor of each sample, [B]: equally many rows of x [..., d].
        save: Also return the moments [1 or 2, rows], reciprocal deviations and for LayerNorm means.
        summed: Where to write the sum.
        save_normal: Also return the normalised sum before weight and bias, in out_dtype; then no means are needed.
    """
    out = torch.empty_like(x, dtype=out_dtype)
    normal = torch.empty_like(out) if save_normal else None
    dim = x.shape[-1]
    rows = x.numel() // dim
    means = save and bias is not None and not save_normal
    moments = x.new_empty((2 if means else 1, rows), dtype=torch.float32) if save else None
    launch = _forward_launch(rows, 1 if scale is None else rows // scale.shape[0], dim, eps)
    launch(x, residual, scale, weight, bias, out, summed, normal, moments)
    return NormOutputs(out, normal, moments)


def norm_backward(
    grad_out: Tensor,
    summed: Tensor,
    weight: Tensor,
    moments: Tensor,
    has_bias: bool,
    grad_x: Tensor,
    grad_summed: Optional[Tensor] = None,
    grad_residual: Optional[Tensor] = None,
    scale: Optional[Tensor] = None,
    is_normal: bool = False,
) -> Tensor:
    """Gradients of `norm_forward`, the same at every run: fills grad_x and grad_residual, and returns the others.

    Args:
        summed: What was normalised; with `is_normal` the normalised sum before weight and bias.
        has_bias: Whether the norm is LayerNorm.

    Returns:
        Partial sums [parts, 1 or 2, dim] in fp32 of the gradients of the weight and, for LayerNorm, of the bias.
    """
    dim = summed.shape[-1]
    rows = summed.numel() // dim
    rows_per_sample = 1 if scale is None else rows // scale.shape[0]
    launch = _backward_launch(rows, rows_per_sample, dim, has_bias, is_normal, num_processors(summed))
    sums = summed.new_empty((launch.grid[0], 2 if has_bias else 1, dim), dtype=torch.float32)
    launch(grad_out, grad_summed, summed, scale, weight, moments, grad_residual, grad_x, sums)
    return sums


@lru_cache(maxsize=MAX_PLANS)
def _forward_launch(rows: int, rows_per_sample: int, dim: int, eps: float) -> Launch:
    block_d, block_rows, warps = _block(dim, _BLOCK_ELEMENTS)
    constants = eps, dim, block_d, block_rows
    return Launch(norm_kernel, cdiv(rows, block_rows), (rows, rows_per_sample), constants, warps)


@lru_cache(maxsize=MAX_PLANS)
def _backward_launch(
    rows: int, rows_per_sample: int, dim: int, has_bias: bool, is_normal: bool, processors: int
) -> Launch:
    walk = next(walk for most, walk in _WALKS.items() if dim <= most)
    block_d, block_rows, warps = _block(dim, walk.elements)
    programs, rows_per_program = share_rows(rows, block_rows, walk.programs * processors)
    sizes = rows, rows_per_sample, rows_per_program
    return Launch(norm_backward_kernel, programs, sizes, (dim, block_d, block_rows, has_bias, is_normal), warps)


def _block(dim: int, elements: int) -> Tuple[int, int, int]:
    """A program's channels and rows at a time, powers of 2, and warps."""
    block_d = next_power_of_2(dim)
    return block_d, max(elements // block_d, 1), max(4, block_d // 512)
