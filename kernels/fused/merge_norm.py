"""The end of SS2D: the routes' outputs and the skip connection are summed and normalised, in one pass each way."""

import triton
import triton.language as tl

from .elementwise import LN2


@triton.jit(do_not_specialize_on_alignment=['pixels'])  # maps of any size run on the same compiled kernel
def merge_norm(
    y_rows_ptr,
    y_columns_ptr,
    x_ptr,
    D_ptr,
    weight_ptr,
    bias_ptr,
    merged_ptr,
    out_ptr,
    moments_ptr,
    pixels,
    eps: tl.constexpr,
    dim: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    NORM: tl.constexpr,
    SAVE: tl.constexpr,
):
    """merged = ln 2 * (y_rows + y_columns) + sum(D) * x and out = LayerNorm(merged), on [pixels, dim]; D is [4, dim].

    Without NORM out = merged. With SAVE merged and moments [2, pixels], mean and reciprocal deviation, are kept.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, BLOCK)
    has_channel = channel < dim
    mask = (row < pixels)[:, None] & has_channel[None, :]
    offset = row[:, None] * dim + channel[None, :]
    skip = tl.zeros([BLOCK], tl.float32)
    for route in tl.static_range(4):
        skip += tl.load(D_ptr + route * dim + channel, mask=has_channel, other=0.0).to(tl.float32)
    merged = tl.load(y_rows_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    merged += tl.load(y_columns_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    merged *= LN2
    merged += tl.load(x_ptr + offset, mask=mask, other=0.0).to(tl.float32) * skip[None, :]
    out = merged
    if NORM:
        mean = tl.sum(merged, axis=1) / dim
        centred = tl.where(has_channel[None, :], merged - mean[:, None], 0.0)
        rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=1) / dim + eps)
        weight = tl.load(weight_ptr + channel, mask=has_channel, other=0.0).to(tl.float32)
        bias = tl.load(bias_ptr + channel, mask=has_channel, other=0.0).to(tl.float32)
        out = centred * rstd[:, None] * weight[None, :] + bias[None, :]
        if SAVE:
            tl.store(merged_ptr + offset, merged.to(merged_ptr.dtype.element_ty), mask=mask)
            tl.store(moments_ptr + row, mean, mask=row < pixels)
            tl.store(moments_ptr + pixels + row, rstd, mask=row < pixels)
    tl.store(out_ptr + offset, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize_on_alignment=['pixels', 'rows_per_program'])
def merge_norm_backward(
    grad_out_ptr,
    merged_ptr,
    x_ptr,
    weight_ptr,
    moments_ptr,
    grad_merged_ptr,
    partial_ptr,
    pixels,
    rows_per_program,
    dim: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    NORM: tl.constexpr,
):
    """ln 2 times the gradient of merged, [pixels, dim], and partial sums [programs, 3, dim] of the gradients of weight,
    bias and skip."""
    program = tl.program_id(0)
    channel = tl.arange(0, BLOCK)
    has_channel = channel < dim
    grad_weight = tl.zeros([ROWS, BLOCK], tl.float32)
    grad_bias = tl.zeros([ROWS, BLOCK], tl.float32)
    grad_skip = tl.zeros([ROWS, BLOCK], tl.float32)
    if NORM:
        weight = tl.load(weight_ptr + channel, mask=has_channel, other=0.0).to(tl.float32)
    first = program.to(tl.int64) * rows_per_program
    for start in range(0, rows_per_program, ROWS):
        row = first + start + tl.arange(0, ROWS)
        has_row = (row < pixels) & (start + tl.arange(0, ROWS) < rows_per_program)
        mask = has_row[:, None] & has_channel[None, :]
        offset = row[:, None] * dim + channel[None, :]
        grad = tl.load(grad_out_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        if NORM:
            mean = tl.load(moments_ptr + row, mask=has_row, other=0.0)
            rstd = tl.load(moments_ptr + pixels + row, mask=has_row, other=0.0)
            merged = tl.load(merged_ptr + offset, mask=mask, other=0.0).to(tl.float32)
            normal = tl.where(mask, (merged - mean[:, None]) * rstd[:, None], 0.0)
            grad_weight += grad * normal
            grad_bias += grad
            grad *= weight[None, :]
            along = tl.sum(grad * normal, axis=1) / dim
            grad = (grad - tl.sum(grad, axis=1)[:, None] / dim - normal * along[:, None]) * rstd[:, None]
        tl.store(grad_merged_ptr + offset, (grad * LN2).to(grad_merged_ptr.dtype.element_ty), mask=mask)
        x = tl.load(x_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        grad_skip += tl.where(mask, grad * x, 0.0)
    partial_ptr += program * 3 * dim + channel
    if NORM:
        tl.store(partial_ptr, tl.sum(grad_weight, axis=0), mask=has_channel)
        tl.store(partial_ptr + dim, tl.sum(grad_bias, axis=0), mask=has_channel)
    else:
        tl.store(partial_ptr, tl.zeros([BLOCK], tl.float32), mask=has_channel)
        tl.store(partial_ptr + dim, tl.zeros([BLOCK], tl.float32), mask=has_channel)
    tl.store(partial_ptr + 2 * dim, tl.sum(grad_skip, axis=0), mask=has_channel)
