"""The end of SS2D: the routes' outputs and the skip connection are summed and normalised, in one pass each way."""

from .._device import LN2
from .._launch import tl, triton


@triton.jit(do_not_specialize_on_alignment=['pixels'])  # maps of any size run on the same compiled kernel
def merge_norm_kernel(
    y,  # [2, pixels, dim]
    x,  # [pixels, dim]
    D,  # [4, dim]
    weight,  # [dim], or None for no norm
    bias,  # [dim], or None
    merged,  # [pixels, dim] or None: written, the sum before the norm
    moments,  # [2, pixels] or None: written, mean and reciprocal deviation
    out,  # [pixels, dim]: written
    pixels,
    eps: tl.constexpr,
    dim: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
):
    """merged = ln 2 * (y[0] + y[1]) + sum(D) * x and out = LayerNorm(merged), for ROWS pixels."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, BLOCK_D)
    has_channel = channel < dim
    mask = (row < pixels)[:, None] & has_channel[None, :]
    offset = row[:, None] * dim + channel[None, :]
    skip = tl.zeros([BLOCK_D], tl.float32)
    for route in tl.static_range(4):
        skip += tl.load(D + route * dim + channel, mask=has_channel, other=0.0).to(tl.float32)  # [BLOCK_D]
    total = tl.load(y + offset, mask=mask, other=0.0).to(tl.float32)  # [ROWS, BLOCK_D]
    total += tl.load(y + tl.cast(pixels, tl.int64) * dim + offset, mask=mask, other=0.0).to(tl.float32)
    total *= LN2
    total += tl.load(x + offset, mask=mask, other=0.0).to(tl.float32) * skip[None, :]
    if weight is not None:
        if merged is not None:
            tl.store(merged + offset, total.to(merged.dtype.element_ty), mask=mask)
        mean = tl.sum(total, axis=1) / dim
        total = tl.where(has_channel[None, :], total - mean[:, None], 0.0)
        rstd = 1.0 / tl.sqrt(tl.sum(total * total, axis=1) / dim + eps)
        factor = tl.load(weight + channel, mask=has_channel, other=0.0).to(tl.float32)  # [BLOCK_D]
        shift = tl.load(bias + channel, mask=has_channel, other=0.0).to(tl.float32)  # [BLOCK_D]
        total = total * rstd[:, None] * factor[None, :] + shift[None, :]
        if moments is not None:
            tl.store(moments + row, mean, mask=row < pixels)
            tl.store(moments + pixels + row, rstd, mask=row < pixels)
    tl.store(out + offset, total.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize_on_alignment=['pixels', 'rows_per_program'])
def merge_norm_backward_kernel(
    grad_out,  # [pixels, dim]
    merged,  # [pixels, dim], or None without a norm
    x,  # [pixels, dim]
    weight,  # [dim], or None
    bias,  # [dim], where `out` is wanted
    moments,  # [2, pixels], or None
    grad_merged,  # [pixels, dim]: written, ln 2 times the gradient of merged
    out,  # [pixels, dim] or None: written, the output of the norm
    sums,  # [programs, 2 + 4, dim]: written, parts of the gradients of weight, bias and each route's D
    pixels,
    rows_per_program,
    dim: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
):
    """One program walks rows_per_program pixels, ROWS at a time."""
    program = tl.program_id(0)
    channel = tl.arange(0, BLOCK_D)
    has_channel = channel < dim
    grad_weight = tl.zeros([ROWS, BLOCK_D], tl.float32)
    grad_bias = tl.zeros([ROWS, BLOCK_D], tl.float32)
    grad_skip = tl.zeros([ROWS, BLOCK_D], tl.float32)
    if weight is not None:
        factor = tl.load(weight + channel, mask=has_channel, other=0.0).to(tl.float32)  # [BLOCK_D]
    if out is not None:
        shift = tl.load(bias + channel, mask=has_channel, other=0.0).to(tl.float32)  # [BLOCK_D]
    first = program.to(tl.int64) * rows_per_program
    for start in range(0, rows_per_program, ROWS):
        row = first + start + tl.arange(0, ROWS)
        has_row = (row < pixels) & (start + tl.arange(0, ROWS) < rows_per_program)
        mask = has_row[:, None] & has_channel[None, :]
        offset = row[:, None] * dim + channel[None, :]
        grad = tl.load(grad_out + offset, mask=mask, other=0.0).to(tl.float32)  # [ROWS, BLOCK_D]
        if weight is not None:
            mean = tl.load(moments + row, mask=has_row, other=0.0)  # [ROWS]
            rstd = tl.load(moments + pixels + row, mask=has_row, other=0.0)  # [ROWS]
            total = tl.load(merged + offset, mask=mask, other=0.0).to(tl.float32)  # [ROWS, BLOCK_D]
            normal = tl.where(mask, (total - mean[:, None]) * rstd[:, None], 0.0)
            if out is not None:
                normalised = normal * factor[None, :] + shift[None, :]
                tl.store(out + offset, normalised.to(out.dtype.element_ty), mask=mask)
            grad_weight += grad * normal
            grad_bias += grad
            grad *= factor[None, :]
            along = tl.sum(grad * normal, axis=1) / dim
            grad = (grad - tl.sum(grad, axis=1)[:, None] / dim - normal * along[:, None]) * rstd[:, None]
        tl.store(grad_merged + offset, (grad * LN2).to(grad_merged.dtype.element_ty), mask=mask)
        u = tl.load(x + offset, mask=mask, other=0.0).to(tl.float32)  # [ROWS, BLOCK_D]
        grad_skip += tl.where(mask, grad * u, 0.0)
    sums += program * 6 * dim + channel
    tl.store(sums, tl.sum(grad_weight, axis=0), mask=has_channel)
    tl.store(sums + dim, tl.sum(grad_bias, axis=0), mask=has_channel)
    skip = tl.sum(grad_skip, axis=0)
    for route in tl.static_range(4):
        tl.store(sums + (2 + route) * dim, skip, mask=has_channel)
