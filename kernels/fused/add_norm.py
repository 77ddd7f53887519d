"""Residual connection and norm in one pass each way: the kernels and their launches.

Rows are the entries of all dimensions but the last, the channels, which one block holds whole.
"""

from typing import Optional

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..backend import processors_of
from .arithmetic import parts, power_of_2
from .launcher import Launcher

BLOCK_ELEMENTS = 2048  # rows times channels that a program holds at a time, more only if one row has more
PROGRAMS_PER_PROCESSOR = 8  # of the backward pass, each of which leaves a partial sum


@triton.jit(do_not_specialize_on_alignment=['rows', 'rows_per_sample'])  # images of any size run on the same kernel
def add_norm(
    x_ptr,
    residual_ptr,
    scale_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    summed_ptr,
    moments_ptr,
    rows,
    rows_per_sample,
    eps: tl.constexpr,
    dim: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """summed = residual + scale * x and out = norm(summed), on [rows, dim]; one scale for each sample's rows.

    The norm is LayerNorm if there is a bias, else RMSNorm. What is None is left out; moments are [1, rows] reciprocal
    deviations, of LayerNorm followed by means.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, BLOCK)
    has_row = row < rows
    has_channel = channel < dim
    mask = has_row[:, None] & has_channel[None, :]
    offset = row[:, None] * dim + channel[None, :]
    summed = tl.load(x_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    if scale_ptr is not None:
        scale = tl.load(scale_ptr + row // rows_per_sample, mask=has_row, other=0.0).to(tl.float32)
        summed *= scale[:, None]
    if residual_ptr is not None:
        summed += tl.load(residual_ptr + offset, mask=mask, other=0.0)
    if summed_ptr is not None:
        tl.store(summed_ptr + offset, summed, mask=mask)
    if bias_ptr is not None:
        mean = tl.sum(summed, axis=1) / dim
        if moments_ptr is not None:
            tl.store(moments_ptr + rows + row, mean, mask=has_row)
        summed = tl.where(has_channel[None, :], summed - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(summed * summed, axis=1) / dim + eps)
    if moments_ptr is not None:
        tl.store(moments_ptr + row, rstd, mask=has_row)
    weight = tl.load(weight_ptr + channel, mask=has_channel, other=0.0).to(tl.float32)
    out = summed * rstd[:, None] * weight[None, :]
    if bias_ptr is not None:
        out += tl.load(bias_ptr + channel, mask=has_channel, other=0.0).to(tl.float32)[None, :]
    tl.store(out_ptr + offset, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize_on_alignment=['rows', 'rows_per_sample', 'rows_per_program'])
def add_norm_backward(
    grad_out_ptr,
    grad_summed_ptr,
    summed_ptr,
    scale_ptr,
    weight_ptr,
    moments_ptr,
    grad_residual_ptr,
    grad_x_ptr,
    partial_ptr,
    rows,
    rows_per_sample,
    rows_per_program,
    dim: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    CENTRED: tl.constexpr,
):
    """Gradients of residual and x, [rows, dim], and partial sums [programs, 1, dim] of that of the weight, or
    [programs, 2, dim] with that of the bias if the norm is CENTRED.

    With n = (summed - mean) * rstd and g = weight * grad_out:

        grad_residual = grad_summed + rstd * (g - n * mean(g * n) - mean(g)),    grad_x = scale * grad_residual

    where RMSNorm has neither mean nor mean(g).
    """
    program = tl.program_id(0)
    channel = tl.arange(0, BLOCK)
    has_channel = channel < dim
    grad_weight = tl.zeros([ROWS, BLOCK], tl.float32)
    grad_bias = tl.zeros([ROWS, BLOCK], tl.float32)
    weight = tl.load(weight_ptr + channel, mask=has_channel, other=0.0).to(tl.float32)
    first = program.to(tl.int64) * rows_per_program
    for start in range(0, rows_per_program, ROWS):
        row = first + start + tl.arange(0, ROWS)
        has_row = row < rows
        mask = has_row[:, None] & has_channel[None, :]
        offset = row[:, None] * dim + channel[None, :]
        grad = tl.load(grad_out_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        normal = tl.load(summed_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        rstd = tl.load(moments_ptr + row, mask=has_row, other=0.0)
        if CENTRED:
            mean = tl.load(moments_ptr + rows + row, mask=has_row, other=0.0)
            normal -= mean[:, None]  # beyond the channels too, where grad is 0
            grad_bias += grad
        normal *= rstd[:, None]
        grad_weight += grad * normal
        grad *= weight[None, :]
        along = tl.sum(grad * normal, axis=1) / dim
        if CENTRED:
            grad -= tl.sum(grad, axis=1)[:, None] / dim
        grad = (grad - normal * along[:, None]) * rstd[:, None]
        if grad_summed_ptr is not None:
            grad += tl.load(grad_summed_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        if grad_residual_ptr is not None:
            tl.store(grad_residual_ptr + offset, grad, mask=mask)
        if grad_x_ptr is not None:
            if scale_ptr is not None:
                scale = tl.load(scale_ptr + row // rows_per_sample, mask=has_row, other=0.0).to(tl.float32)
                grad *= scale[:, None]
            tl.store(grad_x_ptr + offset, grad.to(grad_x_ptr.dtype.element_ty), mask=mask)
    if CENTRED:
        partial_ptr += program * 2 * dim + channel
        tl.store(partial_ptr + dim, tl.sum(grad_bias, axis=0), mask=has_channel)
    else:
        partial_ptr += program * dim + channel
    tl.store(partial_ptr, tl.sum(grad_weight, axis=0), mask=has_channel)


_add_norm = Launcher(add_norm)
_add_norm_backward = Launcher(add_norm_backward)


def _block(dim: int) -> tuple[int, int, int]:
    """Channels and rows of a program's block, powers of 2, and its warps."""
    channels = power_of_2(dim)
    rows = max(BLOCK_ELEMENTS // channels, 1)
    return channels, rows, max(4, channels // 512)


def _rows_per_sample(x: Tensor) -> int:
    return x.shape[1:-1].numel()


def forward(
    x: Tensor,
    residual: Optional[Tensor],
    scale: Optional[Tensor],
    weight: Tensor,
    bias: Optional[Tensor],
    out: Tensor,
    summed: Optional[Tensor],
    moments: Optional[Tensor],
    eps: float,
) -> None:
    """Fills `out`, `summed` and `moments`, all tensors being contiguous; see `add_norm`."""
    dim = x.shape[-1]
    rows = x.numel() // dim
    channels, block_rows, warps = _block(dim)
    tensors = x, residual, scale, weight, bias, out, summed, moments
    sizes = rows, _rows_per_sample(x)
    _add_norm(parts(rows, block_rows), tensors, sizes, (eps, dim, channels, block_rows), warps)


def backward(
    grad_out: Tensor,
    grad_summed: Optional[Tensor],
    summed: Tensor,
    scale: Optional[Tensor],
    weight: Tensor,
    moments: Tensor,
    grad_residual: Optional[Tensor],
    grad_x: Optional[Tensor],
) -> Tensor:
    """Fills `grad_residual` and `grad_x`, all tensors being contiguous; see `add_norm_backward`.

    Returns:
        Gradient of the weight [1, dim] in fp32, of LayerNorm followed by that of the bias [2, dim].
    """
    dim = summed.shape[-1]
    rows = summed.numel() // dim
    channels, block_rows, warps = _block(dim)
    programs = min(parts(rows, block_rows), PROGRAMS_PER_PROCESSOR * processors_of(summed))
    rows_per_program = parts(parts(rows, max(programs, 1)), block_rows) * block_rows
    programs = parts(rows, max(rows_per_program, 1))
    vectors = moments.shape[0]
    partial = torch.empty(programs, vectors, dim, dtype=torch.float32, device=summed.device)
    tensors = grad_out, grad_summed, summed, scale, weight, moments, grad_residual, grad_x, partial
    sizes = rows, _rows_per_sample(summed), rows_per_program
    _add_norm_backward(programs, tensors, sizes, (dim, channels, block_rows, vectors == 2), warps)
    return partial.sum(dim=0)
